"""The scene-graph release of VRD, `sg_{train,test}_annotations.json`: objects with boxes, and their relations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nearfar.data.rejections import Rejections
from nearfar.systems.relations.readers.common import Places, corner_box, read_json, rows_of, stated_size
from nearfar.systems.relations.records import Box, Triple

__all__ = ["FILES", "read"]

FILES = {
    "train": "sg_train_annotations.json",
    "val": "sg_val_annotations.json",
    "test": "sg_test_annotations.json",
}


def read(path: Path, split: str | None, rejections: Rejections, places: Places) -> Iterator[Triple]:
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


def _object(objects: Any, index: int) -> tuple[str, Box]:
    if index < 0:
        raise IndexError(f"object {index}")
    found = objects[index]
    return str(found["names"][0]), corner_box(found["bbox"])
