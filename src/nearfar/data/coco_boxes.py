"""The box of one COCO annotation, whatever types its numbers have, and what units the boxes of a file are in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from nearfar.errors import NearfarError

__all__ = ["NoBoxError", "box_of", "check_units", "too_small_for"]

_LARGEST = 1e9
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_SLACK = 2.0  # pixels by which boxes reach over an edge without a word
_OVER = 0.25  # share of boxes that reach over the right or lower edge from which on units are doubted
_FIT = 0.99  # share of boxes that must fit in other units


class NoBoxError(ValueError):
    """An annotation has no box that can be used; the text is the reason under which it is counted."""


def box_of(row: Mapping[str, Any]) -> tuple[list[float], bool]:
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


def _around(polygons: list[Any]) -> list[float]:
    reason = "no bbox, and no polygon of numbers"
    flat = polygons if not isinstance(polygons[0], list) else [v for part in polygons for v in _flat(part)]
    values = _numbers(flat, reason)
    if len(values) < 6 or len(values) % 2:
        raise NoBoxError(reason)
    x, y = values[::2], values[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _flat(part: Any) -> list[Any]:
    if not isinstance(part, list):
        raise NoBoxError("no bbox, and no polygon of numbers")
    return [v for point in part for v in point] if part and isinstance(part[0], list) else part


def _numbers(values: Sequence[Any], reason: str) -> list[float]:
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
