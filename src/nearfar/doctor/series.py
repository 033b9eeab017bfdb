"""Cells of a log as plain numbers, a field of it over a run, and the few statistics that tell a level from noise."""

from __future__ import annotations

import math
import numbers as kinds_of_numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = [
    "Cell",
    "Point",
    "Series",
    "estimate_of",
    "is_empty",
    "is_series",
    "level_noise",
    "mean",
    "number",
    "numbers",
    "plain",
    "read_cells",
]


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


_FLAGS = {"true": 1.0, "false": 0.0}
#: texts by which tables say that a cell is empty; not "nan", for that is how a loss is written that is one
_EMPTY_TEXTS = {"", "none", "null", "na", "n/a", "<na>", "nat"}
#: types of single values by which pandas and NumPy say the same, known by name, since nothing here imports pandas
_EMPTY_TYPES = {"NoneType", "NAType", "NaTType", "MaskedConstant"}


class Cell(IntEnum):
    """What stands in a cell of a log: nothing, a number, or NaN; null and NaN may stand for an empty cell."""

    EMPTY = 0
    NUMBER = 1
    NAN = 2  # a NaN, which a table of pandas also writes into empty cells
    NULL = 3  # None, as which JSON writes NaN
    WRITTEN_NAN = 4  # "nan" or "inf" in words, or an infinity: never written for an empty cell


def plain(value: object) -> Any:
    """Arrays, series and tensors as lists or numbers, estimates as mappings; anything else as it is."""
    if hasattr(value, "tolist"):
        return (value.detach() if hasattr(value, "detach") else value).tolist()
    for convert in ("to_pylist", "to_list", "to_dict"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return value


def is_series(value: object) -> bool:
    """Whether this holds one value after the other: a list, an array, a column of a table, a generator.

    >>> is_series(range(3)), is_series(np.zeros(3)), is_series("loss"), is_series(np.float32(1)), is_series({"a": 1})
    (True, True, False, False, False)
    """
    if isinstance(value, (str, bytes, Mapping, set, frozenset)):
        return False
    if hasattr(value, "ndim"):
        return value.ndim != 0
    return isinstance(value, Iterable)


def is_empty(value: object) -> bool:
    """Whether a cell says that nothing was measured: None, an NA of pandas, a masked value, a text without content.

    >>> is_empty(None), is_empty(" "), is_empty("nan"), is_empty(float("nan"))
    (True, True, False, False)
    """
    if isinstance(value, str):
        return value.strip().lower() in _EMPTY_TEXTS
    return type(value).__name__ in _EMPTY_TYPES


def number(value: object, name: str, where: str) -> float | None:
    """A float; None for an empty cell; an error that names field and place for anything else.

    Numbers may be texts, as a CSV file has them.

    >>> number(True, "finite", "record 1"), number("NaN", "loss", "record 1"), number("4.1", "loss", "record 1")
    (1.0, nan, 4.1)
    """
    if type(value) is float:
        return value
    if is_empty(value):
        return None
    given = plain(value)
    if is_empty(given):
        return None
    if isinstance(given, str):
        result = _of_text(given)
    elif isinstance(given, (bool, kinds_of_numbers.Real)) or type(given).__name__ == "Decimal":
        try:
            result = float(given)
        except (OverflowError, ValueError):
            result = None
    else:
        result = None
    if result is None:
        shown = repr(given) if len(repr(given)) < 80 else f"{repr(given)[:80]}…"
        raise NearfarError(
            f"{where}: the field '{name}' is {shown}, and a number is needed; leave it out or convert it"
        )
    return result


def _of_text(text: str) -> float | None:
    word = text.strip().lower()
    if word in _FLAGS:
        return _FLAGS[word]
    if "_" in word:  # Python's own reading of 1_000, which no log writes
        return None
    try:
        return float(word)
    except ValueError:
        return None


def read_cells(
    values: Iterable[object], name: str, where: Callable[[int], str], known: bool
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """The numbers of a column and what stands in each cell (``Cell``); NaN where there is no number.

    ``known=False``: what is no number is left empty; otherwise an error, at ``where(position)``.

    >>> read_cells(["4.1", "", "nan", None, 3], "loss", str, True)[1].tolist()
    [1, 0, 4, 3, 1]
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        floats = values.astype(np.float64)
    else:
        values = list(values)
        if not set(map(type, values)) <= {float, int, bool}:
            return _read_each(values, name, where, known)
        try:
            floats = np.array(values, np.float64)
        except OverflowError:
            return _read_each(values, name, where, known)
    cells = np.full(len(floats), Cell.NUMBER, np.uint8)
    if isinstance(floats, np.ma.MaskedArray):
        floats, empty = floats.filled(np.nan), np.ma.getmaskarray(floats)
    else:
        empty = None
    if not np.isfinite(floats).all():
        cells[np.isnan(floats)] = Cell.NAN
        cells[np.isinf(floats)] = Cell.WRITTEN_NAN
    if empty is not None:
        cells[empty] = Cell.EMPTY
    return floats, cells


def _read_each(
    values: list[object], name: str, where: Callable[[int], str], known: bool
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    floats = np.full(len(values), np.nan)
    cells = np.zeros(len(values), np.uint8)
    for at, value in enumerate(values):
        if value is None:
            cells[at] = Cell.NULL
            continue
        try:
            read = _plain_number(value)
            if read is None:
                read = number(value, name, where(at))
        except NearfarError:
            if known:
                raise
            continue
        if read is None:
            continue
        floats[at] = read
        if math.isfinite(read):
            cells[at] = Cell.NUMBER
        else:
            cells[at] = Cell.WRITTEN_NAN if isinstance(value, str) or math.isinf(read) else Cell.NAN
    return floats, cells


def _plain_number(value: object) -> float | None:
    """The number of a text that is plainly one, as nearly every cell of a CSV file; None for anything else."""
    if type(value) is not str or "_" in value:
        return None
    try:
        return float(value)
    except ValueError:
        return None


def numbers(values: Sequence[object], name: str, where: str) -> tuple[float, ...]:
    """A tuple of floats; null becomes NaN."""
    floats = (number(value, name, where) for value in values)
    return tuple(math.nan if value is None else value for value in floats)


def estimate_of(value: object, name: str) -> Json:
    """An estimate, its mapping, or a bare number, as a mapping with ``value`` and what else is known.

    >>> estimate_of(0.5, "R@1")
    {'value': 0.5}
    """
    value = plain(value)
    if not isinstance(value, dict):
        return {"value": number(value, name, "the context")}
    estimate = dict(value)
    for key in ("value", "low", "high", "chance", "gallery", "sd", "n"):
        if key in estimate:
            estimate[key] = number(estimate[key], f"{name}: {key}", "the context")
    protocol = estimate.get("protocol") or {}
    if estimate.get("gallery") is None and "gallery" in protocol:
        estimate["gallery"] = number(protocol["gallery"], f"{name}: gallery", "the context")
    return estimate
