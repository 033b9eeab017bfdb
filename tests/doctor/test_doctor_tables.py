"""Logs as tables: what a DataFrame, a Series, CSV rows and their empty cells mean."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from nearfar.doctor import Signals, diagnose
from nearfar.errors import NearfarError


def lightning_csv(last: str = "") -> str:
    """As Lightning's CSVLogger writes it: rows of validation have no loss."""
    rows = ["epoch,step,loss,candidates,val/MRR"]
    for epoch in range(4):
        rows += [f"{epoch},{10 * epoch + s},{4.1 - 0.3 * epoch - 0.02 * s:.3f},64," for s in range(5)]
        rows.append(f"{epoch},{10 * epoch + 5},,,{0.2 + 0.1 * epoch:.2f}")
    return "\n".join(rows) + last


CSV = lightning_csv()
#: the loss breaks in the last epoch
BROKEN = lightning_csv("".join(f"\n4,{40 + s},nan,64," for s in range(5)) + "\n4,45,,,0.01")


def forms(text: str) -> dict[str, Any]:
    """One log in every form that it comes in."""
    frame = pd.read_csv(io.StringIO(text))
    rows = list(csv.DictReader(io.StringIO(text)))
    return {
        "a frame": frame,
        "a frame of nullable numbers": frame.convert_dtypes(),
        "a frame of texts": pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False),
        "a frame of objects": frame.astype(object),
        "a frame with repeated index": frame.set_index(frame.epoch.rename("run")),
        "a frame with steps as index": frame.set_index(["epoch", "step"]),
        "a frame with columns of two levels": frame.set_axis(
            pd.MultiIndex.from_tuples([tuple((name + "/").split("/")[:2]) for name in frame.columns]), axis=1
        ),
        "a frame backwards": frame.iloc[::-1],
        "series": {name: frame[name] for name in frame},
        "arrays": {name: frame[name].to_numpy() for name in frame},
        "lists": frame.to_dict("list"),
        "tensors": {name: torch.tensor(frame[name].to_numpy()) for name in frame},
        "records of a frame": frame.to_dict("records"),
        "rows of a CSV file": rows,
        "the reader of a CSV file": csv.DictReader(io.StringIO(text)),
        "an array of records": frame.to_records(index=False),
    }


@pytest.mark.parametrize("form", forms(CSV))
def test_an_empty_cell_was_not_measured(form: str) -> None:
    found = diagnose(forms(CSV)[form])
    assert found.ids == []
    assert found.healthy
    read = Signals.of(forms(CSV)[form])
    assert len(read.series("loss")) == 20
    assert read.series("loss").values[0] == 4.1
    assert read.series("val/MRR").by_epoch() == pytest.approx({1: 0.2, 2: 0.3, 3: 0.4, 4: 0.5})


# Nullable numbers have forgotten which cell was NaN in the file.
@pytest.mark.parametrize("form", sorted(forms(BROKEN).keys() - {"a frame of nullable numbers"}))
def test_a_loss_that_broke_is_told_from_empty_cells(form: str) -> None:
    found = diagnose(forms(BROKEN)[form])
    assert found.ids == ["non-finite-loss"]
    assert found[0].evidence["not_finite"] == 5
    assert found[0].evidence["of"] == 25
    assert found[0].evidence["first_step"] == 40


def test_a_csv_file_reads_as_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("\ufeff" + BROKEN, encoding="utf-8")
    assert diagnose(path).ids == diagnose(str(path)).ids == ["non-finite-loss"]
    path.write_text(CSV)
    assert diagnose(path, {"batch_size": 64}).healthy
    path.write_bytes(b"loss\n\x00\xfe\x9f\n")
    with pytest.raises(NearfarError, match=r"'loss' is .* and a number is needed"):
        diagnose(path)
    with pytest.raises(NearfarError, match="not a run"):
        diagnose(tmp_path / "none.csv")


def test_what_was_assumed_stands_in_the_verdict() -> None:
    assert "4 empty cells of 'loss' taken as not measured" in diagnose(pd.read_csv(io.StringIO(CSV))).verdict
    found = diagnose(pd.read_csv(io.StringIO(BROKEN)))
    assert "5 NaN of 'loss' taken as values of the loss" in found[0].evidence["text"]
    assert found.to_dict()["assumed"] == found.assumed
    assert diagnose(list(csv.DictReader(io.StringIO(CSV)))).assumed == []


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame(columns)


LOSS = np.linspace(4.0, 2.0, 40)


@pytest.mark.parametrize(
    ("log", "bad"),
    [
        # A broken loss where nothing else is logged, and a single step that was skipped.
        (frame(loss=np.append(LOSS, [np.nan] * 3), candidates=64), 3),
        (frame(loss=np.where(np.arange(40) == 7, np.nan, LOSS), candidates=64), 1),
        (frame(loss=[np.nan] * 10, candidates=64), 10),
        # Per epoch, with validation in the same row.
        (frame(epoch=range(40), train_loss=np.append(LOSS[:37], [np.nan] * 3), **{"val/MRR": 1 / LOSS}), 3),
        # A learning rate in each row, the loss in every fifth.
        (frame(lr=LOSS / 9, loss=np.where(np.arange(40) % 5, np.nan, LOSS)), 0),
        (frame(lr=LOSS / 9, loss=np.where((np.arange(40) % 5 > 0) | (np.arange(40) > 20), np.nan, LOSS)), 19),
        # Candidates written into every row afterwards.
        (frame(loss=[4.0, 3.9, np.nan] * 9, **{"val/MRR": [np.nan, np.nan, 0.1] * 9}, candidates=64), 0),
        # A gradient norm with every fourth loss stands with it until the loss breaks.
        (
            frame(
                loss=np.where(np.arange(40) > 9, np.nan, LOSS),
                gradient_norm=np.where(np.arange(40) % 4, np.nan, 1.0),
            ),
            30,
        ),
        (frame(loss=[4.0, np.inf, 3.9]), 1),
        (frame(loss=["4.0", "", "nan", None, "-inf"]), 2),
        (frame(loss=pd.array([4.0, None, 3.9], "Float64")), 0),
        ({"loss": [4.0, None, 3.9], "candidates": 64}, 0),
        ({"loss": [4.0, math.nan, 3.9], "candidates": 64}, 1),
        ({"loss": np.ma.masked_array([4.0, 1.0, 3.9], [False, True, False])}, 0),
        ([{"loss": 4.0}, {"loss": pd.NA}, {"loss": ""}], 0),
        ([{"loss": 4.0, "candidates": 8}, {"loss": None, "candidates": 8}, {"val/MRR": 0.1}], 1),
        ([{"loss": 4.0, "candidates": 8}, {"loss": None, "val/MRR": 0.1}], 0),
    ],
)
def test_the_row_decides_what_a_nan_is(log: Any, bad: int) -> None:
    values = Signals.of(log).series("train_loss" if "train_loss" in log else "loss").numbers
    assert int((~np.isfinite(values)).sum()) == bad
    assert ("non-finite-loss" in diagnose(log).ids) == bool(bad)


def test_series_flags_texts_and_foreign_columns_are_read() -> None:
    assert diagnose({"loss": pd.Series([4.1, 4.0, 3.9, 3.7]), "candidates": 64}).ids == []
    assert diagnose(pd.Series([3.47] * 20, name="loss"), {"batch_size": 32}).ids == ["loss-at-chance"]
    log = frame(loss=["4.1", "4.0"], finite=["True", "False"], time=pd.to_datetime([0, 1]), note=["a", "b"])
    read = Signals.of(log)
    assert read.series("loss").values == (4.1, 4.0)
    assert read.series("finite").values == (1.0, 0.0)
    nullable = frame(loss=[1.0, 2.0, 3.0], finite=pd.array([True, None, False], "boolean"))
    assert Signals.of(nullable).series("finite").values == (1.0, 0.0)
    assert Signals.of({"loss": iter([2.0, 1.0]), "lr": "1e-4", "sampler": "hard"}).number("lr") == 1e-4


@pytest.mark.slow
def test_tables_of_other_libraries_are_read() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"step": [1, 2, 3], "loss": [4.0, None, 3.9]})
    assert Signals.of(table).series("loss").values == (4.0, 3.9)
    assert Signals.of({"loss": table["loss"]}).series("loss").values == (4.0, 3.9)
    polars = pytest.importorskip("polars")
    assert Signals.of(polars.DataFrame({"loss": [4.0, None, 3.9]})).series("loss").values == (4.0, 3.9)


def test_rows_come_into_the_order_of_their_steps() -> None:
    order = np.random.default_rng(0).permutation(40)
    log = frame(step=np.arange(40), loss=LOSS).iloc[order]
    assert Signals.of(log).series("loss").values == tuple(LOSS)
    anew = frame(step=[0, 1, 2] * 2, loss=LOSS[:6])  # counts anew in each epoch, and says no epoch
    assert Signals.of(anew).series("loss").values == tuple(LOSS[:6])


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (pd.DataFrame([[1.0, 2.0]], columns=["loss", "loss"]), "several columns 'loss'"),
        (frame(loss=["4,1", "4,0"]), r"record 1 .*'loss' is '4,1'"),
        (frame(loss=[4.1, object()]), r"record 2 .*'loss'"),
        (frame(loss=[[4.1, 4.0]]), r"'loss' is a list"),
        ({"loss": np.ones((3, 2))}, "'loss'"),
        ({"loss": frame(a=[1.0])}, "'loss' is a table"),
        ({"loss": {4.1, 4.0}}, "'loss' is a set"),
        (pd.Series([4.1, 4.0]), "without a name"),
        ([[4.1], [4.0]], "record 1 of the log is list"),
        (3.0, "signals are float"),
        ({"loss": [1 + 2j]}, "'loss'"),
    ],
)
def test_what_cannot_be_read_is_named(log: Any, words: str) -> None:
    with pytest.raises(NearfarError, match=words):
        diagnose(log)


@pytest.mark.slow
def test_a_hundred_thousand_steps_take_a_second_and_thousands_of_columns_too() -> None:
    n = 100_000
    rng = np.random.default_rng(0)
    names = ("lr", "candidates", "scale", "gradient_norm", "p_positive", "hardest_share", "positives_per_row")
    log = frame(
        step=range(n),
        epoch=np.arange(n) // 5000,
        loss=4 + rng.random(n),
        **{k: 1 + rng.random(n) for k in names},
    )
    log.loc[n - 5 :, "loss"] = np.nan
    started = time.process_time()
    assert "non-finite-loss" in diagnose(log).ids
    assert time.process_time() - started < 1.0
    wide = {"loss": [4.1] * 20, "candidates": 64} | {f"layer{i}/norm": [1.0] * 20 for i in range(4000)}
    started = time.process_time()
    assert diagnose(pd.DataFrame(wide)).ids == ["loss-at-chance"]
    assert time.process_time() - started < 3.0


@pytest.mark.parametrize("beside", [{}, {"lr": 1e-3}, {"lr": [1e-3 - 1e-6 * i for i in range(100)]}])
def test_a_loss_logged_now_and_then_is_no_broken_loss_whatever_stands_in_every_row(beside: dict) -> None:
    """A table that has a row for every step, and a loss every fifth: nothing in the rows says why it is empty."""
    losses = [4.0 - 0.01 * i if i % 5 == 0 else np.nan for i in range(100)]
    found = diagnose(frame(step=range(100), loss=losses, **beside))
    assert found.healthy
    assert "80 empty cells of 'loss' taken as not measured" in found.verdict
    broken = losses[:40] + [np.nan] * 60
    assert diagnose(frame(step=range(100), loss=broken, **beside)).ids == ["non-finite-loss"]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_file_of_cells_is_read_whatever_parts_them(tmp_path: Path, mark: str) -> None:
    path = tmp_path / ("log.tsv" if mark == "\t" else "log.csv")
    path.write_text("step,loss,candidates\n1,4.1,64\n2,4.0\n".replace(",", mark))
    assert Signals.of(str(path)).series("loss").values == (4.1, 4.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step,loss,loss\n1,4.1,4.0\n", "several columns 'loss'"),
        ("step,loss\n1,4,1\n", "line 2 has 3 cells, but line 1 names 2"),
    ],
)
def test_a_file_whose_cells_could_be_of_either_field_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(NearfarError, match=words):
        diagnose(path)


def test_json_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 4.1}\n{"step": 2, "loss": 4.0}\n')
    assert (
        diagnose(path).to_dict() | {"read_as": []}
        == diagnose([json.loads(line) for line in path.open()]).to_dict()
    )


@pytest.mark.parametrize(("name", "value"), [("batch_size", "64"), ("lr", [1.0]), ("candidates", "64")])
def test_context_that_is_no_number_is_named(name: str, value: Any) -> None:
    with pytest.raises(NearfarError, match=rf"context\['{name}'\]"):
        diagnose({"loss": [4.1] * 8}, {name: value})
