"""Visual Relationship Detection (Lu et al. 2016): indices into lists of names, boxes [y0, y1, x0, x1]."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError
from nearfar.systems.relations.readers.common import Places, name_of, read_json, yyxx_box
from nearfar.systems.relations.records import Triple

__all__ = ["FILES", "read"]

FILES = {
    "train": "annotations_train.json",
    "val": "annotations_val.json",
    "test": "annotations_test.json",
    "whole": "annotations.json",
}


def read(path: Path, split: str | None, rejections: Rejections, places: Places) -> Iterator[Triple]:
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
