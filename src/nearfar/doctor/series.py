"""One field of a log over a run, and the few statistics that tell a level from noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Point", "Series", "level_noise", "mean"]

#: the part of a run that a level is read from: late enough to be past warm-up, long enough to be a mean
LAST_PART = 0.25
#: blocks that a standard error comes from; neighbouring steps resemble each other, neighbouring blocks less
BLOCKS = 10


class Point(NamedTuple):
    """A value, the row of the log it stood in, its step and (where the log says so) its epoch, from 1."""

    row: int
    step: float
    epoch: int | None
    value: float


class Series:
    """The values of one field in the order of the log; empty, and then false, where the log lacks it.

    The numbers lie in arrays (``rows``, ``steps``, ``epochs`` with NaN for none, ``numbers``): logs have a hundred
    thousand of them. ``points`` has them one by one.

    >>> falling = Series("loss", tuple(Point(i, i, 1 + i // 4, 4.0 - i) for i in range(8)))
    >>> falling.tail().values, falling.by_epoch()
    ((-1.0, -2.0, -3.0), {1: 2.5, 2: -1.5})
    """

    def __init__(self, name: str, points: Iterable[Point] = ()) -> None:
        self.name = name
        points = tuple(points)
        self.rows: NDArray[np.int64] = np.array([p.row for p in points], np.int64)
        self.steps: NDArray[np.float64] = np.array([p.step for p in points], np.float64)
        self.epochs: NDArray[np.float64] = np.array(
            [math.nan if p.epoch is None else p.epoch for p in points], np.float64
        )
        self.numbers: NDArray[np.float64] = np.array([p.value for p in points], np.float64)

    @classmethod
    def of(
        cls,
        name: str,
        rows: NDArray[np.int64],
        steps: NDArray[np.float64],
        epochs: NDArray[np.float64],
        numbers: NDArray[np.float64],
    ) -> Series:
        """From arrays of one length."""
        series = cls(name)
        series.rows, series.steps, series.epochs, series.numbers = rows, steps, epochs, numbers
        return series

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"Series({self.name!r}, {len(self)} values)"

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Value by value."""
        epochs = [None if math.isnan(epoch) else int(epoch) for epoch in self.epochs.tolist()]
        columns = self.rows.tolist(), self.steps.tolist(), epochs, self.numbers.tolist()
        return tuple(map(Point, *columns))

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers alone."""
        return tuple(self.numbers.tolist())

    def part(self, which: slice | NDArray[np.bool_] | NDArray[np.int64]) -> Series:
        """Some of the values."""
        return Series.of(
            self.name, self.rows[which], self.steps[which], self.epochs[which], self.numbers[which]
        )

    def having(self, numbers: NDArray[np.float64] | float, name: str | None = None) -> Series:
        """Other values at the same places."""
        wide = np.broadcast_to(np.asarray(numbers, np.float64), self.numbers.shape)
        return Series.of(self.name if name is None else name, self.rows, self.steps, self.epochs, wide)

    def finite(self) -> Series:
        """Without NaN and infinities."""
        finite = np.isfinite(self.numbers)
        return self if finite.all() else self.part(finite)

    def tail(self, share: float = LAST_PART, least: int = 3) -> Series:
        """The last part of the run, ``share`` of the points and at least ``least`` of them (or all there are)."""
        count = max(math.ceil(share * len(self)), min(least, len(self)))
        return self.part(slice(len(self) - count, None))

    def mean(self) -> float:
        """The mean, NaN of nothing."""
        return mean(self.numbers.tolist())

    def error(self) -> float:
        """Standard error of the mean, from blocks of neighbouring values; 0 of fewer than two values."""
        values, blocks = self.numbers.tolist(), min(BLOCKS, len(self))
        if blocks < 2:
            return 0.0
        cuts = [round(i * len(values) / blocks) for i in range(blocks + 1)]
        means = [mean(values[a:b]) for a, b in pairwise(cuts)]
        middle = mean(means)
        return math.sqrt(sum((m - middle) ** 2 for m in means) / (blocks - 1) / blocks)

    def by_epoch(self) -> dict[int, float]:
        """The mean of each epoch that the log names."""
        known = self.part(~np.isnan(self.epochs))
        order = np.argsort(known.epochs, kind="stable")
        epochs, starts = np.unique(known.epochs[order], return_index=True)
        parts = np.split(known.numbers[order], starts[1:]) if len(epochs) else []
        return {int(epoch): mean(part.tolist()) for epoch, part in zip(epochs, parts, strict=True)}

    def last_epoch(self) -> int | None:
        """The highest epoch among these; None where the log names none."""
        known = self.epochs[~np.isnan(self.epochs)]
        return int(known.max()) if len(known) else None

    def where_text(self) -> str:
        """Where in the run these points lie, as a sentence says it."""
        if not len(self):
            return "nowhere"
        first, last = self.part(slice(0, 1)).points[0], self.part(slice(-1, None)).points[0]
        steps = f"step {last.step:g}" if first.step == last.step else f"steps {first.step:g} to {last.step:g}"
        if first.epoch is None or last.epoch is None:
            return steps
        epochs = (
            f"epoch {last.epoch}" if first.epoch == last.epoch else f"epochs {first.epoch} to {last.epoch}"
        )
        return f"{steps} ({epochs})"


def mean(values: Sequence[float]) -> float:
    """The mean of finite or infinite numbers; NaN of none."""
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else _odd(values)


def _odd(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def level_noise(values: Sequence[float]) -> float:
    """How much single values scatter around a curve that may bend: a standard deviation, from differences.

    A trend cancels in second differences, whose variance is 6 of one value's, and a bend in third ones, with 20; the
    smaller estimate is taken, since what remains of the curve can only add. The median keeps a jump from counting as
    noise. 0 of fewer than five values, which say nothing.

    >>> level_noise([1, 2, 3, 4, 5, 6]), round(level_noise([0, 1, 0, 1, 0, 1]), 2)
    (0.0, 1.21)
    """
    if len(values) < 5:
        return 0.0
    second = _differences(_differences(values))
    estimates = [_spread(second) / math.sqrt(6)]
    if len(values) > 5:
        estimates.append(_spread(_differences(second)) / math.sqrt(20))
    return min(estimates)


def _differences(values: Sequence[float]) -> list[float]:
    return [b - a for a, b in pairwise(values)]


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of values around 0, by their median size."""
    sizes = sorted(map(abs, values))
    half = len(sizes) // 2
    return 1.4826 * (sizes[half] if len(sizes) % 2 else (sizes[half - 1] + sizes[half]) / 2)
