"""COCO-format files: what is read, what is turned away and counted, groups, splits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nearfar.data.coco import coco_files, read_coco
from nearfar.errors import NearfarError

pytestmark = pytest.mark.usefixtures("module_cache")


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
        {"id": 1, "file_name": "1.png"},
        {"id": 5, "file_name": "1.png"},
        {"file_name": "3.png"},
        {"id": [6], "file_name": "3.png"},
        {"id": 7, "file_name": None},
        {"id": 8, "file_name": "3.png", "width": "forty", "height": 30},
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
        ["one", 1, 4, 4],
        ["1_0", 1, 4, 4],
        {"x": 1},
        [0.2, 0.2, 0.5, 0.5],
        None,
        [True, 1, 4, 4],
    ]
    annotations = [
        good,
        *(good | {"bbox": box} for box in bad),
        good | {"id": 77},
        good | {"iscrowd": "some"},
        good | {"bbox": None, "segmentation": {"counts": "x", "size": [30, 40]}},
        good | {"bbox": None, "segmentation": [[1, 2, "x", 4, 5, 6]]},
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
        "picture of a different size": 1,
        "width or height that is no number": 1,
        "repeated picture": 2,
        "picture without id or file_name": 3,
        "box without area": 2,
        "box outside its picture": 2,
        "box that is no four numbers": 7,
        "box within the first pixel: a share of the picture?": 1,
        "no bbox": 1,
        "no bbox, and a run-length encoded mask": 1,
        "no bbox, and no polygon of numbers": 1,
        "iscrowd that is neither 0 nor 1": 1,
        "repeated box": 1,
        "box of a picture that was left out": 1,
        "box of a picture that is not there": 1,
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
        ({"images": []}, {}, "none of its 0 pictures is usable"),
        ({"images": [{"id": 1, "file_name": "x.png"}]}, {}, r"name their folder with data\.images=FOLDER"),
        ({"annotations": []}, {}, "none of its 0 boxes is usable"),
        ({"categories": []}, {}, "names none; rows such as"),
        ({"categories": None}, {}, "no list of objects 'categories'"),
        ({"annotations": [[1]]}, {}, "no list of objects 'annotations'"),
        ({}, {"group_key": "sx"}, "did you mean 'sex'"),
        ({"categories": [{"id": 7, "name": "a"}, {"id": 7, "name": "b"}]}, {}, "id 7 is both 'a' and 'b'"),
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


def exported(root: Path, files: dict[str, str], pictures: str, n: int = 4, **changes: Any) -> Path:
    """A folder as an exporter writes it: the same content under each name of ``files``, pictures in a folder.

    ``files``: name → kind of content. ``changes``: a function of each image's or annotation's row.
    """
    images = [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(1, n + 1)]
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 30], "iscrowd": 0}
        for i in range(1, n + 1)
    ]
    (root / pictures).mkdir(parents=True, exist_ok=True)
    for image in images:
        colour = (10 * int(image["id"]), 90, len(pictures))
        Image.new("RGB", (64, 48), colour).save(root / pictures / str(image["file_name"]))
    for row in images:
        row.update(changes.get("image", lambda _: {})(row))
    for row in boxes:
        row.update(changes.get("box", lambda _: {})(row))
    for name, kind in files.items():
        rows: Any = boxes if kind == "boxes" else [{"id": 1, "image_id": 1, "caption": "a dog"}]
        content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "person"}]}
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return root


LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "roboflow": {split: (f"{split}/_annotations.coco.json", split) for split in ("train", "valid", "test")},
    "cvat": {"whole": ("annotations/instances_default.json", "images")},
    "cvat with folders": {"whole": ("annotations/instances_default.json", "images/default")},
    "fiftyone": {"whole": ("labels.json", "data")},
    "fiftyone splits": {
        split: (f"{split}/labels.json", f"{split}/data") for split in ("train", "validation")
    },
    "fiftyone folders": {split: (f"labels/{split}.json", f"data/{split}") for split in ("train", "val")},
    "label studio": {"whole": ("result.json", "images")},
    "label studio, newer": {"whole": ("result_coco.json", "images")},
    "datumaro": {
        split: (f"annotations/instances_{split}.json", f"images/{split}") for split in ("train", "val")
    },
    "coco": {
        split: (f"annotations/instances_{split}2017.json", f"{split}2017") for split in ("train", "val")
    },
    "own folder": {"whole": ("some.json", "photos/of/2020")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_and_pictures_lie_where_exporters_put_them(tmp_path: Path, layout: str) -> None:
    """Pictures of one name in two splits are two pictures: each file takes its own."""
    for file, pictures in LAYOUTS[layout].values():
        exported(tmp_path, {file: "boxes"}, pictures)
    names = {"valid": "val", "validation": "val"}
    expected = {names.get(split, split): file for split, (file, _) in LAYOUTS[layout].items()}
    found = coco_files(tmp_path)
    assert {split: str(path.relative_to(tmp_path)) for split, path in found.items()} == expected
    for split, (_, pictures) in LAYOUTS[layout].items():
        read = read_coco(found[names.get(split, split)], folder=tmp_path)
        assert len(read.boxes) == 4
        assert {image.path.parent for image in read.images} == {tmp_path / pictures}
        assert not read.remarks()


def test_of_cocos_own_files_the_instances_are_read(tmp_path: Path) -> None:
    names = {f"annotations/{kind}_train2017.json": "boxes" for kind in ("instances", "person_keypoints")}
    exported(tmp_path, names | {"annotations/captions_train2017.json": "captions"}, "train2017")
    exported(tmp_path, {"annotations/image_info_test2017.json": "captions"}, "test2017")
    told: list[str] = []
    assert {split: path.name for split, path in coco_files(tmp_path, told.append).items()} == {
        "train": "instances_train2017.json"
    }
    assert "person_keypoints_train2017.json" in told[0]
    (tmp_path / "annotations/instances_train2017.json").unlink()
    assert coco_files(tmp_path)["train"].name == "person_keypoints_train2017.json"
    (tmp_path / "annotations/person_keypoints_train2017.json").unlink()
    with pytest.raises(NearfarError, match=r"captions_train2017\.json holds no boxes"):
        coco_files(tmp_path)


def test_a_file_outside_the_folder_of_the_pictures_and_links_in_a_circle(tmp_path: Path) -> None:
    exported(tmp_path / "photos", {"a.json": "boxes"}, "x/y")
    (tmp_path / "photos" / "a.json").rename(tmp_path / "a.json")
    (tmp_path / "photos" / "round").symlink_to(tmp_path / "photos")
    assert len(read_coco(tmp_path / "a.json", folder=tmp_path / "photos")) == 4
    (tmp_path / "circle").symlink_to(tmp_path)
    told: list[str] = []
    assert coco_files(tmp_path, told.append) == {"whole": tmp_path / "a.json"}
    (tmp_path / "b.json").write_text(json.dumps({"images": [], "annotations": []}))
    coco_files(tmp_path, told.append)
    assert told == ["not read: b.json (data.train=FILE reads a file by name)"]


def test_a_file_or_an_archive_in_the_place_of_a_folder(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(NearfarError, match=f"data.train={path}"):
        coco_files(path)
    (tmp_path / "export.zip").write_bytes(b"PK")
    with pytest.raises(NearfarError, match="unpack it first"):
        coco_files(tmp_path / "export.zip")


@pytest.mark.parametrize(
    "name",
    [
        "images\\{}",
        "../../images/{}",
        "../../label-studio/data/media/upload/1/{}",
        "C:\\Users\\me\\{}",
        "/data/local-files/?d=images/{}",
        "https://some.host/bucket/{}?width=9",
        "Images/{}",
    ],
)
def test_picture_names_of_other_systems(tmp_path: Path, name: str) -> None:
    exported(
        tmp_path, {"a.json": "boxes"}, "images", image=lambda r: {"file_name": name.format(r["file_name"])}
    )
    read = read_coco(tmp_path / "a.json")
    assert [image.path for image in read.images] == [tmp_path / "images" / f"{i}.png" for i in range(1, 5)]


def test_a_picture_of_a_different_folder_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "cam2", image=lambda r: {"file_name": f"cam1/{r['file_name']}"})
    (tmp_path / "cam1").mkdir()
    shutil.copy(tmp_path / "cam2" / "1.png", tmp_path / "cam1" / "1.png")
    read = read_coco(tmp_path / "a.json")
    assert ([image.name for image in read.images], read.rejections.counts["missing picture"]) == (
        ["cam1/1.png"],
        3,
    )
    # Nor one that lies in the folder of a different split.
    exported(tmp_path / "b", {"annotations/instances_train.json": "boxes"}, "images/val")
    with pytest.raises(NearfarError, match="missing picture 4"):
        read_coco(tmp_path / "b/annotations/instances_train.json", folder=tmp_path / "b")
    with pytest.raises(NearfarError, match=r"images/val/1\.png is of a different split"):
        read_coco(tmp_path / "b/annotations/instances_train.json", folder=tmp_path / "b")
    # Nor is one file two pictures whose folders are not there.
    doubled = exported(
        tmp_path / "d", {"a.json": "boxes"}, "images", image=lambda r: {"file_name": f"x{r['id']}/1.png"}
    )
    with pytest.raises(NearfarError, match="several pictures of one name 4"):
        read_coco(doubled / "a.json")
    # Nor anything outside the folder.
    exported(
        tmp_path / "c", {"a.json": "boxes"}, "images", image=lambda r: {"file_name": f"{tmp_path}/cam2/1.png"}
    )
    assert read_coco(tmp_path / "c" / "a.json").images[0].path == tmp_path / "c" / "images" / "1.png"


def test_of_two_pictures_of_one_name_the_size_or_the_usual_folder_decides_and_it_is_said(
    tmp_path: Path,
) -> None:
    path = exported(tmp_path, {"a.json": "boxes"}, "big") / "a.json"
    (tmp_path / "thumbs").mkdir()
    for i in range(1, 5):
        Image.new("RGB", (16, 12)).save(tmp_path / "thumbs" / f"{i}.png")
    read = read_coco(path)
    assert {image.path.parent.name for image in read.images} == {"big"}
    assert (read.several_files, "thumbs/1.png" in read.remarks()[0]) == (4, True)
    content = json.loads(path.read_text())
    for image in content["images"]:
        image.update(width=None, height=None)
    path.write_text(json.dumps(content))
    with pytest.raises(NearfarError, match="several pictures of one name 4"):
        read_coco(path)
    assert len(read_coco(path, tmp_path / "big")) == 4, "the advice works"
    (tmp_path / "big").rename(tmp_path / "images")
    assert {image.path.parent.name for image in read_coco(path).images} == {"images"}


@pytest.mark.parametrize(
    ("image", "box"),
    [
        ({"width": None, "height": None}, {}),
        ({"width": "64", "height": 48.0}, {}),
        ({"width": 0, "height": 0}, {}),
        ({}, {"bbox": ["5", "5.0", 20, "3e1"]}),
        ({}, {"bbox": None, "segmentation": [[5, 5, 25, 5, 25, 35]]}),
        ({}, {"bbox": [], "segmentation": [[[5, 5], [25, 5], [25, 35]]]}),
        ({}, {"category_id": "1", "iscrowd": "0"}),
    ],
)
def test_numbers_in_quotes_missing_sizes_and_polygons(tmp_path: Path, image: Any, box: Any) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images", image=lambda _: image, box=lambda _: box)
    read = read_coco(tmp_path / "a.json")
    assert read.boxes.tolist() == [[5, 5, 20, 30]] * 4
    assert not read.crowd.any()
    assert read.outlines == (4 if "segmentation" in box else 0)


@pytest.mark.parametrize("key", ["image", "box"])
def test_ids_are_one_whatever_their_type(tmp_path: Path, key: str) -> None:
    texts = {
        "image": lambda r: {"id": str(r["id"])},
        "box": lambda r: {"image_id": str(r["image_id"]), "category_id": 1.0},
    }
    exported(tmp_path, {"a.json": "boxes"}, "images", **{key: texts[key]})
    assert read_coco(tmp_path / "a.json").image.tolist() == [0, 1, 2, 3]


def test_boxes_of_an_id_that_two_pictures_have_are_nobodys(tmp_path: Path) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images", image=lambda r: {"id": min(int(r["id"]), 3)})
    read = read_coco(tmp_path / "a.json")
    assert read.ids == ["1.png", "2.png"]
    assert read.rejections.counts == {
        "one id of several pictures": 2,
        "box of a picture that was left out": 1,
        "box of a picture that is not there": 1,
    }
    # One picture under two ids has the boxes of both.
    exported(tmp_path / "b", {"a.json": "boxes"}, "images", image=lambda r: {"file_name": "1.png"})
    boxes = read_coco(tmp_path / "b" / "a.json")
    assert (len(boxes), boxes.rejections.counts) == (1, {"repeated picture": 3, "repeated box": 3})


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ([0.1, 0.1, 0.3, 0.6], "shares of their pictures"),
        ([0.6, 0.6, 0.9, 0.9], "shares of their pictures"),
        ([30, 20, 60, 45], r"two corners, \[left, top, right, bottom\]"),
        ([40, 24, 40, 40], "centre and size"),
    ],
)
def test_boxes_in_other_units_are_refused(tmp_path: Path, bbox: list[float], message: str) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images", box=lambda _: {"bbox": bbox})
    with pytest.raises(NearfarError, match=message):
        read_coco(tmp_path / "a.json")


def test_boxes_that_reach_over_an_edge_are_no_corners(tmp_path: Path) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images", box=lambda r: {"bbox": [30 + r["id"], 5, 40, 20]})
    with pytest.raises(NearfarError, match="two corners"):
        read_coco(tmp_path / "a.json")  # left below right and in the picture, for each of them
    exported(
        tmp_path, {"a.json": "boxes"}, "images", box=lambda r: {"bbox": [30, 5, 40 - 11 * (r["id"] % 2), 20]}
    )
    assert read_coco(tmp_path / "a.json").clipped == 2


def test_a_thumbnail_is_known_by_its_boxes_where_no_size_is_stated(tmp_path: Path) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images", n=8, image=lambda _: {"width": None, "height": None})
    Image.new("RGB", (16, 12)).save(tmp_path / "images" / "3.png")
    read = read_coco(tmp_path / "a.json")
    assert len(read) == 7
    assert read.rejections.counts == {
        "picture that is too small for its boxes": 1,
        "box of a picture that was left out": 1,
    }


def test_categories_in_other_letters_and_the_project_above_them(tmp_path: Path) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images")
    path = tmp_path / "a.json"
    content = json.loads(path.read_text())
    content["categories"] = [
        {"id": 0, "name": "people", "supercategory": "none"},
        {"id": 1, "name": "Person", "supercategory": "people"},
    ]
    path.write_text(json.dumps(content))
    assert read_coco(path).categories == ("Person",)
    assert read_coco(path, categories=["person"]).categories == ("person",)
    with pytest.raises(NearfarError, match=r"known: Person. data.category=NAME"):
        read_coco(path, categories=["zebra"])
    some = read_coco(path, categories=["zebra", "person"], missing_categories="allow")
    assert (some.categories, some.label.tolist()) == (("zebra", "person"), [1, 1, 1, 1])


def test_values_of_neither_group_are_said(tmp_path: Path) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images", image=lambda r: {"sex": "fmx?"[int(r["id"]) - 1]})
    read = read_coco(tmp_path / "a.json", group_key="sex", groups=["f", "m"])
    assert read.other_groups == {"x": 1, "?": 1}
    assert "sex of neither group: x 1, ? 1" in read.remarks()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"images": ' + "[" * 100_000, "\ufeff{}", '{"a": 1' + "0" * 5000 + "}"]
)
def test_hostile_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.json").write_text(text, encoding="utf-8")
    with pytest.raises(NearfarError, match=r"train\.json"):
        read_coco(tmp_path / "train.json")


def test_damaged_pictures_are_known_when_read_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path, {"a.json": "boxes"}, "images", n=6)
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    noise.save(folder / "1.jpg")
    whole = (folder / "1.jpg").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").write_bytes(b"")
    (folder / "3.png").write_text("<html>404 Not Found</html>")
    Image.new("RGB", (32, 24)).save(folder / "4.png")
    (folder / "5.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EOF\n"
    )  # starts a program
    read = read_coco(tmp_path / "a.json")
    assert read.ids == ["6.png"]
    assert read.rejections.counts["unreadable picture"] == 4
    assert read.rejections.counts["picture of a different size"] == 1
    assert (
        "32 × 24 in truth, 64 × 48 in the file"
        in read.rejections.first["picture of a different size"][0].detail
    )
    monkeypatch.setattr("nearfar.data.picture_files.check_image", lambda _: pytest.fail("decoded again"))
    again = read_coco(tmp_path / "a.json")
    assert again.rejections.as_dict() == read.rejections.as_dict()
    monkeypatch.undo()
    noise.save(folder / "2.png")  # loaded once more: other bytes, so that it is looked at again
    assert read_coco(tmp_path / "a.json").ids == ["2.png", "6.png"]


@pytest.mark.slow
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
