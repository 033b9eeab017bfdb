"""A sweep: its axes, pictures and best cell; losses that are not compared; launchers that compose."""

from __future__ import annotations

import json
import math
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import register_configs
from nearfar.errors import NearfarError
from nearfar.lab.compare import compare_runs
from nearfar.lab.report import sweep_pictures, write_comparison
from nearfar.lab.summary import describe_comparison, expected_lead, sweep_of
from nearfar.lab.table import comparison_tables
from nearfar.launch import _check_plugins, check_runs, objective
from nearfar.training.run_folder import RunFolder
from run_files import copied
from toy_system import toy_config, train

pytestmark = pytest.mark.slow  # real runs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for seed in (0, 1):
        train(root / f"seed={seed}", toy_config(lr=1e-2, seed=seed, epochs=2))
    return root


def grid(source: Path, target: Path, gain: dict[tuple[float, float], float]) -> Path:
    """Runs over lr × width whose scores are those of the source and the gain of their cell."""
    for (lr, width), more in gain.items():
        for seed in (0, 1):
            new = {"lr: 0.01": f"lr: {lr}", "logger: null": f"logger: null\nwidth: {width}"}
            folder = copied(source / f"seed={seed}", target / f"lr={lr},width={width},seed={seed}", new)
            with np.load(folder.path / "per_item.npz") as arrays:
                scores = {name: arrays[name] for name in arrays.files}
            noise = 0.02 * np.random.default_rng([seed, int(1e6 * lr), int(width)]).standard_normal(400)
            for name in scores:
                if name != "val/ids":
                    scores[name] = np.clip(scores[name] * 0.5 + more + noise[: len(scores[name])], 0, 1)
            np.savez(folder.path / "per_item.npz", **scores)
            metrics = folder.read_json("metrics.json")
            metrics["splits"]["val"]["MRR"]["value"] = float(scores["val/MRR"].mean())
            folder.write_json("metrics.json", metrics)
    return target


def test_axes_pictures_and_the_best_cell(source: Path, tmp_path: Path) -> None:
    gain = {(0.01, 1): 0.0, (0.01, 2): 0.01, (0.02, 1): 0.02, (0.02, 2): 0.2, (0.03, 1): 0.0, (0.03, 2): 0.0}
    comparison = compare_runs([grid(source, tmp_path, gain)], baseline="lr=0.01, width=1")
    sweep = sweep_of(comparison)
    assert sweep is not None
    assert set(sweep.axes) == {"lr", "width"}
    assert len(sweep.cells) == 6
    assert sweep.best is not None
    assert sweep.best.label == "lr=0.02, width=2"
    assert sweep.chosen_on == "val"
    for words in ("Best of 5", "better than the baseline", "equal arms leads by about"):
        assert words in sweep.verdict, sweep.verdict
    assert f"(Holm) it is {comparison.together['lr=0.02, width=2']['MRR']}" in sweep.verdict
    (sheet,) = sweep.sheets
    assert (sheet.x, sheet.y) == ("lr", "width")
    (picture,) = sweep_pictures(comparison, sweep)
    assert f"{comparison.summary['lr=0.02, width=2']['MRR'].value:.3f}" in picture
    # Many arms: one table of the sweep and one of the best arm, and one paragraph on it.
    titles = [str(table.title) for table in comparison_tables(comparison)]
    assert len(titles) == 2
    assert titles[0].startswith("sweep")
    assert describe_comparison(comparison)[0] == sweep.verdict
    page = write_comparison(comparison).read_text()
    assert "Framed or bold" in page
    assert "<script" not in page
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["sweep"]["best"] == "lr=0.02, width=2"


def test_one_axis_is_a_line_and_two_arms_are_no_sweep(source: Path, tmp_path: Path) -> None:
    line = compare_runs([grid(source, tmp_path / "a", {(0.01, 1): 0.0, (0.02, 1): 0.0, (0.03, 1): 0.0})])
    sweep = sweep_of(line)
    assert sweep is not None
    assert [(sheet.x, sheet.y) for sheet in sweep.sheets] == [("lr", None)]
    assert "not distinguishable" in sweep.verdict
    assert sweep_pictures(line, sweep)[0].startswith("<svg")
    two = compare_runs([grid(source, tmp_path / "b", {(0.01, 1): 0.0, (0.02, 1): 0.0})])
    assert sweep_of(two) is None


def test_the_cell_is_chosen_on_validation_where_there_is_a_test(source: Path, tmp_path: Path) -> None:
    """Best on test and best on validation are different arms: the one of validation is named, with its test figure."""
    grid(source, tmp_path, {(0.01, 1): 0.0, (0.02, 1): 0.0, (0.03, 1): 0.1})
    for run in tmp_path.iterdir():
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["splits"]["test"] = metrics["splits"]["val"]
        metrics["splits"] = json.loads(json.dumps(metrics["splits"]))
        metrics["splits"]["val"]["MRR"]["value"] = 0.9 if "lr=0.02" in run.name else 0.1
        (run / "metrics.json").write_text(json.dumps(metrics))
        with np.load(run / "per_item.npz") as arrays:
            scores = {name.replace("val/", "test/"): arrays[name] for name in arrays.files}
        np.savez(run / "per_item.npz", **scores)
    comparison = compare_runs([tmp_path], baseline="lr=0.01")
    sweep = sweep_of(comparison)
    assert comparison.split == "test"
    assert sweep is not None
    assert sweep.best is not None
    assert sweep.best.label == "lr=0.02"
    assert "did not favour it" in sweep.verdict


def test_the_lead_of_the_best_of_equal_arms() -> None:
    rng = np.random.default_rng(0)
    for arms in (2, 6, 30):
        simulated = rng.standard_normal((20_000, arms)).max(1).mean()
        assert expected_lead(arms, 1.0) == pytest.approx(simulated, rel=0.06)


def test_runs_that_the_doctor_warns_of_are_named(source: Path, tmp_path: Path) -> None:
    comparison = compare_runs([grid(source, tmp_path, {(0.01, 1): 0.0, (0.02, 1): 0.0})])
    run = comparison.arms[1].runs[1]
    run.write_json(
        "doctor.json", {"findings": [{"id": "collapse", "severity": "error", "title": "Collapse."}]}
    )
    named = [line for line in describe_comparison(comparison) if "doctor" in line]
    assert len(named) == 1
    assert "seed 1: the doctor found collapse" in named[0]


def test_losses_are_compared_only_where_they_measure_the_same(source: Path, tmp_path: Path) -> None:
    def arm(name: str, lr: float, change: dict[str, float] | None = None, config: str = "") -> None:
        for seed in (0, 1):
            new = {"lr: 0.01": f"lr: {lr}", "logger: null": f"logger: null\n{config}"}
            folder = copied(source / f"seed={seed}", tmp_path / f"{name}{seed}", new)
            records = list(folder.log())
            folder.log_path.unlink()
            for record in records:
                if record["kind"] == "step":
                    record = record | {"candidates": 64.0, "floor": 0.0, "scale": 14.3} | (change or {})
                folder.append(record)

    arm("a", 0.01)
    arm("same", 0.02)
    arm("wider", 0.03, {"candidates": 128.0})
    arm("floored", 0.04, {"floor": 0.7})
    arm("warmer", 0.05, {"scale": 5.0})
    arm("hard", 0.06, config="sampler: {name: hard}")
    arm("focal", 0.07, config="loss: {name: focal}")
    losses = compare_runs([tmp_path], baseline="lr=0.01").losses
    sentences = {label.split("lr=")[1].split(",")[0]: str(reading) for label, reading in losses.items()}
    assert "over seeds" in sentences["0.02"]
    for lr, words in {
        "0.03": "different number of candidates: 128 and 64",
        "0.04": "different floor",
        "0.05": "different temperature",
        "0.06": "batches composed differently (sampler.name: hard and None)",
        "0.07": "different loss (loss.name: focal and None)",
    }.items():
        assert words in sentences[lr], sentences[lr]


def test_seeds_that_only_one_arm_has(source: Path, tmp_path: Path) -> None:
    copied(source / "seed=0", tmp_path / "a0")
    copied(source / "seed=1", tmp_path / "a1")
    copied(source / "seed=0", tmp_path / "b0", {"lr: 0.01": "lr: 0.02"})
    copied(source / "seed=1", tmp_path / "c7", {"lr: 0.01": "lr: 0.03", "seed: 1": "seed: 7"})
    comparison = compare_runs([tmp_path], baseline="lr=0.01")
    assert comparison.differences["lr=0.02"]["MRR"].seeds == 1
    assert any("seeds [1] are left out" in note for note in comparison.notes)
    assert any("one seed in common" in note for note in comparison.notes)
    assert "no seed in common: [0, 1] and [7]" in comparison.refused["lr=0.03"]
    assert comparison.worse == ["lr=0.03"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": {"gallery": 7, "split": "x"}}, "differs"),
        ({"chance": 0.4321}, "chance level differs"),
        ({"trivial": True}, "trivial here"),
        (None, "not measured in lr=0.02"),
    ],
)
def test_metrics_with_other_protocols_are_refused(
    source: Path, tmp_path: Path, change: dict[str, object] | None, reason: str
) -> None:
    copied(source / "seed=0", tmp_path / "a")
    other = copied(source / "seed=0", tmp_path / "b", {"lr: 0.01": "lr: 0.02"})
    metrics = other.read_json("metrics.json")
    if change is None:
        del metrics["splits"]["val"]["MRR"]
    else:
        metrics["splits"]["val"]["MRR"] |= change
    other.write_json("metrics.json", metrics)
    comparison = compare_runs([tmp_path], baseline="lr=0.01")
    assert reason in comparison.refused["lr=0.02: MRR"]
    assert "MRR" not in comparison.differences["lr=0.02"]
    assert comparison.worse == ["lr=0.02"]
    assert comparison_tables(comparison)
    write_comparison(comparison)


@pytest.mark.parametrize(
    ("override", "module"),
    [
        ("hydra/launcher=joblib", "hydra_plugins.hydra_joblib_launcher"),
        ("hydra/launcher=submitit_local", "hydra_plugins.hydra_submitit_launcher"),
        ("hydra/launcher=submitit_slurm", "hydra_plugins.hydra_submitit_launcher"),
        ("hydra/launcher=ray", "hydra_plugins.hydra_ray_launcher"),
        ("hydra/sweeper=search", "hydra_plugins.hydra_optuna_sweeper"),
    ],
)
def test_launchers_and_sweepers_compose(override: str, module: str) -> None:
    if util.find_spec(module) is None:
        with pytest.raises(NearfarError, match=r"pip install 'nearfar\["):
            _check_plugins([override])
        pytest.skip(f"{module} is not installed")
    register_configs("molecules")
    with initialize_config_module("nearfar.configs", version_base="1.3"):
        config = compose("train", overrides=["experiment=molecules", override], return_hydra_config=True)
    assert module in config.hydra.launcher._target_ + config.hydra.sweeper._target_
    if "search" in override:
        assert config.hydra.sweeper.direction == "maximize"
    assert _check_plugins([override]) == ("search" in override)


def test_both_ends_of_an_interval_are_checked() -> None:
    inside = ["experiment=molecules", "sampler=hard", "hard_ratio=interval(0.2,0.8)"]
    check_runs(inside, sweep=True, search=True)
    with pytest.raises(NearfarError, match=r"hard_ratio=1\.5"):
        check_runs([*inside[:2], "hard_ratio=interval(0.2,1.5)"], sweep=True, search=True)


def test_a_search_climbs_validation(source: Path, tmp_path: Path) -> None:
    folder = copied(source / "seed=0", tmp_path / "run")
    metrics = folder.read_json("metrics.json")
    assert objective(folder) == metrics["splits"]["val"][metrics["monitor"]]["value"]
    assert math.isfinite(objective(folder))
    metrics["splits"]["test"] = metrics["splits"].pop("val")
    folder.write_json("metrics.json", metrics)
    with pytest.raises(NearfarError, match=r"needs .* on a validation split"):
        objective(RunFolder(folder.path))


def test_the_command_fails_on_worse_where_that_is_asked(source: Path, tmp_path: Path) -> None:
    grid(source, tmp_path, {(0.01, 1): 0.3, (0.02, 1): 0.0})
    runner = CliRunner()
    command = ["compare", str(tmp_path), "--baseline", "lr=0.01"]
    assert runner.invoke(app, command).exit_code == 0
    result = runner.invoke(app, [*command, "--fail-on-worse"])
    assert "worse" in result.output
    assert result.exit_code == 1
    better = [*command[:-1], "lr=0.02", "--fail-on-worse"]
    assert runner.invoke(app, better).exit_code == 0
