"""Rows of a COCO-format file, one at a time: which pictures and boxes are usable, and in which group they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from nearfar.data.images import image_size
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "Categories",
    "CocoImage",
    "attribute",
    "group_position",
    "group_values",
    "is_key",
    "usable_boxes",
    "usable_pictures",
    "with_groups",
]

NO_GROUP = -1


@dataclass(frozen=True)
class CocoImage:
    """One picture: its name in the file, where it lies, its size in pixels, and its group (−1: none)."""

    name: str
    path: Path
    width: int
    height: int
    group: int = NO_GROUP


@dataclass(frozen=True)
class Categories:
    """Names of categories by their ids in the file, and the names that are kept, whose positions are labels."""

    by_id: dict[Any, str]
    wanted: list[str]


def is_key(value: object) -> bool:
    """Whether a value can name a picture or a category."""
    return isinstance(value, (int, str, float)) and not isinstance(value, bool)


# -- pictures ------------------------------------------------------------------------------------------------
def usable_pictures(
    rows: list[dict[str, Any]], root: Path, rejections: Rejections
) -> Iterator[tuple[Any, tuple[dict[str, Any], CocoImage]]]:
    """Each usable picture by its id, with its row; the others are counted."""
    ids, names = set[Any](), set[str]()
    for number, row in enumerate(rows, 1):
        key, name = row.get("id"), row.get("file_name")
        if key is None or not is_key(key) or not isinstance(name, str) or not name:
            rejections.add("picture without id or file_name", number, key if name is None else name)
        elif key in ids or name in names:
            rejections.add("repeated picture", number, name, f"id {key}")
        else:
            ids.add(key)
            names.add(name)
            problem, picture = _picture(root / name, name, row)
            if picture is None:
                rejections.add(problem[0], number, name, problem[1])
            else:
                yield key, (row, picture)


def _picture(path: Path, name: str, row: dict[str, Any]) -> tuple[tuple[str, str], CocoImage | None]:
    if not path.is_file():
        return ("missing picture", f"sought in {path.parent}"), None
    try:
        height, width = image_size(path)
    except NearfarError as error:
        return ("unreadable picture", str(error)), None
    said = (row.get("height", height), row.get("width", width))
    if said != (height, width):
        return (
            "picture of another size",
            f"{width} × {height} in truth, {said[1]} × {said[0]} in the file",
        ), None
    return ("", ""), CocoImage(name, path, width, height)


# -- boxes ---------------------------------------------------------------------------------------------------
@dataclass
class _Kept:
    boxes: list[list[float]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    clipped: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def usable_boxes(
    rows: list[dict[str, Any]],
    pictures: Mapping[Any, tuple[dict[str, Any], CocoImage]],
    names: Categories,
    chosen: bool,
    rejections: Rejections,
) -> _Kept:
    """The usable boxes in the order of the file; the others are counted."""
    kept = _Kept()
    positions = {key: position for position, key in enumerate(pictures)}
    labels = {name: label for label, name in enumerate(names.wanted)}
    for number, row in enumerate(rows, 1):
        key, category, box = row.get("image_id"), row.get("category_id"), row.get("bbox")
        if not is_key(key) or key not in positions:
            rejections.add("box of a picture that is not there", number, box, f"image_id {key}")
            continue
        if not is_key(category) or category not in names.by_id:
            rejections.add("unknown category", number, box, f"category_id {category}")
            continue
        name = names.by_id[category]
        if chosen and name not in labels:
            kept.left_out[name] += 1
            continue
        inside = _inside(box, pictures[key][1])
        if isinstance(inside, str):
            rejections.add(inside, number, box, f"picture {pictures[key][1].name}")
            continue
        kept.boxes.append(inside)
        kept.image.append(positions[key])
        kept.label.append(labels[name])
        kept.raw.append(row)
        kept.clipped += any(abs(a - float(b)) > 1 for a, b in zip(inside, box or [], strict=True))
    return kept


def _inside(box: Any, picture: CocoImage) -> list[float] | str:
    """The box cut at the edges of its picture, or what is wrong with it."""
    numbers = isinstance(box, list) and len(box) == 4 and not any(isinstance(v, bool) for v in box)
    if not numbers or not all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in box):
        return "box that is no four numbers"
    left, top, width, height = (float(value) for value in box)
    if width <= 0 or height <= 0:
        return "box without area"
    right, bottom = min(left + width, picture.width), min(top + height, picture.height)
    left, top = max(left, 0.0), max(top, 0.0)
    if right <= left or bottom <= top:
        return "box outside its picture"
    return [left, top, right - left, bottom - top]


# -- groups --------------------------------------------------------------------------------------------------
def attribute(row: Mapping[str, Any], key: str | None) -> str | None:
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
    pictures: Mapping[Any, tuple[dict[str, Any], CocoImage]],
    boxes: Sequence[Mapping[str, Any]],
) -> tuple[str, ...]:
    """The two values of the group attribute; none without a ``key``."""
    if key is None:
        if groups is not None:
            raise NearfarError(f"groups={list(groups)}: say which attribute holds them with group_key=NAME.")
        return ()
    rows = [*boxes, *(row for row, _ in pictures.values())]
    seen = Counter(value for row in rows if (value := attribute(row, key)) is not None)
    there = ", ".join(f"{value!r} ({count})" for value, count in seen.most_common(8))
    if not seen:
        known = {name for row in rows for name in [*row, *_under(row)]}
        raise NearfarError(
            f"{path}: neither pictures nor boxes have the attribute group_key={key}; {nearest_name(key, known)}"
        )
    values = tuple(sorted(seen)) if groups is None else tuple(str(value) for value in groups)
    if len(set(values)) != 2:
        raise NearfarError(
            f"{path}: group_key={key} needs exactly two values, and has {there}. Name two with groups=[A,B]."
        )
    for value in values:
        if value not in seen:
            raise NearfarError(f"{path}: no picture or box has {key}={value}; there are {there}.")
    return values


def _under(row: Mapping[str, Any]) -> Sequence[str]:
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
    found = []
    for position, picture in enumerate(pictures):
        among = of_boxes.get(position, set())
        agreed = next(iter(among)) if len(among) == 1 else NO_GROUP
        value = own[position]
        found.append(replace(picture, group=agreed if value is None else group_position(values, value)))
    return found
