"""One field of a log over a run, and the few statistics that tell a level from noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

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


@dataclass(frozen=True)
class Series:
    """The values of one field in the order of the log; empty, and then false, where the log lacks it.

    >>> falling = Series("loss", tuple(Point(i, i, 1 + i // 4, 4.0 - i) for i in range(8)))
    >>> falling.tail().values, falling.by_epoch()
    ((-1.0, -2.0, -3.0), {1: 2.5, 2: -1.5})
    """

    name: str
    points: tuple[Point, ...] = ()

    def __len__(self) -> int:
        return len(self.points)

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers alone."""
        return tuple(point.value for point in self.points)

    def where(self, keep: Callable[[Point], bool]) -> Series:
        """The points that ``keep`` is true of."""
        return Series(self.name, tuple(point for point in self.points if keep(point)))

    def finite(self) -> Series:
        """Without NaN and infinities."""
        if all(math.isfinite(point.value) for point in self.points):
            return self
        return self.where(lambda point: math.isfinite(point.value))

    def tail(self, share: float = LAST_PART, least: int = 3) -> Series:
        """The last part of the run, ``share`` of the points and at least ``least`` of them (or all there are)."""
        count = max(math.ceil(share * len(self.points)), min(least, len(self.points)))
        return Series(self.name, self.points[len(self.points) - count :])

    def mean(self) -> float:
        """The mean, NaN of nothing."""
        return mean(self.values)

    def error(self) -> float:
        """Standard error of the mean, from blocks of neighbouring values; 0 of fewer than two values."""
        values, blocks = self.values, min(BLOCKS, len(self.points))
        if blocks < 2:
            return 0.0
        cuts = [round(i * len(values) / blocks) for i in range(blocks + 1)]
        means = [mean(values[a:b]) for a, b in pairwise(cuts)]
        middle = mean(means)
        return math.sqrt(sum((m - middle) ** 2 for m in means) / (blocks - 1) / blocks)

    def by_epoch(self) -> dict[int, float]:
        """The mean of each epoch that the log names."""
        found: dict[int, list[float]] = {}
        for point in self.points:
            if point.epoch is not None:
                found.setdefault(point.epoch, []).append(point.value)
        return {epoch: mean(values) for epoch, values in sorted(found.items())}

    def where_text(self) -> str:
        """Where in the run these points lie, as a sentence says it."""
        if not self.points:
            return "nowhere"
        first, last = self.points[0], self.points[-1]
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
