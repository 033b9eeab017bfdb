"""Two boxes in a picture: their geometry as numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import nn

from nearfar.data.batch import Rows
from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.views import PassThrough
from nearfar.towers.base import Tower, read_tower_spec, write_tower_spec
from nearfar.towers.vector import Scaler

if TYPE_CHECKING:
    pass

__all__ = ["SPATIAL", "BoxTower", "names_of", "overlap", "spatial_numbers"]


SPATIAL = ("raw", "log", "iou", "relative")
_EIGHT = ("dx", "dy", "distance²", "sin θ", "cos θ", "subject area", "object area", "area ratio")
_LOG = (*_EIGHT[:5], "log subject area", "log object area", "log area ratio")
_RELATIVE = (
    "dx / subject width", "dy / subject height", "dx / object width", "dy / object height",
    "log width ratio", "log height ratio", "log subject shape", "log object shape",
    "share of subject covered", "share of object covered",
    "subject bottom − object top", "subject bottom − object bottom", "subject top − object top",
    "subject top − object bottom", "subject left − object left", "subject right − object right",
    "gap below, in subjects", "gap above, in subjects", "subject x", "subject y",
)  # fmt: skip
_FURTHEST = 6.0  # sizes of a box, at which distances are clipped
_LEAST = 1e-6  # of an area, so that its logarithm is finite


def names_of(variant: str) -> tuple[str, ...]:
    """The name of each number of a variant."""
    if variant not in SPATIAL:
        raise NearfarError(f"variant={variant}: {nearest_name(str(variant), SPATIAL)}")
    return {
        "raw": _EIGHT,
        "log": _LOG,
        "iou": (*_LOG, "IoU"),
        "relative": (*_LOG, "IoU", *_RELATIVE),
    }[variant]


def overlap(
    a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "n 4"]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Areas of the first boxes, of the second, and of their intersection; boxes are (left, top, right, bottom).

    >>> [x.tolist() for x in overlap(np.array([[0, 0, 2, 2.0]]), np.array([[1, 1, 3, 4.0]]))]
    [[4.0], [6.0], [1.0]]
    """
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    return (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]), (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]), shared


def spatial_numbers(
    subject: Float[np.ndarray, "n 4"],
    object_: Float[np.ndarray, "n 4"],
    size: Float[np.ndarray, "n 2"],
    variant: str = "raw",
) -> Float[np.ndarray, "n k"]:
    """Numbers of each pair of boxes (left, top, right, bottom), in pixels, in pictures of ``size`` (width, height).

    With centres divided by the picture's width and height, d = object − subject:

    "raw"       dx, dy, dx² + dy², sin θ, cos θ (θ = atan2(dy, dx); both 0 where the centres coincide), subject area,
                object area, area ratio. The ratio has no bound: a leaf on a tree is 1e-4, a tree behind a leaf 1e4.
    "log"       the same with the logarithms of the three areas.
    "iou"       "log", and the boxes' intersection over union.
    "relative"  "iou", and 20 numbers in units of the boxes themselves: distances of centres and of edges, shapes, the
                share of each box that the other covers. They do not depend on the picture's size.

    They are not standardised, which needs the training pairs.

    >>> boxes = np.array([[0.0, 0.0, 20.0, 10.0]]), np.array([[30.0, 0.0, 50.0, 10.0]])
    >>> spatial_numbers(*boxes, np.array([[100.0, 100.0]])).round(3).tolist()
    [[0.3, 0.0, 0.09, 0.0, 1.0, 0.02, 0.02, 1.0]]
    """
    names_of(variant)
    s, o, wh = (np.asarray(x, dtype=np.float64) for x in (subject, object_, size))
    centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (s, o)]
    d = (centres[1] - centres[0]) / wh
    squared = (d**2).sum(1)
    length = np.sqrt(squared)
    direction = np.divide(d, length[:, None], out=np.zeros_like(d), where=length[:, None] > 0)
    area_s, area_o, shared = overlap(s, o)
    whole = wh.prod(1)
    first, second = area_s / whole, area_o / whole
    place = np.stack([d[:, 0], d[:, 1], squared, direction[:, 1], direction[:, 0]], 1)
    if variant == "raw":
        return np.column_stack([place, first, second, first / np.maximum(second, _LEAST)])
    logs = [np.log(np.maximum(area, _LEAST)) for area in (first, second)]
    numbers = np.column_stack([place, *logs, logs[0] - logs[1]])
    if variant == "log":
        return numbers
    numbers = np.column_stack([numbers, shared / (area_s + area_o - shared)])
    if variant == "iou":
        return numbers
    return np.column_stack([numbers, _relative(s, o, centres, shared), centres[0] / wh])


def _relative(
    s: NDArray[np.float64],
    o: NDArray[np.float64],
    centres: list[NDArray[np.float64]],
    shared: NDArray[np.float64],
) -> NDArray[np.float64]:
    size_s, size_o = s[:, 2:] - s[:, :2], o[:, 2:] - o[:, :2]
    d = centres[1] - centres[0]
    (w_s, h_s), (w_o, h_o) = size_s.T, size_o.T
    numbers = np.column_stack(
        [
            d / size_s,
            d / size_o,
            np.log(size_s / size_o),
            np.log(w_s / h_s),
            np.log(w_o / h_o),
            shared / (w_s * h_s),
            shared / (w_o * h_o),
            (s[:, 3] - o[:, 1]) / h_o,
            (s[:, 3] - o[:, 3]) / h_o,
            (s[:, 1] - o[:, 1]) / h_o,
            (s[:, 1] - o[:, 3]) / h_o,
            (s[:, 0] - o[:, 0]) / w_o,
            (s[:, 2] - o[:, 2]) / w_o,
            (s[:, 3] - o[:, 1]) / h_s,
            (s[:, 1] - o[:, 3]) / h_s,
        ]
    )
    return np.clip(numbers, -_FURTHEST, _FURTHEST)


class BoxTower(Tower):
    """Two boxes in a picture as numbers of `spatial_numbers`, standardised by the training rows.

    A value is ten numbers: left, top, right and bottom of the first box, of the second, in pixels, and width and height
    of the picture.

    Args:
        variant: of the numbers: "raw", "log", "iou" or "relative".

    >>> rows = np.array([[0, 0, 20, 10, 30, 0, 50, 10, 100, 100], [0, 0, 20, 10, 10, 0, 30, 10, 100, 100.0]])
    >>> tower = BoxTower("raw").fit(rows)
    >>> tower.description, tower.build().width, tower.read(rows).values[:, 0].tolist()
    ('geometry of two boxes in 8 numbers (raw), standardised by the training rows', 8, [1.0, -1.0])
    >>> tower.check([rows[0], [0, 0, 0, 10, 30, 0, 50, 10, 100, 100], rows[0][:9]])
    [None, 'box without area', 'not ten numbers']
    """

    kind = "boxes"

    def __init__(self, variant: str = "relative") -> None:
        if variant not in SPATIAL:
            raise NearfarError(f"variant={variant!r} is unknown; {nearest_name(str(variant), SPATIAL)}")
        self.variant = variant
        self.train = "head"
        self.scaler: Scaler | None = None

    @property
    def description(self) -> str:
        count = len(names_of(self.variant))
        fitted = "standardised by the training rows" if self.scaler is not None else "not fitted yet"
        return f"geometry of two boxes in {count} numbers ({self.variant}), {fitted}"

    @property
    def options(self) -> Json:
        return {"variant": self.variant}

    def check(self, values: Column) -> list[str | None]:
        """Values that are not ten finite numbers, boxes without area, pictures without a size."""
        return [_problem(value) for value in values]

    def fit(self, values: Column) -> BoxTower:
        """Mean and spread of the training rows' numbers."""
        self.scaler = Scaler.of(self.numbers(values))
        return self

    def numbers(self, values: Column) -> Float[np.ndarray, "n k"]:
        """The numbers of `spatial_numbers`, not standardised."""
        rows = np.asarray(values, dtype=np.float64).reshape(len(values), 10)
        return spatial_numbers(rows[:, :4], rows[:, 4:8], rows[:, 8:], self.variant)

    def standardized(self, values: Column) -> Float[np.ndarray, "n k"]:
        """The same with mean 0 and variance 1 over the training rows."""
        if self.scaler is None:
            raise NearfarError("a tower of boxes was not fitted: call fit(training values) or load it.")
        return self.scaler(self.numbers(values))

    def read(self, values: Column) -> Rows:
        return Rows(self.standardized(values))

    def build(self) -> nn.Module:
        return PassThrough(len(names_of(self.variant)))

    def reference(self, values: Column) -> Float[np.ndarray, "n k"]:
        return self.standardized(values)

    def save(self, folder: Path) -> None:
        write_tower_spec(folder, self, scaler=None if self.scaler is None else self.scaler.to_dict())

    @classmethod
    def load(cls, folder: Path) -> BoxTower:
        spec = read_tower_spec(folder)
        tower = cls(**spec["options"])
        tower.scaler = None if spec.get("scaler") is None else Scaler.from_dict(spec["scaler"])
        return tower


def _problem(value: object) -> str | None:
    """Why a value is no two boxes in a picture; None where it is."""
    try:
        row = np.asarray(value, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        return "no number"
    if row.size != 10:
        return "not ten numbers"
    if not np.isfinite(row).all():
        return "number that is not finite"
    if (row[[0, 1, 4, 5]] >= row[[2, 3, 6, 7]]).any():
        return "box without area"
    return None if (row[8:] > 0).all() else "picture without a size"
