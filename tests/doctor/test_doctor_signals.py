"""What the doctor reads: run folders, records, columns; and what it says of what it cannot read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from doctor_runs import HEALTHY, curriculum, diverging, leak_by_ids, skeleton, write_run
from nearfar.doctor import Signals, diagnose, read_run
from nearfar.doctor.series import Point, Series, level_noise
from nearfar.errors import NearfarError
from nearfar.metrics import Difference, Estimate, paired_difference
from nearfar.training.run_folder import RunFolder


# -- one run in three forms ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_folder_reads_as_its_records_do(tmp_path: Path) -> None:
    run = diverging(np.random.default_rng(0))
    folder = write_run(run, tmp_path / "run")
    of_folder, of_records = diagnose(folder.path), diagnose(run.records, run.context)
    assert of_folder.ids == of_records.ids
    assert "curriculum-diverging" in of_folder.ids
    assert [f.to_dict() for f in of_folder] == [f.to_dict() for f in of_records]
    assert diagnose(str(folder.log_path)).ids == of_folder.ids


def test_columns_read_as_records_do() -> None:
    run = diverging(np.random.default_rng(1))
    epochs = [r for r in run.records if r["kind"] == "epoch"]
    columns: dict[str, Any] = {
        "epoch": [r["epoch"] for r in epochs],
        "train_loss": [r["train_loss"] for r in epochs],
        "val/MRR": np.array([r["val"]["MRR"] for r in epochs]),
        "random_phase": [r["epoch"] < 6 for r in epochs],
        "hard_ratio": 0.6,
        "hardness_k": 50,
        "lr": 3e-4,
        "batch_size": 32,
        "sampler": "hard",
    }
    found = diagnose(columns)
    assert found.ids == ["curriculum-diverging"]
    assert (found[0].override, *found[0].then) == (
        "hard_ratio=0.4",
        "hardness_k=100",
        "lr=0.0001",
        "curriculum_epoch=10",
    )
    del columns["random_phase"]
    assert diagnose(columns, context={"curriculum_epoch": 5}).ids == ["curriculum-diverging"]
    del columns["epoch"]  # rows with a validation metric each are epochs
    assert diagnose(columns | {"curriculum_epoch": 5}).ids == ["curriculum-diverging"]


def test_values_of_an_epoch_may_stand_once_per_epoch() -> None:
    columns = {"loss": [3.0] * 6, "epoch": [1, 1, 2, 2, 3, 3], "val/MRR": [0.1, 0.2, 0.3], "candidates": 64}
    assert Signals.of(columns).series("val/MRR").by_epoch() == {1: 0.1, 2: 0.2, 3: 0.3}


def test_arrays_tensors_flags_and_gaps_are_numbers() -> None:
    run = Signals.of(
        {
            "loss": torch.tensor([2.0, 1.0]),
            "finite": [True, False],
            "scale": np.float32(10),
            "floor": [None, 0.5],
        }
    )
    assert run.series("loss").values == (2.0, 1.0)
    assert run.series("finite").values == (1.0, 0.0)
    assert run.number("scale") == 10.0
    assert run.series("floor").points == (Point(1, 2.0, None, 0.5),)


def test_a_table_reads_as_its_columns_do() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"loss": [3.47] * 20, "candidates": [32] * 20})
    assert diagnose(table).ids == ["loss-at-chance"]


def test_lists_within_a_field_keep_their_epoch() -> None:
    run = Signals.of({"hardness": [[1.0, 2.0], [3.0, 4.0]], "epoch": [1, 2]})
    assert run.lists("hardness") == [(1, (1.0, 2.0)), (2, (3.0, 4.0))]
    assert Signals.of({"hardness": [1.0, 3.0]}).lists("hardness") == [(1, (1.0,)), (2, (3.0,))]


def test_nan_and_infinity_survive_in_every_spelling(tmp_path: Path) -> None:
    spelled = ["NaN", "Infinity", "-Infinity", math.nan, math.inf, None]
    series = Signals.of([{"loss": value} for value in spelled]).series("loss")
    assert len(series) == 6
    assert not series.finite()
    assert diagnose([{"loss": 1.0}, {"loss": "NaN"}]).ids == ["non-finite-loss"]
    (tmp_path / "train_log.jsonl").write_text('{"kind": "step", "step": 3, "loss": NaN}\n{"kind": "st')
    assert diagnose(tmp_path).ids == ["non-finite-loss"]
    RunFolder(tmp_path / "b").append({"kind": "step", "step": 1, "loss": math.nan})  # a null in the file
    assert diagnose(tmp_path / "b").ids == ["non-finite-loss"]


def test_estimates_and_differences_are_taken_as_they_are() -> None:
    value = Estimate(1.0, 1.0, 1.0, 1.0, 8, True, "R@10", {"gallery": 8})
    assert diagnose({"loss": [1.0]}, {"metrics": {"test": {"R@10": value}}}).ids == ["metric-trivial"]
    rng = np.random.default_rng(0)
    a = rng.random((3, 50))
    difference: Difference = paired_difference(a, rng.random((3, 50)))
    assert diagnose({"loss": [1.0]}, {"comparison": {"MRR": difference}}).ids == ["gain-in-noise"]


@pytest.mark.slow
def test_a_run_that_is_not_finished_is_judged_by_its_log(tmp_path: Path) -> None:
    run = curriculum(np.random.default_rng(0))
    folder = write_run(run, tmp_path / "run", finished=False)
    read = read_run(folder.path)
    assert read.number("batch_size") == 32
    assert read.text("sampler") == "hard"
    assert diagnose(read).ids == ["curriculum-healthy", "composition-differs"]


@pytest.mark.slow
def test_rows_numbered_alike_are_no_leak(tmp_path: Path) -> None:
    run = skeleton(np.random.default_rng(0), lambda at: 1.0)
    folder = write_run(run, tmp_path / "run", finished=False)
    parts = {
        name: {"rows": 50, "split_hash": "same", "structures": n} for name, n in (("val", 49), ("test", 50))
    }
    folder.write_json("dataset_layout.json", {"splits": parts})
    assert "split-leak" not in diagnose(folder.path).ids
    parts["test"]["structures"] = 49
    folder.write_json("dataset_layout.json", {"splits": parts})
    assert "split-leak" in diagnose(folder.path).ids
    folder.write_json("dataset_layout.json", {"leaks": {"train/test": {"text": {"shared": 3}}}})
    assert "split-leak" not in diagnose(folder.path).ids


def test_context_goes_over_what_is_known() -> None:
    run = leak_by_ids(np.random.default_rng(0))
    assert "split-leak" in diagnose(run.records, run.context).ids
    assert "split-leak" not in diagnose(Signals.of(run.records, run.context), context={"splits": {}}).ids


# -- what cannot be read -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "give a run folder, a list of log records, or a mapping"),
        (None, "NoneType"),
        ("no/such/run", "no such folder"),
        ([1, 2], "record 1 of the log is int"),
        ({"loss": [1, 2, 3], "candidates": [8, 8]}, "'loss' has 3 values, 'candidates' has 2"),
        ({"loss": [1.0] * 4, "epoch": [1, 1, 2, 2], "val/MRR": [1.0] * 3}, "one value per epoch"),
        ({"loss": ["low", "high"]}, "record 1 of the log: the field 'loss' is 'low'"),
        ([{"loss": 1.0}, {"candidates": {"a": 1}}], "record 2 of the log: the field 'candidates'"),
        ([{"loss": 1.0, "step": "first"}], "'step' is 'first'"),
        ([{"loss": 1.0, "val": 3}], "val is int"),
        ({"lose": [1.0, 2.0]}, "did you mean 'loss'"),
    ],
)
def test_bad_input_is_answered(source: Any, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        diagnose(source)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"metrics": 3}, r"context\['metrics'\] is int"),
        ({"metrics": {"test": 0.5}}, r"context\['metrics'\]\['test'\] is float"),
        ({"metrics": {"test": {"R@1": "good"}}}, "'R@1' is 'good'"),
        ({"splits": {"a": 1, "b": 2}}, r"context\['splits'\]\['a'\] is int"),
        ({"change": {"AP": 0.1}}, r"context\['change'\]\['AP'\] is float"),
        ({"comparison": {"AP": {"low": "x", "high": 1}}}, "'x'"),
        (["batch_size"], "context is list"),
    ],
)
def test_a_bad_context_is_answered(context: Any, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        diagnose({"loss": [1.0] * 10}, context)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_run(HEALTHY["random_infonce"](np.random.default_rng(0)), tmp_path / "run")
    (folder.path / "metrics.json").write_text("{")
    with pytest.raises(NearfarError, match=r"metrics\.json: not valid JSON"):
        diagnose(folder.path)
    (folder.path / "metrics.json").unlink()
    (folder.path / "config.yaml").write_text("a: [1")
    with pytest.raises(NearfarError, match=r"config\.yaml: not valid YAML"):
        diagnose(folder.path)
    with pytest.raises(NearfarError, match="is not a run"):
        diagnose(tmp_path)


def test_a_log_that_cannot_be_read_is_no_healthy_run(tmp_path: Path) -> None:
    log = tmp_path / "train_log.jsonl"
    for text in (b"not a record\nnor this\n", bytes(range(128, 200))):
        log.write_bytes(text)
        with pytest.raises(NearfarError, match="is a JSON object"):
            read_run(tmp_path)
    log.write_text('{"global_step": 1, "train/nce": 3.2}\n')
    with pytest.raises(
        NearfarError, match="none of the fields is one the doctor knows: global_step, train/nce"
    ):
        read_run(tmp_path)
    log.write_text("")
    assert diagnose(tmp_path).verdict.startswith("nothing is known of this run (0 of")


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 4.1, "candidates": 64}',
        '{"step": 2, "lo',
        "[1, 2]",
        "",
        '{"step": 3, "loss": 3.9}',
    ]
    (tmp_path / "train_log.jsonl").write_text("\n".join(lines))
    found = diagnose(tmp_path)
    assert found.unread == found.to_dict()["unread"] == 2
    assert "2 unreadable lines of the log left out" in found.verdict
    assert read_run(tmp_path).series("loss").values == (4.1, 3.9)


def test_epochs_may_be_counted_from_0() -> None:
    from_0 = Signals([{"epoch": k / 2, "loss": 4.0} for k in range(4)])
    assert [point.epoch for point in from_0.series("loss").points] == [1, 1, 2, 2]
    # A look at the untrained model does not make the first epoch of training the second.
    before = Signals([{"epoch": 0, "val": {"MRR": 0.01}}, {"epoch": 1, "loss": 4.0}])
    assert before.series("loss").points[0].epoch == 1


def test_text_is_kept_by_epoch() -> None:
    signals = Signals([{"epoch": 1, "sampler": "random"}, {"epoch": 2, "sampler": "hard"}, {"loss": 1.0}])
    assert signals.text("sampler") == "hard"
    assert signals.texts("sampler") == {1: "random", 2: "hard"}


def test_unknown_text_is_nobodys_signal() -> None:
    assert diagnose([{"loss": 1.0, "host": "a", "note": ["b"]} for _ in range(9)]).healthy


# -- statistics ----------------------------------------------------------------------------------------------
def test_noise_is_told_from_a_trend() -> None:
    rng = np.random.default_rng(0)
    found = [level_noise([0.01 * i + 0.1 * x for i, x in enumerate(rng.normal(size=200))]) for _ in range(20)]
    assert 0.085 < np.mean(found) < 0.115
    assert level_noise([1.0, 5.0]) == 0.0


@pytest.mark.slow
def test_standard_errors_cover() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        series = Series("x", tuple(Point(i, i, None, v) for i, v in enumerate(rng.normal(size=100))))
        hits += abs(series.mean()) < 2.26 * series.error()  # t with nine degrees of freedom
    assert 0.93 < hits / 2000 < 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 5])
def test_an_interval_over_seeds_covers(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    noise = 0
    for _ in range(1000):
        ours, theirs = rng.normal(0.6, 0.01, size=(2, seeds))
        found = diagnose({"loss": [1.0]}, {"comparison": {"MRR": {"per_seed": ours - theirs}}})
        noise += "gain-in-noise" in found.ids
    assert 930 <= noise <= 970


def test_schedules_and_lists_of_a_configuration_are_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "system: toy\nseed: 0\nhard_ratio: linear 0.3 -> 0.7\nepochs: [4, 2]\nbatch_size: 64\nsampler: {name: hard}\n"
    )
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 3.9}\n')
    signals = read_run(tmp_path)
    assert (signals.number("hard_ratio"), signals.number("epochs")) == (None, None)
    assert (signals.number("batch_size"), signals.text("sampler")) == (64.0, "hard")
