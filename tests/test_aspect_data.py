"""Readers of aspect files: every layout, every kind of damage counted, no text in two splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.systems.aspects.balance import repeats
from nearfar.systems.aspects.data import AspectData, load_embedded, load_files
from nearfar.systems.aspects.labels import parse_field, polarity_code
from nearfar.systems.aspects.readers import read_records
from nearfar.systems.aspects.records import text_key
from tiny_aspects import reviews, split_folder, write_columns, write_field


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8"))
    return path


def loaded(folder: Path, **options: Any) -> AspectData:
    names = {"train": "Train", "val": "Dev", "test": "Test"}
    files = {split: folder / f"{name}.csv" for split, name in names.items()}
    return load_files({s: f if f.exists() else None for s, f in files.items()}, **options)


def test_both_layouts_give_the_same_codes(tmp_path: Path) -> None:
    records = reviews(60)
    aspects = sorted({a for labels in records.labels for a in labels})
    by_field = read_records(write_field(tmp_path / "a.csv", records, range(60)))
    by_column = read_records(write_columns(tmp_path / "b.csv", records, range(60), aspects))
    assert by_field.texts == by_column.texts == records.texts
    np.testing.assert_array_equal(by_field.codes(aspects), records.codes(aspects))
    np.testing.assert_array_equal(by_column.codes(aspects), records.codes(aspects))
    assert (by_field.layout, by_column.layout) == ("label field", "one column per aspect")


def test_a_quoted_text_holds_line_breaks_commas_and_quotes(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv",
        '\ufeffindex,comment,label\r\n0,"Pin ""trâu"",\r\nmáy\nok",{BATTERY#Positive};{OTHERS};\r\n1,ok,\r\n',
    )
    found = read_records(path)
    assert found.texts[0].split() == ["Pin", '"trâu",', "máy", "ok"]
    assert found.labels == [{"BATTERY": 3, "OTHERS": 2}, {}]
    assert not found.rejections
    assert not found.unread


def test_what_cannot_be_read_is_counted_and_the_rest_stays(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv",
        "comment,label\n"
        "good,{CAMERA#Positive};{PRICE#so-so};\n"
        ",{CAMERA#Positive};\n"
        "torn,{CAMERA#Negative}};rubbish\n"
        "both,{CAMERA#Positive};{CAMERA#Negative};\n"
        'broken,"{CAMERA#Positive}\n'
        "a,b,c\n"
        "fine,{ CAMERA # neutral };\n",
    )
    found = read_records(path)
    assert found.texts == ["good", "torn", "both", "fine"]
    assert [r.get("CAMERA") for r in found.labels] == [3, 1, -1, 2]
    assert found.labels[0]["PRICE"] == -1
    assert found.rejections.counts == {"broken quoting": 1, "wrong number of fields": 1, "empty text": 1}
    assert found.unread.counts["label that cannot be read"] == 4
    first = found.unread.first["label that cannot be read"][0]
    assert (first.row, first.value) == (2, "PRICE#so-so")


def test_columns_that_are_no_aspects_are_told_apart(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.csv",
        "stars,data,Battery,Camera,shop\n5,good,Positive,,A\n1,bad,Mixed,Negative,B\n3,so,neg,,A\n",
    )
    found = read_records(path)
    assert [set(labels) for labels in found.labels] == [{"Battery"}, {"Battery", "Camera"}, {"Battery"}]
    assert [labels["Battery"] for labels in found.labels] == [3, -1, 1]
    assert found.unread.counts == {"column that is no aspect": 2, "polarity that is none": 1}
    named = read_records(path, aspects=["camera"])
    assert [set(labels) for labels in named.labels] == [set(), {"Camera"}, set()]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n", {}, "no column for text"),
        ("comment,n\ngood,5\n", {}, "no column of polarities"),
        ("comment,label\ngood,positive\nbad,negative\n", {}, "hold no label of the form"),
        ("comment,Camera\ngood,Positive\n", {"aspects": ["Camra"]}, "did you mean 'Camera'"),
        ("comment,Camera\n,Positive\n", {}, "none of its 1 rows"),
        ("comment,label\ngood,{A#Positive};\n", {"text_column": "coment"}, "did you mean 'comment'"),
        ("", {}, "empty"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        read_records(written(tmp_path / "a.csv", text), **options)


def test_official_splits_and_where_thresholds_come_from(tmp_path: Path) -> None:
    data = loaded(split_folder(tmp_path / "all"))
    assert (len(data.train), len(data.val or ()), len(data.test or ())) == (180, 60, 60)
    assert (data.reported, data.threshold_split, data.tune) == ("test", "val", None)
    without = loaded(split_folder(tmp_path / "two", test=False))
    assert (without.reported, without.threshold_split) == ("val", "tune")
    assert without.tune is not None
    assert len(without.train) + len(without.tune) == 180
    assert "no test file: results are on val" in without.summary()
    none = loaded(split_folder(tmp_path / "two", test=False), tune_fraction=0.0)
    assert (none.threshold_split, len(none.train)) == (None, 180)
    assert "no thresholds are chosen" in none.summary()
    only = load_files({"train": tmp_path / "two" / "Train.csv"}, tune_fraction=0.0)
    assert len(only.val or ()) == 18
    again = load_files({"train": tmp_path / "two" / "Train.csv"}, tune_fraction=0.0)
    assert again.val is not None
    assert only.val is not None
    assert again.val.ids == only.val.ids


def test_no_text_crosses_splits(tmp_path: Path) -> None:
    folder = split_folder(tmp_path, n=100)
    train, dev, test = ((folder / f"{n}.csv").read_text() for n in ("Train", "Dev", "Test"))
    body = test.split("\n", 1)[1].strip().splitlines()
    # Another case and another form of the same text; the official test rows stay.
    written(folder / "Dev.csv", dev + body[0].upper().replace("{", "{") + "\n")
    written(folder / "Train.csv", train + body[1] + "\n" + train.splitlines()[1] + "\n")
    data = loaded(folder)
    assert data.test is not None
    assert len(data.test) == 20
    keys = {name: {text_key(t) for t in split.texts} for name, split in data.splits.items()}
    assert not keys["train"] & keys["val"] | keys["train"] & keys["test"] | keys["val"] & keys["test"]
    assert data.left_out == {
        "train, its text also stands in val or test": 1,
        "train, the same text and labels again": 1,
        "val, its text also stands in test": 1,
    }
    assert data.layout()["leaks"] == {}


def test_unknown_aspects_are_listed_with_the_nearest(tmp_path: Path) -> None:
    folder = split_folder(tmp_path, n=100)
    dev = (folder / "Dev.csv").read_text().replace("{CAMERA#", "{CAMRA#", 1)
    written(folder / "Dev.csv", dev)
    data = loaded(folder)
    assert "CAMRA" not in data.scheme.aspects
    (source,) = (s for s in data.sources if s["path"].endswith("Dev.csv"))
    (listed,) = source["unread_labels"]["first"]["aspect that is not one of train's (val)"]
    assert listed["value"] == "CAMRA"
    assert "CAMERA" in listed["detail"]
    assert "labels not read" in data.summary() or "label not read" in data.summary()
    with pytest.raises(NearfarError, match="min_mentions"):
        loaded(folder, min_mentions=10_000)


def test_labels() -> None:
    assert [polarity_code(w) for w in (" POS ", "Tích  cực", "none", "5")] == [3, 3, 0, -1]
    assert parse_field("") == ({}, [])
    assert parse_field("{A#Positive};{A#Positive};") == ({"A": 3}, [])
    assert parse_field("{#Positive};") == ({}, ["#Positive"])


def test_the_embedded_set_is_the_same_each_time_and_splits_share_nothing() -> None:
    a, b = load_embedded(300, seed=1), load_embedded(300, seed=1)
    assert a.train.texts == b.train.texts != load_embedded(300, seed=2).train.texts
    assert [len(split) for split in a.splits.values()] == [240, 30, 30]
    assert a.layout()["leaks"] == {}
    assert len(a.scheme.pairs) == 21


def test_oversampling_repeats_rare_labels_alone() -> None:
    codes = np.zeros((1000, 2), dtype=np.int64)
    codes[:500, 0], codes[:10, 1] = 3, 1
    found = repeats(codes, np.array([[0, 3], [1, 1]]), frequency=0.16, most=10)
    assert found[:10].tolist() == [4] * 10
    assert (found[10:] == 1).all()
    assert repeats(codes, np.array([[1, 1]]), frequency=0.16, most=2).max() == 2


@pytest.mark.data
@pytest.mark.skipif("NEARFAR_DATA" not in os.environ, reason="NEARFAR_DATA is not set")
@pytest.mark.parametrize(
    ("name", "files", "rows", "pairs"),
    [
        ("visfd", ("Train.csv", "Dev.csv"), (7782, 1112), 31),
        ("phone_aspects", ("train.csv", "validation.csv"), (7283, 913), 31),
    ],
)
def test_real_files(name: str, files: tuple[str, str], rows: tuple[int, int], pairs: int) -> None:
    folder = Path(os.environ["NEARFAR_DATA"]) / name
    data = load_files({"train": folder / files[0], "val": folder / files[1]}, tune_fraction=0.0)
    assert (len(data.train), len(data.val or ())) == rows
    assert len(data.scheme.aspects) == 11
    assert len(data.scheme.pairs) == pairs
    assert data.layout()["leaks"] == {}
