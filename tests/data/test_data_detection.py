"""Splits of COCO files, and batches of pictures with boxes in augmented views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.config.compose import compose_config
from nearfar.data.coco import read_coco
from nearfar.data.detection import View, detection_dataset, make_view, targets_of
from nearfar.errors import NearfarError
from nearfar.systems import check_config
from nearfar.systems.detector.data import read_splits
from tiny_detection import write

SMALL = [
    "epochs=2",
    "batch_size=8",
    "width=16",
    "heads=2",
    "layers=1",
    "queries=5",
    "frozen_epochs=0",
    "data.image_size=64",
    "data.group_key=sex",
    "bootstrap=100",
    "image_encoder=small",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "report=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for split, n in (("train", 40), ("val", 12), ("test", 16)):
        write(path, split, n)
    return path


# -- data ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_views_move_boxes_with_their_content() -> None:
    rng = np.random.default_rng(0)
    shown = 0
    for seed in range(60):
        picture = np.full((60, 80, 3), 40, np.uint8)
        x, y = rng.integers(5, 40), rng.integers(5, 25)
        picture[y : y + 25, x : x + 30] = 220
        box = np.array([[x / 80, y / 60, (x + 30) / 80, (y + 25) / 60]])
        pixels, boxes, labels = make_view(picture, box, np.array([7]), 96, View(colours=0.0), (1, seed))
        assert pixels.shape == (3, 96, 96)
        assert labels.tolist() == [7]
        bright = np.argwhere(pixels[0] > 130)
        top, left = bright.min(0)
        bottom, right = bright.max(0) + 1
        np.testing.assert_allclose(boxes[0] * 96, [left, top, right, bottom], atol=2.0)
        shown += not np.allclose(boxes, box)
        again = make_view(picture, box, np.array([7]), 96, View(colours=0.0), (1, seed))
        assert np.array_equal(pixels, again[0])
    assert shown > 50


def test_a_view_drops_boxes_that_are_cut_away() -> None:
    picture = np.zeros((50, 50, 3), np.uint8)
    boxes = np.array([[0.0, 0.0, 0.15, 0.15], [0.4, 0.4, 0.9, 0.9]])
    counts = {
        len(make_view(picture, boxes, np.arange(2), 32, View(crop=0.5), (seed,))[1]) for seed in range(40)
    }
    assert counts == {1, 2}
    assert len(make_view(picture, boxes[:0], np.arange(0), 32, View(), (0,))[1]) == 0


def options(folder: Path, **changes: Any) -> Any:
    overrides = [f"data.{name}={value}" for name, value in changes.items()]
    return check_config(
        compose_config(["experiment=detector", f"data.dir={folder}", *SMALL, *overrides])
    ).data


@pytest.mark.slow
def test_splits_by_the_files_that_are_there(tmp_path: Path) -> None:
    write(tmp_path, "train", 40)
    messages: list[str] = []
    one = read_splits(options(tmp_path, val_fraction=0.25), messages.append)
    assert {name: len(split) for name, split in one.items()} == {"train": 22, "val": 8, "test": 10}
    assert "there is one file" in messages[0]
    assert [sum(i.group == g for i in one["test"].images) for g in (0, 1)] == [5, 5]
    assert len({*one["train"].ids, *one["val"].ids, *one["test"].ids}) == 40
    write(tmp_path, "val", 12)
    two = read_splits(options(tmp_path, val_fraction=0.25), messages.append)
    assert {name: len(split) for name, split in two.items()} == {"train": 30, "val": 10, "test": 12}
    assert two["test"].ids == read_coco(tmp_path / "val.json").ids
    assert read_splits(options(tmp_path, val_fraction=0.25, split_seed=1))["val"].ids != two["val"].ids
    write(tmp_path, "test", 16)
    three = read_splits(options(tmp_path))
    assert {name: len(split) for name, split in three.items()} == {"train": 40, "val": 12, "test": 16}
    (tmp_path / "test.json").write_text((tmp_path / "train.json").read_text())
    with pytest.raises(NearfarError, match="train and test share 40 pictures"):
        read_splits(options(tmp_path))


@pytest.mark.slow
def test_splits_by_files_that_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", "first", 20)
    write(tmp_path / "b", "second", 12)
    files = [f"data.train={tmp_path}/a/first.json", f"data.test={tmp_path}/b/second.json"]
    config: Any = check_config(
        compose_config(["experiment=detector", *SMALL, *files, "data.val_fraction=0.25"])
    )
    messages: list[str] = []
    splits = read_splits(config.data, messages.append)
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "val": 4, "test": 12}
    assert any("no file for val: 25%" in line for line in messages)
    (tmp_path / "a" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(NearfarError, match=r"data\.images=FOLDER"):
        read_splits(config.data)
    config.data.images = f"{tmp_path}/elsewhere"
    config.data.test = None
    assert sum(len(split) for split in read_splits(config.data).values()) == 20, "the advice works"
    with pytest.raises(NearfarError, match=r"no data\.train to learn from"):
        read_splits(
            check_config(compose_config(["experiment=detector", f"data.val={tmp_path}/b/second.json"])).data
        )


@pytest.mark.slow
def test_pictures_of_one_name_in_two_folders_are_no_leak_and_copies_are_said(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "valid", "test")):
        write(tmp_path / split, "p", 12, seed)
        (tmp_path / split / "p.json").rename(tmp_path / split / "_annotations.coco.json")
        for picture in (tmp_path / split / "images").iterdir():
            picture.rename(tmp_path / split / picture.name)
    shutil.copy(tmp_path / "train" / "p1.png", tmp_path / "valid" / "p2.png")
    messages: list[str] = []
    splits = read_splits(options(tmp_path), messages.append)
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "val": 12, "test": 12}
    assert splits["train"].ids == splits["test"].ids
    assert splits["train"].files != splits["test"].files
    assert messages == [
        "train and val: 1 pictures of the second are byte for byte in the first, too: a leak, if they are copies"
    ]


@pytest.mark.slow
def test_what_train_knows_nothing_of_is_said(tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "val", "test")):
        write(tmp_path, split, 12, seed)
    path = tmp_path / "test.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 1, "name": "Person"}, {"id": 2, "name": "dog"}]
    content["annotations"][0]["category_id"] = 2
    content["images"][3]["sex"] = "other"
    path.write_text(json.dumps(content))
    messages: list[str] = []
    splits = read_splits(options(tmp_path, category="null"), messages.append)
    assert splits["test"].categories == ("person",)
    assert [line.split(": ", 2)[2] for line in messages] == [
        "boxes of other categories, left out: dog 1",
        "sex of neither group: other 1",
        "the training file does not have these categories: nothing is learned of them",
    ]


@pytest.mark.slow
def test_the_advice_for_few_pictures_works(tmp_path: Path) -> None:
    write(tmp_path, "train", 3)
    with pytest.raises(NearfarError, match=r"Raise data\.val_fraction \(0\.4"):
        read_splits(options(tmp_path, group_key="null"))
    splits = read_splits(options(tmp_path, group_key="null", val_fraction=0.4))
    assert {name: len(split) for name, split in splits.items()} == {"train": 1, "val": 1, "test": 1}


@pytest.mark.slow
def test_batches_depend_on_seed_epoch_and_position_alone(folder: Path) -> None:
    split = read_coco(folder / "train.json")
    dataset = detection_dataset(split, 64, augment=View(), seed=3)
    dataset.set_epoch(2)
    first, again = dataset[5], dataset.__getitems__([9, 5])
    assert torch.equal(first.tensor("pixels")[0], again.tensor("pixels")[1])
    assert torch.equal(targets_of(first)[0].boxes, targets_of(again)[1].boxes)
    dataset.set_epoch(3)
    assert not torch.equal(first.tensor("pixels"), dataset[5].tensor("pixels"))
    plain = targets_of(detection_dataset(split, 64)[0])[0].boxes[0] * torch.tensor([64, 48, 64, 48])
    left, top, width, height = split.boxes[0]
    np.testing.assert_allclose(plain, [left + width / 2, top + height / 2, width, height], atol=1e-4)
