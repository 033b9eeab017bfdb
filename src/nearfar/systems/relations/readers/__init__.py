"""Four layouts of annotated relations, each read into the same triples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfar.data.coco_files import coco_files, given_files
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.relations.readers import coco, scene_graph, spatialsense, vrd
from nearfar.systems.relations.readers.common import Places
from nearfar.systems.relations.records import Triple

__all__ = ["LAYOUTS", "Layout", "Places", "annotation_files"]

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
    "vrd": Layout(vrd.read, vrd.FILES),
    "scene_graph": Layout(scene_graph.read, scene_graph.FILES),
    "spatialsense": Layout(spatialsense.read, spatialsense.FILES),
    "coco": Layout(coco.read, find=coco_files),
}


def annotation_files(layout: str, data: Any, say: Callable[[str], None] = lambda _: None) -> dict[str, Path]:
    """The annotation files by split, as given or found in the folder ("whole": one file with every split, or none).

    Raises ``NearfarError`` if a file or the folder is missing, or if there is nothing to train on.
    """
    if layout not in LAYOUTS:
        raise NearfarError(f"data.layout={layout}: {nearest_name(str(layout), LAYOUTS)}")
    if given := given_files(data):
        return given
    known = LAYOUTS[layout]
    expected = (
        " or ".join(known.files[name] for name in ("train", "whole") if name in known.files) or "train.json"
    )
    if data.dir is None:
        raise NearfarError(
            f"data={layout} reads your files: give data.dir=FOLDER (with {expected}) or data.train=FILE."
        )
    folder = Path(str(data.dir))
    if not folder.is_dir():
        raise NearfarError(f"data.dir={folder}: no such folder.")
    if known.find is not None:
        return known.find(folder, say)
    found = {split: folder / name for split, name in known.files.items() if (folder / name).is_file()}
    if "train" in found:
        found.pop("whole", None)
    elif "whole" not in found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise NearfarError(
            f"data.dir={folder}: there is no {expected}. In it: {there}. "
            "Name the files with data.train=, data.val=, data.test=."
        )
    return found if "train" in found else {"whole": found["whole"]}
