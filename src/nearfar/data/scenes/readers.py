"""Readers of four layouts of annotated relations (COCO, scene graphs, SpatialSense, VRD), all into triples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.coco import CocoSplit, read_coco
from nearfar.data.coco_files import coco_files
from nearfar.data.files import Json
from nearfar.data.images import Box
from nearfar.data.rejections import Rejections
from nearfar.data.scenes.triples import Triple
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "LAYOUTS",
    "SCENE_GRAPH_FILES",
    "SPATIALSENSE_FILES",
    "VRD_FILES",
    "Layout",
    "Places",
    "annotation_files",
    "coco_triples",
    "corner_box",
    "geometric_relation",
    "name_of",
    "read_json",
    "rows_of",
    "scene_graph_triples",
    "spatialsense_triples",
    "stated_size",
    "vrd_triples",
    "yyxx_box",
]


@dataclass
class Places:
    """Where photos are: the folder given for them, and the data folder. ``remarks`` collects remarks of readers."""

    images: Path | None = None
    folder: Path | None = None
    remarks: list[str] = field(default_factory=list)


def rows_of(values: object) -> list[Any]:
    """A list as it is; a TypeError for anything else, such as a text, that could be iterated by mistake."""
    if not isinstance(values, list):
        raise TypeError(f"a list is needed, not {type(values).__name__}")
    return values


def stated_size(picture: Json) -> tuple[float, float] | None:
    """(width, height) of a picture, numbers in quotes as well; None where one is missing, null or 0."""
    width, height = picture.get("width"), picture.get("height")
    if width in (None, "", 0) or height in (None, "", 0):
        return None
    return float(width), float(height)


def read_json(path: Path, kind: type, what: str) -> Any:
    """The content of a JSON file, which must be a ``kind`` (dict or list) with ``what`` in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise NearfarError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise NearfarError(f"{path}: not valid JSON ({error}). Is it complete?") from None
    if type(content) is not kind:
        wanted = "an object" if kind is dict else "a list"
        raise NearfarError(
            f"{path}: {wanted} with {what} is needed, but it holds a {type(content).__name__}."
        )
    return content


def yyxx_box(values: object) -> Box:
    """(left, top, right, bottom) of [y0, y1, x0, x1], the order of VRD and SpatialSense."""
    y0, y1, x0, x1 = _four(values)
    return x0, y0, x1, y1


def corner_box(values: Mapping[str, object]) -> Box:
    """(left, top, right, bottom) of a mapping with x, y, w, h."""
    x, y, w, h = _four([values[name] for name in "xywh"])
    return x, y, x + w, y + h


def _four(values: object) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or len(values) != 4:
        raise ValueError(f"a box has four numbers, not {values!r}")
    return tuple(float(value) for value in values)


def name_of(names: Sequence[str], index: object, what: str) -> str:
    """The name under an index of a list beside the annotations."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(names):
        raise ValueError(f"{what} {index!r} is none of the {len(names)} that are named")
    return str(names[index])


#: pairs taken of one picture: a street with forty people has 780
PAIRS_PER_IMAGE = 12
_SMALLEST = 16.0  # pixels of a box's shorter side


def coco_triples(path: Path, split: str | None, rejections: Rejections, places: Places) -> Iterator[Triple]:
    """Pairs of boxes whose relation the rule decides, at most 12 of a picture; crowds and tiny boxes are left out.

    Each two boxes are taken once. Their position in the file decides which is the subject, and which pairs are taken of
    more than 12.
    """
    coco = read_coco(path, places.images, folder=places.folder)
    rejections.extend(coco.rejections)
    places.remarks += coco.remarks()
    row = 0
    for position, picture in enumerate(coco.images):
        at = _usable(coco, position)
        related = []
        for a, b in combinations(at, 2):
            first, second = (a, b) if (a + b) % 2 else (b, a)
            boxes = _corners(coco, first), _corners(coco, second)
            relation = geometric_relation(*boxes)
            if relation is not None:
                related.append((first, second, boxes, relation))
        related.sort(key=lambda pair: content_key(picture.name, int(pair[0]), int(pair[1])))
        for first, second, boxes, relation in related[:PAIRS_PER_IMAGE]:
            row += 1
            names = [coco.categories[int(coco.label[i])] for i in (first, second)]
            size = (float(picture.width), float(picture.height))
            yield Triple(
                picture.name, names[0], boxes[0], relation, names[1], boxes[1], row, size, split, picture.path
            )


def geometric_relation(subject: Box, object_: Box) -> str | None:
    """The relation of two boxes by a rule; None where boxes alone do not decide it.

    "inside": nine tenths of the subject lie in the object, which is at least twice as large. Other boxes that overlap
    by more than a tenth of the smaller have no name. Of the rest those that are further apart in height than in
    breadth are "above" or "below"; side by side they are "next to" up to a gap of half their mean width, and
    "left of" or "right of" beyond; neither above nor beside each other they are "near" up to such a gap.

    >>> geometric_relation((0, 0, 10, 10), (0, 30, 10, 60)), geometric_relation((0, 0, 10, 10), (12, 2, 22, 12))
    ('above', 'next to')
    >>> geometric_relation((0, 0, 10, 10), (5, 5, 15, 15)) is None
    True
    """
    a, b = np.array(subject), np.array(object_)
    sides = [box[2:] - box[:2] for box in (a, b)]
    areas = [float(side.prod()) for side in sides]
    reach = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])  # below 0: a gap
    shared = float(np.maximum(reach, 0).prod())
    if shared >= 0.9 * areas[0] and areas[1] >= 2 * areas[0]:
        return "inside"
    if shared > 0.1 * min(areas):
        return None
    half = (sides[0] + sides[1]) / 4
    across, down = ((b[:2] + b[2:] - a[:2] - a[2:]) / 2).tolist()
    if reach[0] > 0 and reach[0] >= reach[1]:
        return "above" if down > 0 else "below"
    if reach[1] > 0:
        if -reach[0] <= half[0]:
            return "next to"
        return "left of" if across > 0 else "right of"
    return "near" if (-reach <= half).all() else None


def _usable(coco: CocoSplit, position: int) -> list[int]:
    at = range(len(coco.boxes))[coco.of_image(position)]
    return [i for i in at if not coco.crowd[i] and coco.boxes[i, 2:].min() >= _SMALLEST]


def _corners(coco: CocoSplit, i: int) -> Box:
    left, top, width, height = coco.boxes[i].tolist()
    return left, top, left + width, top + height


SCENE_GRAPH_FILES = {
    "train": "sg_train_annotations.json",
    "val": "sg_val_annotations.json",
    "test": "sg_test_annotations.json",
}


def scene_graph_triples(
    path: Path, split: str | None, rejections: Rejections, places: Places
) -> Iterator[Triple]:
    """Every annotated relation; an object of several names goes by its first."""
    row = 0
    for place, picture in enumerate(read_json(path, list, "pictures")):
        try:
            image = str(picture["filename"])
            size = stated_size(picture)
            objects, relations = picture["objects"], rows_of(picture["relationships"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            rejections.add("malformed picture", place + 1, "", f"{type(error).__name__}: {error}")
            continue
        for relation in relations:
            row += 1
            try:
                first, second = relation["objects"]
                subject, subject_box = _object(objects, first)
                other, other_box = _object(objects, second)
                predicate = str(relation["relationship"])
            except (KeyError, TypeError, ValueError, IndexError) as error:
                rejections.add("malformed row", row, image, f"{type(error).__name__}: {error}")
                continue
            yield Triple(image, subject, subject_box, predicate, other, other_box, row, size, split)


def _object(objects: Sequence[Json], index: int) -> tuple[str, Box]:
    if index < 0:
        raise IndexError(f"object {index}")
    named = objects[index]
    return str(named["names"][0]), corner_box(named["bbox"])


SPATIALSENSE_FILES = {"whole": "annotations.json"}
_SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}


def spatialsense_triples(
    path: Path, split: str | None, rejections: Rejections, places: Places
) -> Iterator[Triple]:
    """The relations that hold (``label`` true); boxes are [y0, y1, x0, x1], pictures state size and split."""
    row = 0
    for place, picture in enumerate(read_json(path, list, "pictures")):
        try:
            image = str(picture["url"]).rstrip("/").rsplit("/", 1)[-1]
            size = stated_size(picture)
            own, relations = split or _SPLITS.get(str(picture.get("split"))), rows_of(picture["annotations"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            rejections.add("malformed picture", place + 1, "", f"{type(error).__name__}: {error}")
            continue
        for relation in relations:
            row += 1
            try:
                if not relation["label"]:
                    rejections.add("labelled false", row, relation["predicate"])
                    continue
                subject, other = relation["subject"], relation["object"]
                yield Triple(
                    image,
                    str(subject["name"]),
                    yyxx_box(subject["bbox"]),
                    str(relation["predicate"]),
                    str(other["name"]),
                    yyxx_box(other["bbox"]),
                    row,
                    size,
                    own,
                )
            except (KeyError, TypeError, ValueError) as error:
                rejections.add("malformed row", row, image, f"{type(error).__name__}: {error}")


VRD_FILES = {
    "train": "annotations_train.json",
    "val": "annotations_val.json",
    "test": "annotations_test.json",
    "whole": "annotations.json",
}


def vrd_triples(path: Path, split: str | None, rejections: Rejections, places: Places) -> Iterator[Triple]:
    """Every annotated relation; rows are counted over the file.

    ``predicates.json`` and ``objects.json`` beside the file have the names. Picture sizes are not in it.
    """
    pictures = read_json(path, dict, "the relations of each picture")
    predicates, objects = (_names(path.with_name(name)) for name in ("predicates.json", "objects.json"))
    row = 0
    for image, relations in pictures.items():
        if not isinstance(relations, list):
            rejections.add("relations of a picture are no list", None, image)
            continue
        for relation in relations:
            row += 1
            try:
                yield Triple(
                    image,
                    name_of(objects, relation["subject"]["category"], "category"),
                    yyxx_box(relation["subject"]["bbox"]),
                    name_of(predicates, relation["predicate"], "predicate"),
                    name_of(objects, relation["object"]["category"], "category"),
                    yyxx_box(relation["object"]["bbox"]),
                    row,
                    split=split,
                )
            except (KeyError, TypeError, ValueError) as error:
                rejections.add("malformed row", row, image, str(error))


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise NearfarError(f"{path} is missing: VRD annotations are indices into the names that it lists.")
    return [str(name) for name in read_json(path, list, "names")]


Reader = Callable[[Path, str | None, Rejections, Places], Iterator[Triple]]


@dataclass(frozen=True)
class Layout:
    """How a data set is laid out: its reader, and how its annotation files are called.

    ``files``: the usual name by split ("whole": a file with every split, or with none). ``find`` looks for the files
    where names are not fixed.
    """

    read: Reader
    files: Mapping[str, str] = field(default_factory=dict)
    find: Callable[[Path, Callable[[str], None]], dict[str, Path]] | None = None


LAYOUTS: dict[str, Layout] = {
    "vrd": Layout(vrd_triples, VRD_FILES),
    "scene_graph": Layout(scene_graph_triples, SCENE_GRAPH_FILES),
    "spatialsense": Layout(spatialsense_triples, SPATIALSENSE_FILES),
    "coco": Layout(coco_triples, find=coco_files),
}


def annotation_files(
    layout: str,
    folder: Path | None,
    given: Mapping[str, Path],
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Path]:
    """The annotation files by split, as ``given`` or from the folder ("whole": one file with every split, or none).

    Raises ``NearfarError`` if a file or the folder is missing, or if there is nothing to train on.
    """
    if layout not in LAYOUTS:
        raise NearfarError(f"data.layout={layout}: {nearest_name(str(layout), LAYOUTS)}")
    if given:
        return dict(given)
    known = LAYOUTS[layout]
    expected = (
        " or ".join(known.files[name] for name in ("train", "whole") if name in known.files) or "train.json"
    )
    if folder is None:
        raise NearfarError(
            f"data={layout} reads your files: give data.dir=FOLDER (with {expected}) or data.train=FILE."
        )
    if not folder.is_dir():
        raise NearfarError(f"data.dir={folder}: no such folder.")
    if known.find is not None:
        return known.find(folder, say)
    files = {split: folder / name for split, name in known.files.items() if (folder / name).is_file()}
    if "train" in files:
        files.pop("whole", None)
    elif "whole" not in files:
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise NearfarError(
            f"data.dir={folder}: there is no {expected}. In it: {content}. "
            "Name the files with data.train=, data.val=, data.test=."
        )
    return files if "train" in files else {"whole": files["whole"]}
