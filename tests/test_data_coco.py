"""COCO-format files: what is read, what is turned away and counted, groups, splits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nearfar.data.coco import coco_files, read_coco
from nearfar.errors import NearfarError


def write(folder: Path, name: str = "train.json", **changes: Any) -> Path:
    """Three pictures of 40 × 30 pixels with four boxes, and whatever ``changes`` replaces in the file."""
    (folder / "images").mkdir(exist_ok=True)
    images = [
        {"id": 10 * i, "file_name": f"{i}.png", "width": 40, "height": 30, "sex": "mf"[i % 2]}
        for i in (1, 2, 3)
    ]
    for image in images:
        Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "images" / str(image["file_name"]))
    annotations = [
        {"id": 1, "image_id": 20, "category_id": 7, "bbox": [1, 2, 10, 20], "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 5, 5]},
        {"id": 3, "image_id": 20, "category_id": 3, "bbox": [30, 20, 20.5, 9], "iscrowd": 1},
        {"id": 4, "image_id": 10, "category_id": 7, "bbox": [3.5, 4, 6, 7], "attributes": {"sex": "m"}},
    ]
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "person"}]
    content = {"images": images, "annotations": annotations, "categories": categories} | changes
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_boxes_stand_in_the_order_of_their_pictures(tmp_path: Path) -> None:
    split = read_coco(write(tmp_path))
    assert split.ids == ["1.png", "2.png", "3.png"]
    assert split.categories == ("dog", "person")
    assert split.image.tolist() == [0, 0, 1, 1]
    assert split.label.tolist() == [0, 1, 1, 0]
    assert split.crowd.tolist() == [False, False, False, True]
    np.testing.assert_array_equal(
        split.boxes, [[0, 0, 5, 5], [3.5, 4, 6, 7], [1, 2, 10, 20], [30, 20, 10, 9]]
    )
    assert split.clipped == 1
    assert [split.of_image(i) for i in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 4)]
    assert len(split.rejections) == 0
    assert (split.images[0].width, split.images[0].height) == (40, 30)


def test_a_group_of_a_box_counts_before_that_of_its_picture(tmp_path: Path) -> None:
    split = read_coco(write(tmp_path), group_key="sex")
    assert split.groups == ("f", "m")
    assert [image.group for image in split.images] == [0, 1, 0]
    assert split.group.tolist() == [0, 1, 1, 1]
    assert split.layout()["groups"] == {"f": {"images": 2, "boxes": 1}, "m": {"images": 1, "boxes": 3}}
    assert read_coco(write(tmp_path), group_key="sex", groups=["m", "f"]).group.tolist() == [1, 0, 0, 0]


def test_a_picture_takes_the_group_on_which_its_boxes_agree(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    boxes = [(1, "a"), (1, "a"), (2, "a"), (2, "b"), (3, "other")]
    annotations = [
        {"image_id": i, "category_id": 7, "bbox": [1, 1, 2, k + 2], "age": age}
        for k, (i, age) in enumerate(boxes)
    ]
    write(tmp_path)
    path = write(tmp_path, images=images, annotations=annotations)
    split = read_coco(path, group_key="age", groups=["a", "b"])
    assert [image.group for image in split.images] == [0, -1, -1]
    assert split.group.tolist() == [0, 0, 0, 1, -1]


def test_categories_are_chosen_and_the_rest_is_counted(tmp_path: Path) -> None:
    split = read_coco(write(tmp_path), categories=["person"])
    assert split.categories == ("person",)
    assert split.label.tolist() == [0, 0]
    assert split.left_out == {"dog": 2}
    assert len(split) == 3, "pictures without a box of the category stay: nothing is to be found there"
    with pytest.raises(NearfarError, match="no category 'persn'; did you mean 'person'"):
        read_coco(write(tmp_path), categories=["persn"])


def test_every_kind_of_bad_row_is_counted_once(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "images" / "cut.png").write_bytes((tmp_path / "images" / "1.png").read_bytes()[:20])
    images = [
        {"id": 1, "file_name": "1.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "gone.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "cut.png", "width": 40, "height": 30},
        {"id": 4, "file_name": "2.png", "width": 30, "height": 40},
        {"id": 1, "file_name": "3.png"},
        {"id": 5, "file_name": "1.png"},
        {"file_name": "3.png"},
        {"id": [6], "file_name": "3.png"},
        {"id": 7, "file_name": None},
    ]
    good = {"image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4]}
    bad: list[Any] = [
        [1, 1, 0, 4],
        [1, 1, 4, -2],
        [40, 1, 4, 4],
        [-9, 1, 4, 4],
        [1, 1, 4],
        [1, 1, float("nan"), 4],
        [1, 1, float("inf"), 4],
        ["1", 1, 4, 4],
        None,
        [True, 1, 4, 4],
    ]
    annotations = [
        good,
        *(good | {"bbox": box} for box in bad),
        good | {"image_id": 2},
        good | {"image_id": {}},
        good | {"category_id": 99},
        good | {"category_id": None},
    ]
    split = read_coco(write(tmp_path, images=images, annotations=annotations))
    assert split.ids == ["1.png"]
    assert len(split.boxes) == 1
    assert split.rejections.counts == {
        "missing picture": 1,
        "unreadable picture": 1,
        "picture of another size": 1,
        "repeated picture": 2,
        "picture without id or file_name": 3,
        "box without area": 2,
        "box outside its picture": 2,
        "box that is no four numbers": 6,
        "box of a picture that is not there": 2,
        "unknown category": 2,
    }
    assert "gone.png" in split.rejections.summary()


def test_hashes_name_pictures_and_content(tmp_path: Path) -> None:
    split = read_coco(write(tmp_path), group_key="sex")
    turned = split.take([2, 0, 1])
    assert turned.hash == split.hash
    assert turned.content != split.content
    assert turned.image.tolist() == [1, 1, 2, 2]
    np.testing.assert_array_equal(turned.boxes, split.boxes)
    one = split.take(np.array([1]))
    assert (one.ids, one.image.tolist(), one.label.tolist()) == (["2.png"], [0, 0], [1, 0])
    assert one.hash != split.hash
    assert len(split.take([2]).boxes) == 0
    moved = json.loads((tmp_path / "train.json").read_text())
    moved["annotations"][0]["bbox"][0] = 1.5
    (tmp_path / "train.json").write_text(json.dumps(moved))
    other = read_coco(tmp_path / "train.json", group_key="sex")
    assert (other.hash, other.content != split.content) == (split.hash, True)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"images": []}, {}, "pictures are not to be found"),
        ({"annotations": []}, {}, "none of its 0 boxes is usable"),
        ({"categories": None}, {}, "no list of objects 'categories'"),
        ({"annotations": [[1]]}, {}, "no list of objects 'annotations'"),
        ({}, {"group_key": "sx"}, "did you mean 'sex'"),
        ({}, {"groups": ["f", "m"]}, "group_key=NAME"),
        ({}, {"group_key": "sex", "groups": ["f", "x"]}, "no picture or box has sex=x"),
        ({}, {"group_key": "file_name"}, "exactly two values"),
        ({}, {"images": "nowhere"}, "no such folder of pictures"),
    ],
)
def test_files_that_cannot_be_used_say_why(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(NearfarError, match=message):
        read_coco(write(tmp_path, **changes), **options)


def test_broken_files_say_why(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(NearfarError, match="cut off"):
        read_coco(path)
    path.write_text("[1, 2]")
    with pytest.raises(NearfarError, match="an object with images"):
        read_coco(path)
    with pytest.raises(NearfarError, match="no file"):
        read_coco(tmp_path / "nothing.json")


def test_the_files_of_a_folder_are_found_by_split(tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match=r"no train\.json"):
        coco_files(tmp_path)
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train2017.json", "instances_val2017.json", "captions.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    found = coco_files(tmp_path)
    assert {split: path.name for split, path in found.items()} == {
        "train": "instances_train2017.json",
        "val": "instances_val2017.json",
    }
    (tmp_path / "validation.json").write_text("{}")
    with pytest.raises(NearfarError, match="several files could be val"):
        coco_files(tmp_path)
    with pytest.raises(NearfarError, match="no such folder"):
        coco_files(tmp_path / "nowhere")


@pytest.mark.data
def test_real_files() -> None:
    data = os.environ.get("NEARFAR_DATA")
    if not data or not (Path(data) / "coco_gender").exists():
        pytest.skip("NEARFAR_DATA is not set")
    files = coco_files(Path(data) / "coco_gender")
    train, val = (read_coco(files[name], group_key="gender") for name in ("train", "val"))
    assert (len(train), len(val)) == (1211, 195)
    assert [image.group for image in val.images].count(0) == 102
    assert not set(train.ids) & set(val.ids)
    whole = read_coco(Path(data) / "coco256" / "train2017.json")
    assert len(whole.boxes) == 929
    assert len(whole.categories) == 80
