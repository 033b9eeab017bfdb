"""Rows of a COCO-format file, one at a time: which pictures and boxes are usable, and in which group they are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearfar.data.coco_files import JsonObject, NoBoxError, box_of
from nearfar.data.picture_files import PictureFile, PictureFiles, check_pictures
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "Categories",
    "CocoImage",
    "Pictures",
    "attribute",
    "group_position",
    "group_values",
    "row_key",
    "usable_boxes",
    "usable_pictures",
    "with_groups",
]

NO_GROUP = -1


@dataclass(frozen=True)
class CocoImage:
    """One picture: its name in the file, where it lies, its size in pixels, its group (−1: none), its bytes' sha256."""

    name: str
    path: Path
    width: int
    height: int
    group: int = NO_GROUP
    digest: str = ""


@dataclass(frozen=True)
class Categories:
    """Names of categories by their ids in the file, and the names that are kept, whose positions are labels."""

    by_id: dict[str, str]
    wanted: list[str]


def row_key(value: object) -> str | None:
    """An id as text, so that 7, 7.0 and "7" are one; None for what can name nothing.

    >>> [row_key(value) for value in (7, 7.0, " 7", "07", "a", 1.5, True, None, "")]
    ['7', '7', '7', '07', 'a', '1.5', None, None, None]
    """
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else str(value)


# -- pictures ------------------------------------------------------------------------------------------------
@dataclass
class Pictures:
    """Usable pictures by id, with their rows.

    ``alias``: ids of rows that are a picture once more. ``left_out``: ids of pictures that were rejected.
    """

    rows: dict[str, tuple[JsonObject, CocoImage]] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    several_files: int = 0
    first_of_several: str = ""

    def key(self, row: Mapping[str, object]) -> str | None:
        """The id of the picture that an annotation belongs to, whether that is usable or not."""
        key = row_key(row.get("image_id"))
        return None if key is None else self.alias.get(key, key)

    def of(self, row: Mapping[str, object]) -> CocoImage | None:
        """The usable picture of an annotation."""
        pair = self.rows.get(self.key(row) or "")
        return None if pair is None else pair[1]


def usable_pictures(
    rows: list[JsonObject],
    files: PictureFiles,
    rejections: Rejections,
    say: Callable[[str], None] | None = None,
) -> Pictures:
    """Each usable picture by its id; the others are counted. Every file is decoded once (`check_pictures`)."""
    pictures = Pictures()
    sought: dict[str, tuple[int, JsonObject, str, tuple[int | None, int | None], PictureFile]] = {}
    names_of: dict[Path, set[str]] = {}
    unsure: set[Path] = set()
    named = _names_by_id(rows)
    for number, row in enumerate(rows, 1):
        key, name = row_key(row.get("id")), row.get("file_name")
        if key is None or not isinstance(name, str) or not name.strip():
            rejections.add("picture without id or file_name", number, row.get("id") if name is None else name)
            continue
        if len(named[key]) > 1:
            pictures.left_out.add(key)
            rejections.add("one id of several pictures", number, name, f"id {key}")
            continue
        if key in sought or key in pictures.left_out:
            rejections.add("repeated picture", number, name, f"id {key}")
            continue
        width, height = _side(row.get("width")), _side(row.get("height"))
        if isinstance(width, str) or isinstance(height, str):
            pictures.left_out.add(key)
            rejections.add("width or height that is no number", number, name)
            continue
        file = files.find(name, None if width is None or height is None else (width, height))
        if file.path is None:
            pictures.left_out.add(key)
            rejections.add(file.reason, number, name, file.detail)
            continue
        sought[key] = number, row, name, (width, height), file
        names_of.setdefault(file.path, set()).add(name)
        if file.shortened:
            unsure.add(file.path)
    taken: dict[Path, str] = {}
    for key, (number, _, name, _, file) in list(sought.items()):
        assert file.path is not None
        if file.path in unsure and len(names_of[file.path]) > 1:
            pictures.left_out.add(key)
            rejections.add("several pictures of one name", number, name, f"each would be {file.path}")
            del sought[key]
        elif file.path in taken:
            pictures.alias[key] = taken[file.path]
            rejections.add("repeated picture", number, name, f"its boxes are those of id {taken[file.path]}")
            del sought[key]
        else:
            taken[file.path] = key
            if file.others:
                pictures.several_files += 1
                pictures.first_of_several = (
                    pictures.first_of_several or f"{file.path}, not {', '.join(file.others)}"
                )
    checked = check_pictures(list(taken), say)
    for (key, (number, row, name, stated, _)), path, seen in zip(sought.items(), taken, checked, strict=True):
        size = (seen.width, seen.height)
        if seen.problem:
            pictures.left_out.add(key)
            rejections.add("unreadable picture", number, name, seen.problem)
        elif any(value not in (None, side) for value, side in zip(stated, size, strict=True)):
            pictures.left_out.add(key)
            turned = ", with its sides exchanged (the camera's orientation?)" if stated == size[::-1] else ""
            words = " × ".join("?" if side is None else str(side) for side in stated)
            detail = f"{size[0]} × {size[1]} in truth, {words} in the file{turned}"
            rejections.add("picture of a different size", number, name, detail)
        else:
            pictures.rows[key] = row, CocoImage(name, path, *size, digest=seen.digest)
    return pictures


def _names_by_id(rows: list[JsonObject]) -> dict[str | None, set[str]]:
    named: dict[str | None, set[str]] = {}
    for row in rows:
        name = row.get("file_name")
        if isinstance(name, str) and name.strip():
            named.setdefault(row_key(row.get("id")), set()).add(name)
    return named


def _side(value: object) -> int | str | None:
    """A stated width or height: None where it is not stated (null, "", 0), a text where it is no number."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.0*)?\s*", value):
        value = float(value)
    if value is None or value == "" or (value == 0 and not isinstance(value, bool)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != value // 1:
        return "no number"
    return int(value)


# -- boxes ---------------------------------------------------------------------------------------------------
@dataclass
class _Kept:
    boxes: list[list[float]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    raw: list[JsonObject] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    clipped: int = 0
    outlines: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def usable_boxes(
    rows: list[JsonObject],
    pictures: Pictures,
    names: Categories,
    rejections: Rejections,
    group_key: str | None = None,
    tiny: Collection[int] = (),
) -> _Kept:
    """The usable boxes in the order of the file; the others are counted, with those at the positions ``tiny``."""
    kept = _Kept()
    positions = {key: position for position, key in enumerate(pictures.rows)}
    labels = {name: label for label, name in enumerate(names.wanted)}
    seen = set[tuple[object, ...]]()
    for number, row in enumerate(rows, 1):
        key, category, shown = pictures.key(row), row_key(row.get("category_id")), row.get("bbox")
        if key is None or key not in positions:
            gone = key is not None and key in pictures.left_out
            reason = "box of a picture that was left out" if gone else "box of a picture that is not there"
            rejections.add(reason, number, shown, f"image_id {row.get('image_id')}")
            continue
        if category is None or category not in names.by_id:
            rejections.add("unknown category", number, shown, f"category_id {row.get('category_id')}")
            continue
        name = names.by_id[category]
        if name not in labels:
            kept.left_out[name] += 1
            continue
        picture = pictures.rows[key][1]
        if number - 1 in tiny:
            reason = "box within the first pixel: a share of the picture?"
            rejections.add(reason, number, shown, f"picture {picture.name}")
            continue
        try:
            box, outline = box_of(row)
            inside = _inside(box, picture)
            crowd = _crowd(row.get("iscrowd"))
        except NoBoxError as error:
            rejections.add(str(error), number, shown, f"picture {picture.name}")
            continue
        same = (key, name, crowd, attribute(row, group_key), *box)
        if same in seen:
            rejections.add("repeated box", number, shown, f"picture {picture.name}")
            continue
        seen.add(same)
        kept.boxes.append(inside)
        kept.image.append(positions[key])
        kept.label.append(labels[name])
        kept.raw.append(row)
        kept.crowd.append(crowd)
        kept.outlines += outline
        kept.clipped += any(abs(a - b) > 1 for a, b in zip(inside, box, strict=True))
    return kept


def _inside(box: list[float], picture: CocoImage) -> list[float]:
    """The box cut at the edges of its picture."""
    left, top, width, height = box
    if width <= 0 or height <= 0:
        raise NoBoxError("box without area")
    right, bottom = min(left + width, picture.width), min(top + height, picture.height)
    left, top = max(left, 0.0), max(top, 0.0)
    if right <= left or bottom <= top:
        raise NoBoxError("box outside its picture")
    return [left, top, right - left, bottom - top]


def _crowd(value: object) -> bool:
    if value in (None, 0, "", "0") or (isinstance(value, str) and value.strip().lower() == "false"):
        return False
    if value in (1, "1") or (isinstance(value, str) and value.strip().lower() == "true"):
        return True
    raise NoBoxError("iscrowd that is neither 0 nor 1")


# -- groups --------------------------------------------------------------------------------------------------
def attribute(row: Mapping[str, object], key: str | None) -> str | None:
    """A value under ``key``, at the top level of a row or under its ``attributes``."""
    if key is None:
        return None
    under = row.get("attributes")
    value = row.get(key)
    if value is None and isinstance(under, Mapping):
        value = under.get(key)
    return None if value is None else str(value)


def group_position(values: tuple[str, ...], value: str | None) -> int:
    """Which of the two values this is, −1 for neither."""
    return values.index(value) if value in values else NO_GROUP


def group_values(
    path: Path,
    key: str | None,
    groups: Sequence[str] | None,
    pictures: Mapping[str, tuple[JsonObject, CocoImage]],
    boxes: Sequence[Mapping[str, object]],
) -> tuple[str, ...]:
    """The two values of the group attribute; none without a ``key``."""
    if key is None:
        if groups is not None:
            raise NearfarError(
                f"groups={list(groups)}: say which attribute holds them with data.group_key=NAME."
            )
        return ()
    rows = [*boxes, *(row for row, _ in pictures.values())]
    seen = Counter(value for row in rows if (value := attribute(row, key)) is not None)
    listed = ", ".join(f"{value!r} ({count})" for value, count in seen.most_common(8))
    if not seen:
        known = {name for row in rows for name in [*row, *_under(row)]}
        raise NearfarError(
            f"{path}: neither pictures nor boxes have the attribute group_key={key}; {nearest_name(key, known)}"
        )
    values = tuple(sorted(seen)) if groups is None else tuple(str(value) for value in groups)
    if len(set(values)) != 2:
        raise NearfarError(
            f"{path}: group_key={key} needs exactly two values, and has {listed}. Name two with data.groups=[A,B]."
        )
    for value in values:
        if value not in seen:
            raise NearfarError(f"{path}: no picture or box has {key}={value}; there are {listed}.")
    return values


def _under(row: Mapping[str, object]) -> Sequence[str]:
    under = row.get("attributes")
    return list(under) if isinstance(under, Mapping) else []


def with_groups(
    pictures: list[CocoImage],
    own: Sequence[str | None],
    values: tuple[str, ...],
    image: Int[np.ndarray, " m"],
    group: Sequence[int],
) -> list[CocoImage]:
    """Pictures with their groups: their own attribute, or else that of their boxes where these agree."""
    of_boxes: dict[int, set[int]] = {}
    for position, number in zip(image.tolist(), group, strict=True):
        of_boxes.setdefault(position, set()).add(number)
    grouped = []
    for position, picture in enumerate(pictures):
        among = of_boxes.get(position, set())
        agreed = next(iter(among)) if len(among) == 1 else NO_GROUP
        value = own[position]
        grouped.append(replace(picture, group=agreed if value is None else group_position(values, value)))
    return grouped
