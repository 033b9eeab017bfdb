"""Reading relations: four layouts, each kind of bad row, splits by picture, composed scenes, numbers of boxes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig

from nearfar.config.compose import compose_config
from nearfar.data.rejections import Rejections
from nearfar.data.scenes.composed import HEIGHT, HELD_OUT, THINGS, WIDTH, composed_scenes
from nearfar.data.scenes.readers import LAYOUTS, Places, geometric_relation
from nearfar.data.scenes.triples import ALL10, TOP5, chosen_relations, relation_of, table
from nearfar.errors import NearfarError
from nearfar.systems import check_config
from nearfar.systems.relations.data import load_data
from tiny_relations import write_photo, write_vrd

pytest.importorskip("PIL")
pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]


def config(*overrides: str) -> DictConfig:
    return check_config(compose_config(["experiment=relations", *overrides]))


def test_names() -> None:
    assert {relation for _, relation in table()} == set(ALL10)
    assert len({name for name, _ in table()}) == len(table())
    for name, relation in (
        ("on the left of", "left of"),
        ("to the right of", "right of"),
        ("beneath", "below"),
        ("beside", "next to"),
        ("over", "above"),
        ("IN", "inside"),
        ("on the top of", "on"),
    ):
        assert relation_of(name) == relation
        assert relation_of(name, synonyms=False) is None
    assert relation_of("sit on") is None
    assert chosen_relations("top5") == TOP5
    for wrong in (["on"], ["on", "on"], ["on", "wear"], 5):
        with pytest.raises(NearfarError):
            chosen_relations(wrong)


def read(layout: str, path: Path) -> tuple[list[Any], Rejections]:
    rejections = Rejections()
    return list(LAYOUTS[layout].read(path, None, rejections, Places())), rejections


def test_vrd_boxes_are_y_then_x(tmp_path: Path) -> None:
    write_vrd(tmp_path, 2, photos=0)
    box = {"category": 0, "bbox": [1, 2, 30, 40]}
    rows = [
        {"predicate": 0, "subject": box, "object": {"category": 1, "bbox": [5, 9, 6, 8]}},
        {"predicate": 99, "subject": box, "object": box},
        {"predicate": 0, "subject": {"category": 0, "bbox": [1, 2, 3]}, "object": box},
        {"predicate": 0, "object": box},
        {"predicate": 0, "subject": {"category": -1, "bbox": [1, 2, 3, 4]}, "object": box},
    ]
    (tmp_path / "annotations.json").write_text(json.dumps({"a.jpg": rows, "b.jpg": None}))
    triples, rejections = read("vrd", tmp_path / "annotations.json")
    assert len(triples) == 1
    assert triples[0].subject_box == (30, 1, 40, 2)
    assert (triples[0].subject, triples[0].predicate, triples[0].object) == ("cup", "on", "table")
    assert rejections.counts == {"malformed row": 4, "relations of a picture are no list": 1}
    (tmp_path / "objects.json").unlink()
    with pytest.raises(NearfarError, match=r"objects\.json is missing"):
        read("vrd", tmp_path / "annotations.json")


def test_scene_graph(tmp_path: Path) -> None:
    objects = [
        {"names": ["cat", "animal"], "bbox": {"x": 10, "y": 20, "w": 30, "h": 40}},
        {"names": ["sofa"], "bbox": {"x": 0, "y": 30, "w": 90, "h": 60}},
    ]
    relations = [
        {"relationship": "on", "objects": [0, 1], "text": ["cat", "on", "sofa"]},
        {"relationship": "on", "objects": [0, 7]},
        {"relationship": "on", "objects": [0, -1]},
    ]
    picture = {
        "filename": "1.jpg",
        "width": 200,
        "height": 100,
        "objects": objects,
        "relationships": relations,
    }
    path = tmp_path / "sg_train_annotations.json"
    path.write_text(json.dumps([picture, {"filename": "2.jpg"}]))
    triples, rejections = read("scene_graph", path)
    assert len(triples) == 1
    for size, expected in ((("200", 100.0), (200, 100)), ((None, 100), None), ((0, 0), None)):
        changed = picture | {"width": size[0], "height": size[1]}
        path.write_text(json.dumps([changed, changed | {"relationships": None}, [1]]))
        again, rejected = read("scene_graph", path)
        assert (again[0].size, rejected.counts["malformed picture"]) == (expected, 2)
    assert triples[0][:6] == ("1.jpg", "cat", (10, 20, 40, 60), "on", "sofa", (0, 30, 90, 90))
    assert triples[0].size == (200, 100)
    assert rejections.counts == {"malformed row": 2, "malformed picture": 1}


def test_spatialsense(tmp_path: Path) -> None:
    def relation(label: bool, predicate: str = "to the left of") -> dict[str, Any]:
        return {
            "predicate": predicate,
            "label": label,
            "subject": {"name": "cat", "bbox": [226, 449, 33, 271], "x": 1, "y": 2},
            "object": {"name": "mirror", "bbox": [0, 345, 160, 280], "x": 1, "y": 2},
        }

    picture = {
        "url": "https://some.host/3543/5704634119_8b8ccf3229.jpg",
        "height": 500,
        "width": 281,
        "split": "valid",
        "annotations": [relation(True), relation(False), {"label": True}],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([picture]))
    triples, rejections = read("spatialsense", path)
    assert len(triples) == 1
    assert triples[0].image == "5704634119_8b8ccf3229.jpg"
    assert triples[0].subject_box == (33, 226, 271, 449)
    assert triples[0].split == "val"
    assert rejections.counts == {"labelled false": 1, "malformed row": 1}


@pytest.mark.parametrize(
    ("subject", "object_", "relation"),
    [
        ((0, 0, 10, 10), (0, 30, 10, 60), "above"),
        ((0, 30, 10, 60), (0, 0, 10, 10), "below"),
        ((0, 0, 10, 10), (12, 2, 22, 12), "next to"),
        ((0, 0, 10, 10), (40, 2, 50, 12), "left of"),
        ((40, 2, 50, 12), (0, 0, 10, 10), "right of"),
        ((20, 20, 30, 30), (0, 0, 90, 90), "inside"),
        ((0, 0, 10, 10), (12, 12, 22, 22), "near"),
        ((0, 0, 10, 10), (60, 60, 70, 70), None),
        ((0, 0, 10, 10), (5, 5, 15, 15), None),
        ((0, 0, 90, 90), (20, 20, 30, 30), None),
    ],
)
def test_coco_rule(subject: Any, object_: Any, relation: str | None) -> None:
    assert geometric_relation(subject, object_) == relation


def test_coco_folder(tmp_path: Path) -> None:
    images, annotations = [], []
    for i in range(12):
        write_photo(tmp_path / f"{i}.jpg", i)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "width": 240, "height": 240})
        for k, box in enumerate(([10, 10, 50, 50], [70, 10, 50, 50], [10, 120, 50, 60], [20, 20, 8, 8])):
            annotations.append(
                {"id": 4 * i + k + 1, "image_id": i + 1, "category_id": 1 + k % 2, "bbox": box}
            )
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "train.json").write_text(json.dumps(content))
    data = load_data(config("data=coco", f"data.dir={tmp_path}", "relations=all10"))
    assert set(data.train.relation) <= {"next to", "above", "below"}
    assert data.train.has_photo.all()
    assert not set(data.train.image) & set(data.splits["val"].image)


def test_every_kind_of_bad_pair_is_counted(tmp_path: Path) -> None:
    write_vrd(tmp_path, 30, photos=25)
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    good = content["0.jpg"][0]

    def changed(**parts: Any) -> dict[str, Any]:
        return good | parts

    content["0.jpg"] += [
        good,
        changed(predicate=1),
        changed(subject={"category": 0, "bbox": [10, 10, 5, 50]}),
        changed(subject={"category": 0, "bbox": [400, 500, 400, 500]}),
        changed(subject={"category": 0, "bbox": [10, float("nan"), 5, 50]}),
        changed(object={"category": 0, "bbox": [100, 300, 100, 300]}),
        changed(predicate=6),
    ]
    path.write_text(json.dumps(content))
    data = load_data(config("data=vrd", f"data.dir={tmp_path}"))
    assert data.rejections.counts == {
        "repeated": 1,
        "no spatial relation": 1,
        "box without area": 1,
        "box outside the picture": 1,
        "box is no numbers": 1,
        "relation not chosen": 1,
    }
    assert data.notes["boxes_cut_at_border"] == 1
    assert data.notes["pictures_without_photo"] == 5
    assert (
        sum(part.subject_box.max() <= 240 or not part.size_known.all() for part in data.splits.values()) >= 1
    )
    assert "rows rejected" in data.summary()
    required = load_data(config("data=vrd", f"data.dir={tmp_path}", "data.photos=required"))
    assert required.rejections.counts["missing photo"] == 15
    assert all(part.has_photo.all() for part in required.splits.values())
    none = load_data(config("data=vrd", f"data.dir={tmp_path}", "data.photos=none"))
    assert not any(part.has_photo.any() for part in none.splits.values())


def test_synonyms_are_a_switch(tmp_path: Path) -> None:
    write_vrd(tmp_path, 30, photos=0)
    with_, without = (
        load_data(config("data=vrd", f"data.dir={tmp_path}", f"data.synonyms={value}"))
        for value in ("true", "false")
    )
    assert "below" in with_.train.relation
    assert "below" not in without.train.relation  # it is called "beneath" here
    assert without.notes["relations_without_training_pairs"] == ["below"]
    assert "no training pair of “below”: it cannot be predicted" in without.summary()


def test_splits_are_by_picture_and_stay_when_pictures_come(tmp_path: Path) -> None:
    few, many = (
        load_data(config("data=vrd", f"data.dir={write_vrd(tmp_path / str(n), n, 0)}")) for n in (60, 90)
    )
    for data in (few, many):
        images = [set(part.image) for part in data.splits.values()]
        assert len(images) == 3
        assert len(set.union(*images)) == sum(map(len, images))
    for name, part in few.splits.items():
        assert set(part.image) <= set(many.splits[name].image)


def test_folds_cover_every_picture_once(tmp_path: Path) -> None:
    write_vrd(tmp_path, 30, photos=0)
    tests = []
    for fold in range(3):
        data = load_data(config("data=vrd", f"data.dir={tmp_path}", "data.folds=3", f"data.fold={fold}"))
        tests.append(set(data.splits["test"].image))
        assert not tests[-1] & (set(data.train.image) | set(data.splits["val"].image))
    assert len(set.union(*tests)) == sum(map(len, tests)) == 30


def test_declared_splits_and_files_by_name(tmp_path: Path) -> None:
    write_vrd(tmp_path, 40, photos=0)
    content = json.loads((tmp_path / "annotations.json").read_text())
    for name, some in (("annotations_train.json", range(30)), ("annotations_test.json", range(30, 40))):
        (tmp_path / name).write_text(json.dumps({f"{i}.jpg": content[f"{i}.jpg"] for i in some}))
    data = load_data(config("data=vrd", f"data.dir={tmp_path}"))
    assert set(data.splits["test"].image) == {f"{i}.jpg" for i in range(30, 40)}
    # A picture in both files is a leak, and the run does not start.
    moved = content["3.jpg"][0] | {"object": {"category": 0, "bbox": [20, 60, 20, 60]}}
    (tmp_path / "annotations_test.json").write_text(json.dumps({"3.jpg": [moved]}))
    with pytest.raises(NearfarError, match="Split leak"):
        load_data(config("data=vrd", f"data.dir={tmp_path}", "data.val_fraction=0.3"))


def test_photos_are_found_below_the_folder_also_under_another_ending(tmp_path: Path) -> None:
    write_vrd(tmp_path, 20, photos=0)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_photo(tmp_path / "deep" / "er" / "3.png", 0)
    data = load_data(config("data=vrd", f"data.dir={tmp_path}"))
    assert {name for part in data.splits.values() for name in part.photos} == {"3.jpg"}


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", b"half"])
def test_a_damaged_photo_costs_the_pixels_of_its_pairs(tmp_path: Path, content: bytes) -> None:
    write_vrd(tmp_path, 20)
    photo = tmp_path / "images" / "3.jpg"
    photo.write_bytes(photo.read_bytes()[:400] if content == b"half" else content)
    data = load_data(config("data=vrd", f"data.dir={tmp_path}"))
    assert data.rejections.counts["damaged photo"] == 1
    assert sum(len(part) for part in data.splits.values()) == sum(
        len(part)
        for part in load_data(config("data=vrd", f"data.dir={tmp_path}", "data.photos=none")).splits.values()
    )
    assert sum(len(part.photos) for part in data.splits.values()) == 19
    assert "1 annotated pictures without a photo that can be used" in data.summary()
    required = load_data(config("data=vrd", f"data.dir={tmp_path}", "data.photos=required"))
    assert required.rejections.counts["missing photo"] == 3


def write_scene_graph(folder: Path, n: int = 20, **size: int) -> Path:
    pictures = [
        {
            "filename": f"{i}.jpg",
            **size,
            "objects": [
                {"names": ["cup"], "bbox": {"x": 10, "y": 20 + i, "w": 50, "h": 60}},
                {"names": ["table"], "bbox": {"x": 5, "y": 90, "w": 100, "h": 100}},
            ],
            "relationships": [{"objects": [0, 1], "relationship": ["on", "above"][i % 2]}],
        }
        for i in range(n)
    ]
    (folder / "sg_train_annotations.json").write_text(json.dumps(pictures))
    return folder


def test_a_photo_of_a_different_size_is_not_cropped(tmp_path: Path) -> None:
    write_scene_graph(tmp_path, width=1024, height=768)
    for i in range(20):
        write_photo(tmp_path / f"{i}.jpg", i, (1024 if i == 3 else 240, 240))
    data = load_data(config("data=scene_graph", f"data.dir={tmp_path}"))
    assert data.rejections.counts["photo of a different size"] == 20
    assert "240 × 240 in truth, 1024 × 768 in the file" in data.summary()
    assert not any(part.photos for part in data.splits.values())
    assert {tuple(size) for part in data.splits.values() for size in part.size.tolist()} == {(1024, 768)}


def test_a_thumbnail_is_known_by_its_boxes_where_no_size_is_stated(tmp_path: Path) -> None:
    write_vrd(tmp_path, 20)
    for i in range(5):
        write_photo(tmp_path / "images" / f"{i}.jpg", i, (60, 60))
    data = load_data(config("data=vrd", f"data.dir={tmp_path}"))
    assert data.rejections.counts["photo that is too small for its boxes"] == 5
    assert sum(len(part.photos) for part in data.splits.values()) == 15


def test_of_two_photos_of_one_name_none_is_taken_without_a_word(tmp_path: Path) -> None:
    write_scene_graph(tmp_path, width=240, height=240)
    for folder, side in (("a", 240), ("thumbs", 120)):
        (tmp_path / folder).mkdir()
        for i in range(20):
            write_photo(tmp_path / folder / f"{i}.jpg", i, (side, side))
    data = load_data(config("data=scene_graph", f"data.dir={tmp_path}"))
    photos = [photo for part in data.splits.values() for photo in part.photos.values()]
    assert {photo.path.parent.name for photo in photos} == {"a"}  # type: ignore[attr-defined]
    assert data.notes["pictures_of_several_files"] == 20
    assert "not thumbs/0.jpg" in data.summary()
    write_scene_graph(tmp_path, width=0, height=0)  # no size: nothing tells which of them
    unknown = load_data(config("data=scene_graph", f"data.dir={tmp_path}"))
    assert unknown.rejections.counts["several photos of one name"] == 20
    assert not any(part.photos for part in unknown.splits.values())
    named = load_data(config("data=scene_graph", f"data.dir={tmp_path}", f"data.images={tmp_path}/a"))
    assert len(named.rejections) == 0, "the advice works"
    assert sum(len(part.photos) for part in named.splits.values()) == 20


def test_coco_pictures_of_one_name_in_two_splits(tmp_path: Path) -> None:
    boxes = [[10, 10, 50, 50], [70, 10, 50, 50], [10, 120, 50, 60]]
    for k, split in enumerate(("train", "valid", "test")):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for i in range(4):
            write_photo(tmp_path / split / f"{i}.jpg", 4 * k + i)
            images.append({"id": i, "file_name": f"{i}.jpg"})
            annotations += [{"image_id": i, "category_id": 1, "bbox": box} for box in boxes]
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]}
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    data = load_data(config("data=coco", f"data.dir={tmp_path}", "relations=all10"))
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert {photo.path.parent.name for photo in data.splits[split].photos.values()} == {folder}  # type: ignore[attr-defined]
        assert len(data.splits[split].photos) == 4
    (tmp_path / "thumbs").mkdir()
    (tmp_path / "person_keypoints_train.json").write_bytes(
        (tmp_path / "train" / "_annotations.coco.json").read_bytes()
    )
    write_photo(tmp_path / "thumbs" / "1.jpg", 0, (20, 20))
    again = load_data(config("data=coco", f"data.dir={tmp_path}", "relations=all10"))
    assert again.notes["remarks"][0].startswith("not read: person_keypoints_train.json")
    assert "files of one name in several folders (first: " in again.summary()


def test_scenes_hold_classes_out_and_keep_boxes_inside() -> None:
    triples, photos = composed_scenes(60, ALL10)
    assert {triple.predicate for triple in triples} == set(ALL10)
    for triple in triples:
        kinds = {triple.subject, triple.object}
        assert kinds <= (set(HELD_OUT) if triple.split == "test" else set(THINGS) - set(HELD_OUT))
        for left, top, right, bottom in (triple.subject_box, triple.object_box):
            assert 0 <= left < right - 4
            assert 0 <= top < bottom - 4
            assert right <= WIDTH
            assert bottom <= HEIGHT
    pixels = photos["scene 3"].read()
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(pixels, photos["scene 3"].read())
    assert photos["scene 3"].key() != photos["scene 4"].key()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=vrd"], "give data.dir=FOLDER"),
        (["data=vrd", "data.dir=/nowhere"], "no such folder"),
        (["data=vrd", "data.train=/nowhere.json"], "no such file"),
        (["data=scene_graph", "data.dir=."], r"there is no sg_train_annotations\.json"),
    ],
)
def test_missing_files_are_named(overrides: list[str], message: str, tmp_path: Path) -> None:
    overrides = [
        o.replace("data.dir=.", f"data.dir={tmp_path}") if o == "data.dir=." else o for o in overrides
    ]
    with pytest.raises(NearfarError, match=message):
        load_data(config(*overrides))


@pytest.mark.parametrize("content", ["", "[1, 2", "[]", '{"a.jpg": []}', "\xff\xfe"])
def test_broken_files_are_named(tmp_path: Path, content: str) -> None:
    write_vrd(tmp_path, 3, photos=0)
    (tmp_path / "annotations.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(NearfarError, match=r"annotations\.json"):
        load_data(config("data=vrd", f"data.dir={tmp_path}"))


@pytest.mark.data
def test_real_annotations() -> None:
    folder = Path(os.environ.get("NEARFAR_DATA", "/nowhere")) / "vrd"
    if not folder.is_dir():
        pytest.skip("NEARFAR_DATA is not set")
    data = load_data(config("data=vrd", f"data.dir={folder}", "data.synonyms=false"))
    total = sum(len(part) for part in data.splits.values())
    assert (
        total + data.rejections.counts["repeated"] + data.rejections.counts.get("box without area", 0) == 3057
    )
    assert sum(len(part.photos) for part in data.splits.values()) in range(25, 30)
