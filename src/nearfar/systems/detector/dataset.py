"""Another view of a picture with its boxes: a part of it, mirrored, in other colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from nearfar.data.images import crop

__all__ = ["View", "make_view"]


_TRIES = 20


@dataclass(frozen=True)
class View:
    """How far a view may be from the picture.

    ``crop``: the smallest side of the part shown, as a share of the picture's; 1 shows all of it. ``kept``: share of a
    box that must be inside for it to stay; a part that keeps no box of a picture is drawn again. ``colours``: by how
    much brightness, contrast and saturation change, as a share; 0 leaves them. Half of the views are mirrored.
    """

    crop: float = 0.55
    kept: float = 0.6
    colours: float = 0.3


def make_view(
    picture: UInt8[np.ndarray, "h w 3"],
    boxes: Float[np.ndarray, "k 4"],
    labels: Int[np.ndarray, " k"],
    size: int,
    view: View | None,
    key: Sequence[int] = (),
) -> tuple[UInt8[np.ndarray, "3 size size"], Float[np.ndarray, "m 4"], Int[np.ndarray, " m"]]:
    """The picture at ``size`` × ``size`` pixels with the boxes that are still in it.

    Boxes are corners as shares of the picture, before and after. Without a ``view`` the whole picture is shown; what a
    view draws depends on ``key`` alone.

    >>> picture, box = np.zeros((40, 60, 3), np.uint8), np.array([[0.25, 0.5, 0.75, 1.0]])
    >>> pixels, boxes, labels = make_view(picture, box, np.array([0]), 32, None)
    >>> pixels.shape, boxes.tolist()
    ((3, 32, 32), [[0.25, 0.5, 0.75, 1.0]])
    """
    height, width = picture.shape[:2]
    if view is None:
        whole = (
            crop(picture, (0, 0, width, height), (size, size)) if (height, width) != (size, size) else picture
        )
        return np.ascontiguousarray(whole.transpose(2, 0, 1)), boxes, labels
    rng = np.random.default_rng(list(key))
    left, top, right, bottom = window = _window(rng, boxes, view)
    shown = crop(picture, (left * width, top * height, right * width, bottom * height), (size, size))
    inside, share = _clip(boxes, window)
    stays = share >= view.kept
    boxes, labels = inside[stays], labels[stays]
    boxes = (boxes - [left, top, left, top]) / [right - left, bottom - top, right - left, bottom - top]
    pixels = _recoloured(rng, shown, view.colours)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), boxes, labels


def _window(
    rng: np.random.Generator, boxes: Float[np.ndarray, "k 4"], view: View
) -> tuple[float, float, float, float]:
    """The part to show: at least one box stays, where there is one; after some tries the whole picture."""
    for _ in range(_TRIES if view.crop < 1 else 0):
        side, stretch = rng.uniform(view.crop, 1.0), math.exp(rng.uniform(-0.25, 0.25))
        w, h = min(1.0, side * stretch), min(1.0, side / stretch)
        left, top = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        window = (left, top, left + w, top + h)
        if not len(boxes) or (_clip(boxes, window)[1] >= view.kept).any():
            return window
    return 0.0, 0.0, 1.0, 1.0


def _clip(
    boxes: Float[np.ndarray, "k 4"], window: tuple[float, float, float, float]
) -> tuple[Float[np.ndarray, "k 4"], Float[np.ndarray, " k"]]:
    """The boxes cut at the window, and the share of each that is inside."""
    low, high = np.array(window[:2] * 2), np.array(window[2:] * 2)
    inside = boxes.clip(low, high)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return inside, np.prod(inside[:, 2:] - inside[:, :2], axis=1) / np.maximum(area, 1e-12)


def _recoloured(
    rng: np.random.Generator, pixels: UInt8[np.ndarray, "h w 3"], by: float
) -> UInt8[np.ndarray, "h w 3"]:
    if not by:
        return pixels
    brightness, contrast, saturation = rng.uniform(1 - by, 1 + by, 3)
    values = pixels.astype(np.float32) * brightness
    values = (values - values.mean()) * contrast + values.mean()
    grey = values.mean(axis=2, keepdims=True)
    return ((values - grey) * saturation + grey).round().clip(0, 255).astype(np.uint8)
