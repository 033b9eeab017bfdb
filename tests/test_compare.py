from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.errors import NearfarError
from nearfar.lab.compare import compare_runs, find_runs, write_comparison
from nearfar.lab.report import write_report
from nearfar.lab.table import comparison_tables, metrics_table
from nearfar.training.run_folder import RunFolder
from test_resume import train
from toy_system import toy_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning rates, one of them no training at all, on the same three seeds."""
    root = tmp_path_factory.mktemp("runs")
    for lr in (1e-2, 1e-12):
        for seed in range(3):
            train(root / f"lr={lr:g},seed={seed}", toy_config(lr=lr, seed=seed, epochs=12))
    return root


def test_arms_pairs_and_verdict(runs: Path) -> None:
    comparison = compare_runs([runs], baseline="lr=1e-12")
    assert {arm.label for arm in comparison.arms} == {"lr=0.01", "lr=1e-12"}
    assert comparison.seeds == [0, 1, 2]
    difference = comparison.differences["lr=0.01"]["MRR"]
    by_hand = [
        json.loads((runs / f"lr=0.01,seed={s}" / "metrics.json").read_text())["splits"]["val"]["MRR"]["value"]
        - json.loads((runs / f"lr=1e-12,seed={s}" / "metrics.json").read_text())["splits"]["val"]["MRR"][
            "value"
        ]
        for s in range(3)
    ]
    assert difference.value == pytest.approx(sum(by_hand) / 3, abs=1e-6)
    assert difference.per_seed == pytest.approx(by_hand, abs=1e-6)
    assert difference.verdict == "better"
    assert comparison_tables(comparison)


def test_an_arm_against_itself_is_not_distinguishable(runs: Path, tmp_path: Path) -> None:
    for seed in range(3):
        source = runs / f"lr=0.01,seed={seed}"
        for copy, rate in (("a", 0.01), ("b", 0.02)):
            folder = RunFolder(tmp_path / f"{copy}{seed}")
            folder.path.mkdir()
            for name in ("metrics.json", "per_item.npz", "train_log.jsonl"):
                (folder.path / name).write_bytes((source / name).read_bytes())
            folder.write_text(
                "config.yaml", (source / "config.yaml").read_text().replace("lr: 0.01", f"lr: {rate}")
            )
    comparison = compare_runs([tmp_path], baseline="lr=0.01")
    assert comparison.differences["lr=0.02"]["MRR"].verdict == "not distinguishable"


def test_other_splits_are_refused_with_the_reason(runs: Path, tmp_path: Path) -> None:
    source = runs / "lr=0.01,seed=0"
    folder = RunFolder(tmp_path / "other")
    folder.path.mkdir()
    metrics = json.loads((source / "metrics.json").read_text())
    metrics["splits"]["val"]["MRR"]["protocol"]["split"] = "another"
    folder.write_json("metrics.json", metrics)
    (folder.path / "per_item.npz").write_bytes((source / "per_item.npz").read_bytes())
    folder.write_text("config.yaml", (source / "config.yaml").read_text().replace("lr: 0.01", "lr: 0.03"))
    comparison = compare_runs([source, folder.path], baseline="lr=0.01")
    assert "split differs" in comparison.refused["lr=0.03: MRR"]
    assert "MRR" not in comparison.differences["lr=0.03"]


def test_what_cannot_be_compared_says_why(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="at least two runs"):
        compare_runs([runs / "lr=0.01,seed=0"])
    with pytest.raises(NearfarError, match="no such run"):
        find_runs([tmp_path / "nothing"])
    with pytest.raises(NearfarError, match="neither a run nor a folder of runs"):
        find_runs([tmp_path])
    with pytest.raises(NearfarError, match=r"did you mean 'lr=0\.01'"):
        compare_runs([runs], baseline="lr=0.1")
    unfinished = RunFolder(tmp_path / "unfinished")
    unfinished.write_text("config.yaml", "seed: 1")
    with pytest.raises(NearfarError, match=r"not finished: .*unfinished"):
        find_runs([runs, unfinished.path])
    with pytest.raises(NearfarError, match="same configuration and seed"):
        compare_runs([runs, runs / "lr=0.01,seed=0"])


def test_reports_stand_alone(runs: Path) -> None:
    comparison = compare_runs([runs])
    page = write_comparison(comparison).read_text()
    assert "not distinguishable" in page
    assert page.count("<svg") >= 2
    run = RunFolder(runs / "lr=0.01,seed=0")
    run.write_json("environment.json", {})
    page = write_report(run).read_text()
    for outside in ("http://", "https://", "<script", "src="):
        assert outside not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", ""), outside
    assert "Training loss" in page
    assert metrics_table(run).row_count == 5
