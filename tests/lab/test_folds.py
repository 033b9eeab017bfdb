"""A cross-validation compared as one: against the same numbers taken fold by fold, by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from nearfar.config import to_dict
from nearfar.errors import NearfarError
from nearfar.lab.compare import compare_runs
from nearfar.lab.report import write_comparison
from nearfar.lab.summary import describe_comparison
from nearfar.lab.table import comparison_tables
from nearfar.metrics import Estimate, few_runs, paired_difference
from nearfar.training.run_folder import RunFolder
from toy_system import toy_config

pytestmark = pytest.mark.slow  # real runs

SIZES = {"A": 40, "B": 70, "C": 55}
GAIN = {"A": 0.1, "B": 0.3, "C": 0.2}


def scores(loss: str, fold: str, seed: int) -> np.ndarray:
    """What a run scored on the items of its fold: those of ``new`` are better, by another amount in each fold."""
    base = np.random.default_rng([ord(fold), 0]).random(SIZES[fold]) * 0.5
    noise = 0.02 * np.random.default_rng([ord(fold), seed, len(loss)]).standard_normal(SIZES[fold])
    return base + noise + (GAIN[fold] if loss == "new" else 0.0)


def write(root: Path, loss: str, fold: str, seed: int) -> None:
    folder = RunFolder(root / f"loss={loss},hold={fold},seed={seed}")
    config = to_dict(toy_config(seed=seed)) | {"data": {"hold_out": fold}, "kind": loss}
    values = scores(loss, fold, seed)
    protocol = {"gallery": SIZES[fold], "split": f"hash of {fold}"}
    estimate = Estimate(float(values.mean()), 0.0, 1.0, 1 / SIZES[fold], len(values), False, "MRR", protocol)
    folder.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    folder.write_text("train_log.jsonl", json.dumps({"kind": "epoch", "epoch": 1, "train_loss": 1.0}) + "\n")
    folder.write_json(
        "metrics.json",
        {"system": "toy", "monitor": "MRR", "best_epoch": 1, "splits": {"test": {"MRR": estimate.to_dict()}}},
    )
    kept = io.BytesIO()
    np.savez(kept, **{"test/ids": np.array([f"{i}" for i in range(len(values))]), "test/MRR": values})
    (folder.path / "per_item.npz").write_bytes(kept.getvalue())


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for loss in ("old", "new"):
        for fold in SIZES:
            for seed in range(3):
                write(tmp_path / "runs", loss, fold, seed)
    return tmp_path / "runs"


def stacked(loss: str, folds: str) -> np.ndarray:
    return np.stack([np.concatenate([scores(loss, fold, seed) for fold in folds]) for seed in range(3)])


def test_folds_are_one_arm(runs: Path) -> None:
    comparison = compare_runs([runs], baseline="kind=old", over="data.hold_out")
    assert sorted(arm.label for arm in comparison.arms) == ["kind=new", "kind=old"]
    by_hand = paired_difference(stacked("new", "ABC"), stacked("old", "ABC"))
    difference = comparison.differences["kind=new"]["MRR"]
    assert (difference.value, difference.low, difference.high) == pytest.approx(
        (by_hand.value, by_hand.low, by_hand.high), abs=1e-6
    )
    assert difference.n == sum(SIZES.values())
    reading = comparison.by_fold["kind=new"]["MRR"]
    for fold in SIZES:
        alone = paired_difference(stacked("new", fold), stacked("old", fold))
        assert reading.folds[fold].value == pytest.approx(alone.value, abs=1e-6)
        assert reading.folds[fold].value == pytest.approx(GAIN[fold], abs=0.02)
    means = [reading.folds[fold].value for fold in SIZES]
    assert (reading.value, (reading.low, reading.high)) == (
        pytest.approx(np.mean(means)),
        pytest.approx(few_runs(means)),
    )
    estimate = comparison.arms[0].estimates[0]["MRR"]
    assert estimate.protocol["gallery"] == "40–70"
    assert estimate.chance == pytest.approx(3 / sum(SIZES.values()))


def test_tables_page_and_json_have_every_fold(runs: Path, tmp_path: Path) -> None:
    comparison = compare_runs([runs], baseline="kind=old", over="data.hold_out")
    console = Console(width=200, record=True, file=io.StringIO())
    for table in comparison_tables(comparison):
        console.print(table)
    text = console.export_text()
    assert "by data.hold_out" in text
    assert f"{comparison.by_fold['kind=new']['MRR'].folds['B'].value:+.3f}" in text
    page = write_comparison(comparison, tmp_path / "out")
    assert page.read_text().count("hold=") == 18  # a link to every run
    kept = json.loads(page.with_name("comparison.json").read_text())
    assert kept["by_fold"]["kind=new"]["MRR"]["folds"].keys() == SIZES.keys()
    assert len(kept["arms"]["kind=old"]) == 9
    assert describe_comparison(comparison)


def test_without_over_folds_are_arms_of_their_own(runs: Path) -> None:
    comparison = compare_runs([runs], baseline="data.hold_out=A,kind=old")
    assert len(comparison.arms) == 6
    assert any("different items" in why for why in comparison.refused.values())


def test_folds_that_do_not_fit_say_why(runs: Path) -> None:
    with pytest.raises(NearfarError, match="no run has this option; did you mean"):
        compare_runs([runs], over="data.holdout")
    for seed in range(3):
        for file in (lost := runs / f"loss=new,hold=C,seed={seed}").iterdir():
            file.unlink()
        lost.rmdir()
    with pytest.raises(NearfarError, match="has the folds A, B"):
        compare_runs([runs], over="data.hold_out")
