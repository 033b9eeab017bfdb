"""SpatialSense (Yang, Russakovsky & Deng 2019): relations that hold and relations that were proposed and do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nearfar.data.rejections import Rejections
from nearfar.systems.relations.readers.common import Places, read_json, rows_of, stated_size, yyxx_box
from nearfar.systems.relations.records import Triple

__all__ = ["FILES", "read"]

FILES = {"whole": "annotations.json"}
_SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}


def read(path: Path, split: str | None, rejections: Rejections, places: Places) -> Iterator[Triple]:
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
                    rejections.add("said not to hold", row, relation["predicate"])
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
