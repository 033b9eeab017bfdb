"""Four layouts of annotated relations, each read into the same triples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.relations.readers import coco, scene_graph, spatialsense, vrd
from nearfar.systems.relations.records import Triple

__all__ = ["LAYOUTS", "Layout", "annotation_files"]

Reader = Callable[[Path, str | None, Rejections], Iterator[Triple]]


@dataclass(frozen=True)
class Layout:
    """How a data set is laid out: its reader, and what its annotation files are called, split by split.

    ``whole`` are names of files that hold every split, or none.
    """

    read: Reader
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    whole: tuple[str, ...]


LAYOUTS: dict[str, Layout] = {
    "vrd": Layout(vrd.read, *vrd.FILES),
    "scene_graph": Layout(scene_graph.read, *scene_graph.FILES),
    "spatialsense": Layout(spatialsense.read, *spatialsense.FILES),
    "coco": Layout(coco.read, *coco.FILES),
}


def annotation_files(layout: str, data: Any) -> dict[str, Path]:
    """The annotation files by split ("whole": one file with every split, or to be split), as given or found in the folder.

    Raises ``NearfarError`` if a file or the folder is missing, or if there is nothing to train on.
    """
    if layout not in LAYOUTS:
        raise NearfarError(f"data.layout={layout}: {nearest_name(str(layout), LAYOUTS)}")
    known = LAYOUTS[layout]
    names = {"train": known.train, "val": known.val, "test": known.test, "whole": known.whole}
    given = {split: Path(str(data[split])) for split in ("train", "val", "test") if data[split] is not None}
    for split, path in given.items():
        if not path.is_file():
            raise NearfarError(f"data.{split}={path}: no such file.")
    if "train" in given:
        return given
    if given:
        raise NearfarError("data.val or data.test is given, but no data.train to learn from.")
    if data.dir is None:
        raise NearfarError(
            f"data={layout} reads your files: give data.dir=FOLDER (with {' or '.join(names['train'] + names['whole'])}), "
            "or data.train=FILE."
        )
    folder = Path(str(data.dir))
    if not folder.is_dir():
        raise NearfarError(f"data.dir={folder}: no such folder.")
    found = {
        split: next((path for name in choices if (path := folder / name).is_file()), None)
        for split, choices in names.items()
    }
    if found["train"] is not None:
        return {split: path for split, path in found.items() if path is not None and split != "whole"}
    if found["whole"] is not None:
        return {"whole": found["whole"]}
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise NearfarError(
        f"data.dir={folder}: none of {', '.join(names['train'] + names['whole'])} is there. In it: {there}. "
        "Name the files with data.train=, data.val=, data.test=."
    )
