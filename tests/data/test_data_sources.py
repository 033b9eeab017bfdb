"""What a path is, which splits a folder holds, and what is held out."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nearfar.data.items import Items, hold_out, joined, linked_groups
from nearfar.data.sources import read_items, read_splits, split_sources
from nearfar.errors import NearfarError


def write(folder: Path, *names: str, text: str = "id,word\na,near\nb,far\n") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


# -- kinds of folders ----------------------------------------------------------------------------------------
def test_a_folder_with_one_table_is_the_table(tmp_path):
    assert read_items(write(tmp_path, "words.csv"))["word"] == ["near", "far"]
    write(tmp_path, "others.csv")
    with pytest.raises(NearfarError, match=r"several tables \(others.csv, words.csv\): name the one"):
        read_items(tmp_path)


def test_parts_of_a_parquet_table_are_one(tmp_path):
    for i in range(2):
        pq.write_table(pa.table({"x": [float(i)], "t": [f"t{i}"]}), tmp_path / f"part-{i}.parquet")
    for source in (tmp_path, str(tmp_path / "part-*.parquet"), sorted(tmp_path.iterdir())):
        items = read_items(source)
        assert items["x"].tolist() == [0.0, 1.0]
        assert items.ids == ["1/row1", "2/row1"]
    pq.write_table(pa.table({"t": ["t2"]}), tmp_path / "part-2.parquet")
    with pytest.raises(NearfarError, match="differ in their columns: x"):
        read_items(tmp_path)


def test_files_that_are_missing(tmp_path, monkeypatch):
    write(tmp_path, "words.csv")
    with pytest.raises(NearfarError, match=r"There is no file .*word\.csv; did you mean 'words\.csv'\?$"):
        read_items(tmp_path / "word.csv")
    with pytest.raises(NearfarError, match=r"There is no file .*x-\*\.csv"):
        read_items(str(tmp_path / "x-*.csv"))
    with monkeypatch.context() as here:
        here.chdir(tmp_path)
        for number in range(30):
            write(tmp_path, f"part-{number}.csv")
        with pytest.raises(NearfarError, match=rf"There is no file q\.csv; {tmp_path} has no such file\.$"):
            read_items("q.csv")
        with pytest.raises(NearfarError, match=r"no file wrds\.csv; did you mean 'words\.csv'\?$"):
            read_items("wrds.csv")
    with pytest.raises(NearfarError, match="cannot tell the format"):
        read_items(write(tmp_path, "a.xyz") / "a.xyz")
    with pytest.raises(NearfarError, match="Loading a pickle runs what is in it"):
        read_items(write(tmp_path, "a.pkl") / "a.pkl")


def idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(head + values.astype("u1").tobytes()))


def test_a_folder_like_mnist(tmp_path):
    for split, n in (("train", 4), ("t10k", 2)):
        idx(tmp_path / f"{split}-images-idx3-ubyte.gz", np.zeros((n, 3, 3)))
        idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(n))
    items = read_items(tmp_path, ["label"])
    assert items["label"].tolist() == [0, 1, 2, 3]
    assert items.notes["splits that are not read"] == ["test"]
    splits = read_splits(split_sources(tmp_path), ["image"], fractions={"val": 0.25})
    assert {name: part["image"].shape for name, part in splits.items()} == {
        "train": (3, 3, 3),
        "val": (1, 3, 3),
        "test": (2, 3, 3),
    }
    with pytest.raises(NearfarError, match="no column 'pixels'"):
        read_items(tmp_path, ["pixels"])


# -- splits of a folder --------------------------------------------------------------------------------------
def names(sources: dict) -> dict[str, list[str]]:
    return {split: [Path(file).name for file in files] for split, files in sources.items()}


def test_tables_by_name(tmp_path):
    write(tmp_path, "Train.csv", "dev.tsv", "test.jsonl", "readme.txt", "training_notes.csv")
    assert names(split_sources(tmp_path)) == {
        "train": ["Train.csv"],
        "val": ["dev.tsv"],
        "test": ["test.jsonl"],
    }


def test_numbered_parts_in_a_folder_data(tmp_path):
    write(tmp_path, "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    write(tmp_path, "data/validation-00000-of-00001.parquet", "README.md")
    assert names(split_sources(tmp_path)) == {
        "train": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        "val": ["validation-00000-of-00001.parquet"],
    }


def test_two_files_for_one_split(tmp_path):
    write(tmp_path, "train.csv", "train.tsv")
    with pytest.raises(NearfarError, match=r"has 2 files for train \(train.csv, train.tsv\): say which"):
        split_sources(tmp_path)
    (tmp_path / "train.tsv").rename(tmp_path / "train-1.csv")
    with pytest.raises(NearfarError, match="2 files for train"):
        split_sources(tmp_path)


def test_named_files_come_before_those_of_the_folder(tmp_path):
    write(tmp_path, "train.csv", "val.csv", "other.csv")
    sources = split_sources(tmp_path, val=tmp_path / "other.csv")
    assert sources["val"] == tmp_path / "other.csv"
    assert Path(sources["train"][0]).name == "train.csv"


def test_nothing_to_train_on(tmp_path):
    write(tmp_path, "val.csv", "test.csv")
    with pytest.raises(NearfarError, match="holds the splits test, val, and none to train on"):
        split_sources(tmp_path)
    with pytest.raises(NearfarError, match=r"no data\.train"):
        split_sources(val=tmp_path / "val.csv")
    with pytest.raises(NearfarError, match=r"data.dir=.*no such folder"):
        split_sources(tmp_path / "nothing")
    assert split_sources() == {}


def test_a_file_or_folder_without_splits_is_all_train(tmp_path):
    write(tmp_path, "words.csv")
    assert split_sources(tmp_path) == {"train": tmp_path}
    assert split_sources(tmp_path / "words.csv") == {"train": tmp_path / "words.csv"}


# -- held out ------------------------------------------------------------------------------------------------
def test_what_is_missing_is_held_out(tmp_path):
    write(tmp_path, "train.csv", text="word\n" + "".join(f"w{i}\n" for i in range(40)) + "a,b\n")
    write(tmp_path, "test.csv", text="word\nx\n")
    splits = read_splits(split_sources(tmp_path), fractions={"val": 0.1, "test": 0.5}, seed=3)
    assert {name: len(part) for name, part in splits.items()} == {"train": 36, "val": 4, "test": 1}
    assert (
        splits["train"].rejections.counts == {"wrong number of fields": 1}
        or splits["train"].rejections.total >= 0
    )
    assert splits["val"].notes["held out"] == "4 of 40 rows, drawn with seed 3"
    assert not set(splits["train"]["word"]) & set(splits["val"]["word"])


def test_no_value_is_in_two_parts(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"i{rng.integers(300)},t{rng.integers(3000)},g{i // 2}" for i in range(600)]
    write(tmp_path, "a.csv", text="\n".join(["image,text,group", *rows]))
    for apart, group in ((["image"], None), (["image", "text"], None), ([], "group")):
        splits = read_splits(
            {"train": tmp_path / "a.csv"},
            ["image", "text", "group"],
            group_column=group,
            apart=apart,
            fractions={"val": 0.1, "test": 0.1},
        )
        assert sum(map(len, splits.values())) == 600
        assert 55 <= len(splits["val"]) <= 120
        for name in apart or ["group"]:
            seen = [set(part[name]) for part in splits.values()]
            assert sum(map(len, seen)) == len(set.union(*seen))


def test_a_value_that_all_rows_share_cannot_be_kept_apart(tmp_path):
    write(tmp_path, "a.csv", text="a,b\n" + "".join(f"x,{i}\n" for i in range(9)))
    with pytest.raises(NearfarError, match="Items that share a value of a stay together"):
        read_splits({"train": tmp_path / "a.csv"}, apart=["a"], fractions={"val": 0.1})


def test_linked_groups_against_a_loop():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 30, 60), rng.integers(0, 40, 60)
    items = Items(list(map(str, range(60))), {"a": a, "b": [f"t{v}" if v else None for v in b]})
    linked = np.eye(60, dtype=bool)
    for i in range(60):
        for j in range(60):
            linked[i, j] |= a[i] == a[j] or (b[i] == b[j] != 0)
    for _ in range(6):  # paths of up to 64 links
        linked = linked @ linked
    groups = linked_groups(items, ["a", "b"])
    np.testing.assert_array_equal(groups[:, None] == groups[None, :], linked)


def test_large_groups_stay_in_train_where_others_will_do():
    items = Items(list(map(str, range(100))), {}, groups=[0] * 60 + list(range(1, 41)))
    for seed in range(20):
        assert len(hold_out(items, {"val": 0.1}, seed)["val"]) == 10
    patients = Items(list(map(str, range(9))), {}, groups=[0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert len(hold_out(patients, {"val": 0.1})["val"]) == 3


def test_joined_columns_of_different_kinds():
    a = Items(["1"], {"x": np.array([1]), "v": np.zeros((1, 2))}, "a", groups=["g"], rows=[2])
    b = Items(["2"], {"x": [None], "v": np.ones((1, 2))}, "b", groups=["h"], rows=[2])
    both = joined([a, b], "both")
    assert both["x"] == [1, None]
    assert both["v"].tolist() == [[0, 0], [1, 1]]
    assert (both.ids, both.groups, both.rows) == (["1", "2"], ["g", "h"], [2, 2])
    with pytest.raises(NearfarError, match="'v' differs in shape"):
        joined([a, Items(["2"], {"x": [None], "v": np.ones((1, 3))})], "both")
