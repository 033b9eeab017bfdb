"""placeholder"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nearfar.data.rejections import Rejections
from nearfar.systems.relations.records import Triple

FILES = (
    ("train.json", "train2017.json", "instances_train2017.json"),
    ("val.json", "val2017.json", "instances_val2017.json"),
    ("test.json",),
    ("annotations.json",),
)


def read(path: Path, split: str | None, rejections: Rejections) -> Iterator[Triple]:
    yield from ()
