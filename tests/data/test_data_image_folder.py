"""Folders of pictures by class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nearfar.data.sources import read_items, split_sources
from nearfar.errors import NearfarError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_the_folder_is_the_class(tmp_path):
    items = read_items(
        touch(tmp_path, "cat/1.png", "cat/2.JPG", "dog/1.webp", "dog/.hidden.png", "notes.txt~")
    )
    assert items.ids == ["cat/1.png", "cat/2.JPG", "dog/1.webp"]
    assert items["label"] == ["cat", "cat", "dog"]
    assert items["image"] == [str(tmp_path / name) for name in items.ids]
    assert items.notes == {"files that are no pictures": {".txt~": 1}}


def test_deeper_folders_are_a_column(tmp_path):
    items = read_items(touch(tmp_path, "a/x/1.png", "a/y/2.png", "b/3.png", "4.png"), group_column="folder")
    assert dict(zip(items.ids, items["label"], strict=True)) == {
        "4.png": None,
        "a/x/1.png": "a",
        "a/y/2.png": "a",
        "b/3.png": "b",
    }
    assert dict(zip(items.ids, items["folder"], strict=True))["a/y/2.png"] == "a/y"
    assert items.notes == {"pictures outside the folders of classes": 1}
    assert len(set(items.groups)) == 4


def test_pictures_without_classes(tmp_path):
    items = read_items(touch(tmp_path, "1.png", "2.png"))
    assert items["label"] == [None, None]
    assert items.notes == {}


def test_missing_columns_and_empty_folders(tmp_path):
    touch(tmp_path, "cat/1.png")
    with pytest.raises(NearfarError, match=r"no column 'class'. Its columns are 'image', 'label'"):
        read_items(tmp_path, ["class"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NearfarError, match=r"holds no picture .*no file at all"):
        read_items(empty)
    touch(empty, "a.wav", "b.wav", "c")
    with pytest.raises(NearfarError, match=r"2 \.wav, 1 without ending"):
        read_items(empty)


def test_links_that_lead_round_in_a_circle(tmp_path):
    touch(tmp_path, "cat/1.png")
    os.symlink(tmp_path, tmp_path / "cat" / "again")
    os.symlink(tmp_path / "cat", tmp_path / "cat" / "self")
    assert read_items(tmp_path).ids == ["cat/1.png"]


def test_split_folders(tmp_path):
    touch(tmp_path, "Train/cat/1.png", "Train/dog/2.png", "validation/cat/3.png", "test/dog/4.png")
    sources = split_sources(tmp_path)
    assert {split: Path(path).name for split, path in sources.items()} == {
        "train": "Train",
        "val": "validation",
        "test": "test",
    }
    assert read_items(sources["val"])["label"] == ["cat"]
    whole = read_items(tmp_path)
    assert whole["label"] == ["cat", "dog"]
    assert whole.notes["splits that are not read"] == ["test", "val"]


def test_a_class_that_is_called_test_is_no_split(tmp_path):
    touch(tmp_path, "cat/1.png", "test/2.png")
    assert split_sources(tmp_path) == {"train": tmp_path}
    assert read_items(tmp_path)["label"] == ["cat", "test"]


def test_a_table_of_metadata_comes_before_the_folders(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,near\n2.png,far\n")
    items = read_items(tmp_path)
    assert items["text"] == ["near", "far"]
    assert items["file_name"] == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
