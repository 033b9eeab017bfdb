"""Hugging Face datasets: saved to disk, with and without the library, and by name."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from nearfar.data.folders import hub_name
from nearfar.data.sources import read_items, split_sources
from nearfar.errors import NearfarError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2)).save(stream, "PNG")
    return stream.getvalue()


FEATURES: dict[str, Any] = {
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
    "image": {"_type": "Image"},
    "v": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"},
}


def table() -> pa.Table:
    return pa.table(
        {
            "text": ["near", "far", None],
            "label": pa.array([0, 1, -1]),
            "image": [{"bytes": picture(), "path": None}] * 2 + [None],
            "v": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32())),
        }
    )


def save(folder: Path, parts: int = 1, stream: bool = True, features: object = FEATURES) -> Path:
    """As ``Dataset.save_to_disk`` of the library writes it."""
    folder.mkdir(parents=True)
    files = []
    for part in range(parts):
        name = f"data-{part:05d}-of-{parts:05d}.arrow"
        files.append({"filename": name})
        write = pa.ipc.new_stream if stream else pa.ipc.new_file
        with write(str(folder / name), table().schema) as writer:
            writer.write_table(table(), max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def save_dict(folder: Path, *splits: str) -> Path:
    for split in splits:
        save(folder / split)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


# -- saved to disk -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("parts", "stream"), [(1, True), (2, True), (1, False)])
def test_a_saved_dataset(tmp_path, parts, stream):
    items = read_items(save(tmp_path / "d", parts, stream))
    assert items.ids == [f"row{row}" for row in range(1, 3 * parts + 1)]
    assert items["text"] == ["near", "far", None] * parts
    assert items["label"] == ["no", "yes", None] * parts
    np.testing.assert_array_equal(items["v"], [[1, 2], [3, 4], [5, 6]] * parts)
    assert Path(items["image"][0]).read_bytes() == picture()
    assert items["image"][2] is None


def test_only_what_is_wanted_is_taken_out(tmp_path):
    items = read_items(save(tmp_path / "d"), ["label"], group_column="text")
    assert list(items.columns) == ["label"]
    assert items.groups[:2] == ["near", "far"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(NearfarError, match=r"no column 'lable'. Its columns are .*did you mean 'label'"):
        read_items(tmp_path / "d", ["lable"])


@pytest.mark.parametrize("features", [None, {}])
def test_without_features_classes_are_numbers(tmp_path, features):
    assert read_items(save(tmp_path / "d", features=features))["label"].tolist() == [0, 1, -1]


@pytest.mark.slow
def test_as_the_library_saves_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"),
        kind=datasets.ClassLabel(names=["a", "b"]),
        m=datasets.Array2D((2, 2), "float32"),
    )
    rows = {"text": ["x", "y", "z"], "kind": [0, 1, 0], "m": np.arange(12.0).reshape(3, 2, 2).tolist()}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(
        train=whole.select([2, 0]), validation=whole.filter(lambda row: row["text"] == "y")
    ).save_to_disk(tmp_path / "d")
    sources = split_sources(tmp_path / "d")
    items = read_items(sources["train"])
    assert (items["text"], items["kind"]) == (["z", "x"], ["a", "a"])
    np.testing.assert_array_equal(items["m"], np.arange(12.0).reshape(3, 2, 2)[[2, 0]])
    assert read_items(sources["val"])["text"] == ["y"]


def test_splits_of_a_dataset_dict(tmp_path):
    folder = save_dict(tmp_path / "d", "train", "validation", "unsupervised")
    assert split_sources(folder) == {"train": folder / "train", "val": folder / "validation"}
    items = read_items(folder)
    assert len(items) == 3
    assert items.notes["splits that are not read"] == ["unsupervised", "val"]


@pytest.mark.parametrize("names", [("validation", "test"), ("a", "b")])
def test_a_dataset_dict_without_train(tmp_path, names):
    folder = save_dict(tmp_path / "d", *names)
    for read in (split_sources, read_items):
        with pytest.raises(NearfarError, match=r"holds the splits .*, and none to train on .*data\.train="):
            read(folder)
    assert split_sources(folder, train=folder / names[0])["train"] == folder / names[0]


def test_damaged_offsets_are_an_error_and_do_not_end_the_process(tmp_path):
    folder = save(tmp_path / "d")
    file = folder / "data-00000-of-00001.arrow"
    offsets = np.array([0, 4, 7], np.int32).tobytes()  # of "near" and "far"
    assert file.read_bytes().count(offsets) == 1
    file.write_bytes(file.read_bytes().replace(offsets, np.array([0, 4, 1 << 30], np.int32).tobytes()))
    with pytest.raises(NearfarError, match="cannot be read as a saved dataset"):
        read_items(folder)


def test_folders_that_were_saved_in_part(tmp_path):
    folder = save(tmp_path / "a", 2)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(NearfarError, match=r"its part data-00001-of-00002\.arrow is missing"):
        read_items(folder)
    folder = save(tmp_path / "b")
    file = folder / "data-00000-of-00001.arrow"
    for data in (file.read_bytes()[:200], b"ARROW1 no", b""):
        file.write_bytes(data)
        with pytest.raises(NearfarError, match=r"cannot be read as a saved dataset"):
            read_items(folder)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "../a/data-00000-of-00002.arrow"}]}')
    with pytest.raises(NearfarError, match="is missing"):
        read_items(folder)
    (folder / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(NearfarError, match="without rows"):
        read_items(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(NearfarError, match="not valid JSON"):
        read_items(folder)
    folder = save_dict(tmp_path / "c", "train")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "../a"]}')
    with pytest.raises(NearfarError, match="there is no folder of"):
        read_items(folder)
    with pytest.raises(NearfarError, match="name its folder"):
        read_items(tmp_path / "a" / "data-00000-of-00002.arrow")


# -- by name -------------------------------------------------------------------------------------------------
class Stand:
    """The part of the library that is called, over a table."""

    __version__ = "5.0.0"

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def get_dataset_split_names(self, name: str, configuration: str | None) -> list[str]:
        self.calls.append(("splits", name, configuration))
        return ["train", "validation", "unsupervised"]

    def load_dataset(self, name: str, configuration: str | None, split: str) -> Any:
        self.calls.append((name, configuration, split))
        if name == "owner/broken":
            raise ConnectionError("no  route\nto host")
        batches = SimpleNamespace(iter=lambda batch_size: iter([table().slice(0, 2), table().slice(2)]))
        return SimpleNamespace(
            features=SimpleNamespace(to_dict=lambda: FEATURES),
            column_names=list(FEATURES),
            with_format=lambda kind: batches,
        )


@pytest.fixture
def library(monkeypatch) -> Stand:
    stand = Stand()
    monkeypatch.setitem(sys.modules, "datasets", stand)
    return stand


def test_a_dataset_by_name(library):
    items = read_items("owner/name", ["text", "label"])
    assert items["label"] == ["no", "yes", None]
    assert read_items("hf:name:small#test")["text"] == ["near", "far", None]
    assert library.calls == [("owner/name", None, "train"), ("name", "small", "test")]
    with pytest.raises(NearfarError, match="did you mean 'text'"):
        read_items("owner/name", ["txt"])


def test_splits_by_name(library):
    sources = split_sources("hf:owner/name:small")
    assert sources == {"train": "hf:owner/name:small#train", "val": "hf:owner/name:small#validation"}
    assert library.calls == [("splits", "owner/name", "small")]


def test_what_the_library_says_is_passed_on(library):
    with pytest.raises(NearfarError, match=r"could not be fetched .*: no route to host.*save_to_disk"):
        read_items("owner/broken")
    library.__class__.__version__ = "3.6.0"
    try:
        with pytest.raises(NearfarError, match="datasets>=4"):
            read_items("owner/name")
    finally:
        library.__class__.__version__ = "5.0.0"


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (read_items, split_sources):
        with pytest.raises(
            NearfarError, match=r"no file or folder here.*pip install 'nearfar\[datasets\]'.*save_to_disk"
        ):
            read("owner/name")
        with pytest.raises(NearfarError, match="is no name on the hub"):
            read("hf:a b/c")


def test_a_file_that_is_missing_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/name", "other/train.csv", "other/train.csv.gz", "other/a.tar", "/no/such"):
        with pytest.raises(NearfarError, match="There is no file"):
            read_items(name)
    assert hub_name("a/b/c") is None
    assert hub_name("../b") is None
