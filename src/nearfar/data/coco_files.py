"""The files of a data set in COCO format: where exporters put them, and the boxes in their annotations."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from nearfar.data.files import Json
from nearfar.data.picture_files import PictureFiles, split_in
from nearfar.data.splits import SPLIT_NAMES
from nearfar.errors import NearfarError

__all__ = [
    "JsonObject",
    "NoBoxError",
    "box_of",
    "check_units",
    "coco_files",
    "given_files",
    "picture_files",
    "too_small_for",
]

#: an entry of a JSON file, whose values are checked where they are read
JsonObject: TypeAlias = Json


_LARGEST = 1e9
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_SLACK = 2.0  # pixels by which boxes reach over an edge without a word
_OVER = 0.25  # share of boxes that reach over the right or lower edge from which on units are doubted
_FIT = 0.99  # share of boxes that must fit in other units


class NoBoxError(ValueError):
    """An annotation has no box that can be used; the text is the reason under which it is counted."""


def box_of(row: Mapping[str, object]) -> tuple[list[float], bool]:
    """(left, top, width, height) of an annotation, and whether it is the box around its polygons.

    That box is taken where there is no ``bbox``. Numbers in quotes are numbers.

    Raises:
        NoBoxError: neither a box nor polygons; anything but finite numbers in them.

    >>> box_of({"bbox": ["12.5", 3, 4, 5]})
    ([12.5, 3.0, 4.0, 5.0], False)
    >>> box_of({"segmentation": [[5, 5, 25, 5, 25, 35]]})
    ([5.0, 5.0, 20.0, 30.0], True)
    """
    box, outline = row.get("bbox"), row.get("segmentation")
    if box is None or box == []:
        if isinstance(outline, Mapping):
            raise NoBoxError("no bbox, and a run-length encoded mask")
        if not isinstance(outline, list) or not outline:
            raise NoBoxError("no bbox")
        return _around(outline), True
    if not isinstance(box, list) or len(box) != 4:
        raise NoBoxError("box that is no four numbers")
    return _numbers(box, "box that is no four numbers"), False


def _around(polygons: list[object]) -> list[float]:
    reason = "no bbox, and no polygon of numbers"
    flat = polygons if not isinstance(polygons[0], list) else [v for part in polygons for v in _flat(part)]
    values = _numbers(flat, reason)
    if len(values) < 6 or len(values) % 2:
        raise NoBoxError(reason)
    x, y = values[::2], values[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _flat(part: object) -> list[object]:
    if not isinstance(part, list):
        raise NoBoxError("no bbox, and no polygon of numbers")
    return [v for point in part for v in point] if part and isinstance(part[0], list) else part


def _numbers(values: Sequence[object], reason: str) -> list[float]:
    numbers = []
    for value in values:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
            raise NoBoxError(reason)
        numbers.append(float(value))
    return numbers


def too_small_for(corners: Sequence[Sequence[float]], width: float, height: float) -> bool:
    """Whether most of these boxes (left, top, right, bottom) reach over a picture's edge by a tenth of its side.

    Where no file says how large a picture was when its boxes were drawn, this is how a thumbnail is known.

    >>> too_small_for([(10, 10, 90, 90), (500, 300, 800, 600)], 128, 96)
    False
    >>> too_small_for([(10, 10, 90, 200), (500, 300, 800, 600)], 128, 96)
    True
    """
    box = np.array(corners, np.float64).reshape(-1, 4)
    box = box[np.isfinite(box).all(1) & (box[:, 2:] > box[:, :2]).all(1)]
    over = (box[:, 2:] > 1.1 * np.array([width, height]) + _SLACK).any(1)
    return bool(over.sum() * 2 > len(box))


def check_units(
    path: Path, boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]
) -> Bool[np.ndarray, " m"]:
    """Look for boxes that are no left, top, width, height in pixels; True for those within the first pixel.

    A file is refused if all its boxes lie within the first pixel (shares of the picture), or if a quarter of them
    reaches over the right or lower edge, while 99 of 100 fit as two corners, or as centre and size.

    Raises:
        NearfarError: boxes in other units, with the rule that turns them into those of COCO.
    """
    if not len(boxes):
        return np.zeros(0, bool)
    box, size = np.array(boxes, np.float64), np.array(sizes, np.float64)
    low, extent = box[:, :2], box[:, 2:]
    tiny = ((low >= 0) & (low + extent <= 1)).all(1) & (size > 2).all(1)
    example = ", ".join(f"{value:g}" for value in box[0])
    if tiny.all() or (_fits_shares(box) and (size > 2).all()):
        raise NearfarError(
            f"{path}: the boxes are shares of their pictures (the first is [{example}]), and COCO's are left, top, "
            "width, height in pixels. Multiply them by the pictures' width and height."
        )
    over = ((low + extent) > size + _SLACK).any(1)
    readings = {
        "two corners, [left, top, right, bottom]": _fits(low, extent, size),
        "centre and size": _fits(low - extent / 2, low + extent / 2, size),
    }
    for words, fits in readings.items():
        if over.mean() >= _OVER and fits.mean() >= _FIT:
            first = ", ".join(f"{value:g}" for value in box[over][0])
            raise NearfarError(
                f"{path}: {int(over.sum())} of {len(box)} boxes reach over the edge of their pictures (the first is "
                f"[{first}] in {size[over][0][0]:g} × {size[over][0][1]:g} pixels), and all fit as {words}. COCO's are "
                "left, top, width, height: convert them."
            )
    return np.asarray(tiny)


def _fits_shares(box: Float[np.ndarray, "m 4"]) -> bool:
    """All numbers from 0 to 1 whatever they mean (corners, centres), and not all whole."""
    return bool(((box >= 0) & (box <= 1)).all() and (box % 1 > 0).any())


def _fits(
    low: Float[np.ndarray, "m 2"], high: Float[np.ndarray, "m 2"], size: Float[np.ndarray, "m 2"]
) -> Bool[np.ndarray, " m"]:
    return np.asarray(((low >= -_SLACK) & (high > low) & (high <= size + _SLACK)).all(1))


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


def given_files(data: object) -> dict[str, Path]:
    """The files that ``data.train``, ``data.val`` and ``data.test`` name; empty where none is named.

    Raises:
        NearfarError: a file that is missing, a file for val or test and none to learn from.
    """
    given = {name: Path(str(value)) for name in SPLIT_NAMES if (value := getattr(data, name)) is not None}
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
