"""Cells of a log: numbers of any library, texts that are numbers, and empty cells, as plain floats."""

from __future__ import annotations

import math
import numbers as kinds_of_numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = [
    "Cell",
    "estimate_of",
    "is_empty",
    "is_series",
    "number",
    "numbers",
    "plain",
    "read_cells",
]


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
