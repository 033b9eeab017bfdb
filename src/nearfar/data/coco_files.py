"""Where exporters put the files of a data set in COCO format, and the pictures of each."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nearfar.data.picture_files import PictureFiles, split_in
from nearfar.data.split_files import SPLIT_NAMES
from nearfar.errors import NearfarError

__all__ = ["coco_files", "given_files", "picture_files"]

_DEPTH = 3  # folders below data.dir that are looked into for files
#: of COCO itself: what these files hold are no boxes
_NO_BOXES = ("captions", "image_info", "panoptic")
_BESIDE = ("annotations", "labels")  # folders that lie beside that of the pictures
_SHOWN = 8


def coco_files(folder: str | Path, say: Callable[[str], None] | None = None) -> dict[str, Path]:
    """The files of a data folder by split, wherever up to three folders below it they lie.

    Names decide: that of the file (``train.json``, ``instances_val2017.json``, ``annotations/instances_train.json``),
    or else that of its folder (``valid/_annotations.coco.json``, ``test/labels.json``). A file that names no split
    (``result.json``, ``labels.json``, ``annotations/instances_default.json``) is "whole" where there is no file for
    ``train``. Beside ``instances_…`` those called ``person_keypoints_…``, ``captions_…`` and the like are not read, and
    ``say`` tells of each.

    Raises:
        NearfarError: no such folder, no file with boxes, several files that could be one split.
    """
    folder = Path(folder)
    if folder.is_file():
        how = (
            "unpack it first" if folder.suffix.lower() != ".json" else f"name a file with data.train={folder}"
        )
        raise NearfarError(f"data.dir={folder} is a file, not a folder: {how}.")
    if not folder.is_dir():
        raise NearfarError(f"data.dir={folder}: no such folder.")
    json_files = _json_files(folder)
    chosen: dict[str, Path] = {}
    for split in (*SPLIT_NAMES, "whole"):
        paths = [path for path in json_files if (_split(path, folder) or "whole") == split]
        best = _best(paths, whole=split == "whole")
        if len(best) > 1 and not (split == "whole" and "train" in chosen):
            what = "train" if split == "whole" else split
            names = ", ".join(str(path.relative_to(folder)) for path in best[:_SHOWN])
            raise NearfarError(
                f"data.dir={folder}: several files could be {what}: {names}. Name the files with data.train=FILE, "
                "data.val=FILE, data.test=FILE; the pictures' folder is data.images=FOLDER."
            )
        if best and not (split == "whole" and "train" in chosen):
            chosen[split] = best[0]
    if "train" not in chosen and "whole" not in chosen:
        raise NearfarError(_nothing(folder, json_files))
    unread = [
        path
        for path in json_files
        if path not in chosen.values() and _has_words(path, "images", "annotations")
    ]
    if unread and say is not None:
        names = ", ".join(str(path.relative_to(folder)) for path in unread[:_SHOWN])
        say(f"not read: {names}{' …' * (len(unread) > _SHOWN)} (data.train=FILE reads a file by name)")
    return chosen


def given_files(data: Any) -> dict[str, Path]:
    """The files that ``data.train``, ``data.val`` and ``data.test`` name; empty where none is named.

    Raises:
        NearfarError: a file that is missing, a file for val or test and none to learn from.
    """
    given = {name: Path(str(data[name])) for name in SPLIT_NAMES if data[name] is not None}
    for split, path in given.items():
        if not path.is_file():
            raise NearfarError(f"data.{split}={path}: no such file.")
    if given and "train" not in given:
        raise NearfarError("data.val or data.test is given, but no data.train to learn from.")
    return given


def picture_files(path: Path, images: Path | None = None, folder: Path | None = None) -> PictureFiles:
    """The pictures of one file: those in ``images``, or else wherever exporters put them, below ``folder``.

    From the file's own folder upwards these are ``images/NAME``, ``NAME``, ``images``, ``data`` and the folder itself,
    where NAME is what the file's name says ("train2017" of ``instances_train2017.json``).

    Raises:
        NearfarError: no such folder ``images``.
    """
    if images is not None:
        if not images.is_dir():
            raise NearfarError(f"{images}: no such folder of pictures (data.images).")
        return PictureFiles(images, [images], given=True)
    own = path.parent
    if folder is None:
        top = own.parent if own.name.lower() in _BESIDE else own
    else:
        inside = own.resolve().is_relative_to(folder.resolve())
        own = folder / own.resolve().relative_to(folder.resolve()) if inside else folder
        top = folder
    split = _split(own / path.name, top)
    names = ["_".join(path.stem.split("_")[1:]) or path.stem, path.stem]
    names += [own.name] if own != top and own.name.lower() not in _BESIDE else []
    names += [*SPLIT_NAMES[split]] if split else ["default"]
    places = [own, *(place for place in own.parents if place.is_relative_to(top))]
    roots = []
    for place in places:
        for name in dict.fromkeys(names):
            roots += [place / "images" / name, place / name, place / "data" / name]
        roots += [place / "images", place / "data", place]
    return PictureFiles(top, roots, split)


def _json_files(folder: Path) -> list[Path]:
    paths = []
    for depth in range(_DEPTH):
        paths += sorted(folder.glob("*/" * depth + "*.[jJ][sS][oO][nN]"))
    hidden = (".", "__MACOSX")
    shown = [
        path
        for path in paths
        if path.is_file() and not any(part.startswith(hidden) for part in path.relative_to(folder).parts)
    ]
    by_place: dict[Path, Path] = {}  # links may lead to one file by several ways
    for path in shown:
        by_place.setdefault(path.resolve(), path)
    return list(by_place.values())


def _split(path: Path, folder: Path) -> str | None:
    """The split of a file by its own name, or by the nearest of its folders below ``folder`` that names one."""
    names = [path.stem, *reversed(path.relative_to(folder).parts[:-1])]
    return next((split for name in names if (split := split_in(name)) is not None), None)


def _best(paths: list[Path], whole: bool) -> list[Path]:
    """Of the files for one split those that are most likely meant."""
    boxes = [path for path in paths if _may_hold_boxes(path)]
    for prefix in ("instances", ""):
        first = [path for path in boxes if path.stem.lower().startswith(prefix)]
        if prefix == "":
            others = [p for p in first if not p.stem.lower().startswith(("person_keypoints", "stuff"))]
            first = others or first
        if first:
            return first
    # Nothing looks like boxes: a file by the right name is read all the same, and its error says what is wrong.
    named = [path for path in paths if not path.stem.lower().startswith(_NO_BOXES)]
    return named[:1] if whole and len(named) == 1 else [path for path in named if split_in(path.stem)]


def _may_hold_boxes(path: Path) -> bool:
    """Whether the words of a COCO file with boxes or outlines occur in it, without reading it as JSON."""
    if path.stem.lower().startswith(_NO_BOXES) or not _has_words(path, "images", "annotations"):
        return False
    return _has_words(path, "bbox") or _has_words(path, "segmentation")


def _has_words(path: Path, *words: str) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        utf16 = text[:2] in (b"\xff\xfe", b"\xfe\xff")  # words are not to be found so
        return utf16 or all(text.find(f'"{word}"'.encode()) >= 0 for word in words)


def _nothing(folder: Path, json_files: list[Path]) -> str:
    names = ", ".join(str(path.relative_to(folder)) for path in json_files[:_SHOWN]) or "no .json file"
    few = [path.name for path in json_files if path.stem.lower().startswith(_NO_BOXES)]
    hint = f" {few[0]} holds no boxes: instances_….json does." if few else ""
    return (
        f"data.dir={folder}: there is no train.json (COCO format), and none for train in a folder below. In it: "
        f"{names}.{hint} Name a file with data.train=FILE and its pictures with data.images=FOLDER."
    )
