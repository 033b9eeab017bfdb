"""Logs as tables: mappings of fields to series, data frames, rows of a CSV file, with numbers of any library as plain
floats.
"""

from __future__ import annotations

import math
import numbers as kinds_of_numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.doctor.fields import CONTEXT, LISTED, OF_AN_EPOCH, TEXTS, is_field, matches
from nearfar.errors import NearfarError

__all__ = [
    "Cell",
    "Columns",
    "estimate_of",
    "is_empty",
    "is_sequence",
    "is_series",
    "number",
    "numbers",
    "plain",
    "read_cells",
    "read_columns",
    "read_records",
    "table_columns",
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
    WRITTEN_NAN = 4  # "nan" or "inf" in words, or an infinity: nobody writes that for an empty cell


def plain(value: Any) -> Any:
    """Arrays, series and tensors as lists or numbers, estimates as mappings; anything else as it is."""
    if hasattr(value, "tolist"):
        return (value.detach() if hasattr(value, "detach") else value).tolist()
    for convert in ("to_pylist", "to_list", "to_dict"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return value


def is_sequence(value: Any) -> bool:
    """Whether this is a list or the like, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_series(value: Any) -> bool:
    """Whether this holds one value after the other: a list, an array, a column of a table, a generator.

    >>> is_series(range(3)), is_series(np.zeros(3)), is_series("loss"), is_series(np.float32(1)), is_series({"a": 1})
    (True, True, False, False, False)
    """
    if isinstance(value, (str, bytes, Mapping, set, frozenset)):
        return False
    if hasattr(value, "ndim"):
        return value.ndim != 0
    return isinstance(value, Iterable)


def is_empty(value: Any) -> bool:
    """Whether a cell says that nothing was measured: None, an NA of pandas, a masked value, a text without content.

    >>> is_empty(None), is_empty(" "), is_empty("nan"), is_empty(float("nan"))
    (True, True, False, False)
    """
    if isinstance(value, str):
        return value.strip().lower() in _EMPTY_TEXTS
    return type(value).__name__ in _EMPTY_TYPES


def number(value: Any, name: str, where: str) -> float | None:
    """A float; None for an empty cell; an error that names field and place for anything else.

    Numbers may be texts, as a CSV file has them.

    >>> number(True, "finite", "record 1"), number("NaN", "loss", "record 1"), number("4.1", "loss", "record 1")
    (1.0, nan, 4.1)
    """
    if type(value) is float:
        return value
    if is_empty(value):
        return None
    value = plain(value)
    if is_empty(value):
        return None
    if isinstance(value, str):
        found = _of_text(value)
    elif isinstance(value, (bool, kinds_of_numbers.Real)) or type(value).__name__ == "Decimal":
        try:
            found = float(value)
        except (OverflowError, ValueError):
            found = None
    else:
        found = None
    if found is None:
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}…"
        raise NearfarError(
            f"{where}: the field '{name}' is {shown}, and a number is needed; leave it out or convert it"
        )
    return found


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
    values: Any, name: str, where: Callable[[int], str], known: bool
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """The numbers of a column and what stands in each cell (``Cell``); NaN where there is no number.

    ``known=False``: what is no number is nobody's signal, and left empty; otherwise an error, at ``where(position)``.

    >>> read_cells(["4.1", "", "nan", None, 3], "loss", str, True)[1].tolist()
    [1, 0, 4, 3, 1]
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        found = values.astype(np.float64)
    else:
        values = list(values)
        if not set(map(type, values)) <= {float, int, bool}:
            return _read_each(values, name, where, known)
        try:
            found = np.array(values, np.float64)
        except OverflowError:
            return _read_each(values, name, where, known)
    cells = np.full(len(found), Cell.NUMBER, np.uint8)
    if isinstance(found, np.ma.MaskedArray):
        found, empty = found.filled(np.nan), np.ma.getmaskarray(found)
    else:
        empty = None
    if not np.isfinite(found).all():
        cells[np.isnan(found)] = Cell.NAN
        cells[np.isinf(found)] = Cell.WRITTEN_NAN
    if empty is not None:
        cells[empty] = Cell.EMPTY
    return found, cells


def _read_each(
    values: list[Any], name: str, where: Callable[[int], str], known: bool
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    found = np.full(len(values), np.nan)
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
        found[at] = read
        if math.isfinite(read):
            cells[at] = Cell.NUMBER
        else:
            cells[at] = Cell.WRITTEN_NAN if isinstance(value, str) or math.isinf(read) else Cell.NAN
    return found, cells


def _plain_number(value: Any) -> float | None:
    """The number of a text that is plainly one, as nearly every cell of a CSV file; None for anything else."""
    if type(value) is not str or "_" in value:
        return None
    try:
        return float(value)
    except ValueError:
        return None


def numbers(values: Sequence[Any], name: str, where: str) -> tuple[float, ...]:
    """A tuple of floats; null becomes NaN."""
    found = (number(value, name, where) for value in values)
    return tuple(math.nan if value is None else value for value in found)


def estimate_of(value: Any, name: str) -> dict[str, Any]:
    """An estimate, its mapping, or a bare number, as a mapping with ``value`` and what else is known.

    >>> estimate_of(0.5, "R@1")
    {'value': 0.5}
    """
    value = plain(value)
    if not isinstance(value, dict):
        return {"value": number(value, name, "the context")}
    found = dict(value)
    for key in ("value", "low", "high", "chance", "gallery", "sd", "n"):
        if key in found:
            found[key] = number(found[key], f"{name}: {key}", "the context")
    protocol = found.get("protocol") or {}
    if found.get("gallery") is None and "gallery" in protocol:
        found["gallery"] = number(protocol["gallery"], f"{name}: gallery", "the context")
    return found


#: lists that are no series
_NAMES = ("loss_weight_names",)
#: fields of a view, as a log of one view alone may call them
_OF_A_VIEW = ("effective_rank", "rank_limit", "dimensions", "variance", "uniformity", "mean_cosine")
#: fields of a record that are no signals
_PLACE = ("kind", "val", "estimates")


@dataclass
class Columns:
    """A log of ``length`` rows: for each numeric field the rows that have a cell, the numbers, and what the cells hold
    (``Cell``); lists and texts by row; and what is said of the run as a whole.

    ``table``: the fields that came from a table of pandas, where an empty cell is a NaN.
    """

    length: int
    fields: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict)
    lists: dict[str, list[tuple[int, tuple[float, ...]]]] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    table: set[str] = field(default_factory=set)

    def put(self, name: str, rows: Any, values: Any) -> None:
        """Read the cells of one field. Raises ``NearfarError``, naming field and row, for what is no number."""
        rows = np.asarray(rows, np.int64)
        if name in _OF_A_VIEW:
            name = f"embeddings/{name}"
        known = is_field(name)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
            rows, values = self._set_apart(name, rows, list(values), known)
        if len(values):
            found, cells = read_cells(
                values, name, lambda at: _where(rows[at]), known or name in ("step", "epoch")
            )
            if known or name in ("step", "epoch") or (cells != Cell.EMPTY).any():
                self.fields[name] = rows, found, cells

    def _set_apart(
        self, name: str, rows: np.ndarray, values: list[Any], known: bool
    ) -> tuple[np.ndarray, list[Any]]:
        """Texts and lists are kept by themselves; what is left are numbers, or should be."""
        if set(map(type, values)) <= {float, int, bool, type(None)}:
            return rows, values
        if name in TEXTS or (not known and name in CONTEXT):
            texts = [
                (int(row), value) for row, value in zip(rows, values, strict=True) if isinstance(value, str)
            ]
            texts = [(row, value) for row, value in texts if not is_empty(value)]
            if texts:
                self.texts[name] = texts
            if name in TEXTS:
                return rows[:0], []
            kept = [at for at, value in enumerate(values) if not isinstance(value, str)]
            rows, values = rows[kept], [values[at] for at in kept]
        listed = [at for at, value in enumerate(values) if is_series(value)]
        if listed and known:
            if not any(matches(pattern, name) for pattern in LISTED):
                raise NearfarError(
                    f"{_where(rows[listed[0]])}: the field '{name}' is a {type(values[listed[0]]).__name__} of "
                    "several values, and a number is needed; give one value for each row, such as its mean"
                )
            self.lists[name] = [
                (int(rows[at]), tuple(_listed(plain(values[at]), name, _where(rows[at])))) for at in listed
            ]
        if listed:
            kept = sorted(set(range(len(values))) - set(listed))
            rows, values = rows[kept], [values[at] for at in kept]
        return rows, values


def _listed(values: Iterable[Any], name: str, where: str) -> list[float]:
    found = (number(value, name, where) for value in values)
    return [float("nan") if value is None else value for value in found]


def _where(row: int) -> str:
    return f"record {row + 1} of the log"


def table_columns(table: Any) -> dict[str, Any] | None:
    """The columns of a table of pandas, polars, pyarrow or NumPy, by name; None for anything else.

    Nothing is imported for it. Columns of several levels are joined with "/"; an index called ``step`` or ``epoch``
    is read as a column.

    >>> import pandas
    >>> frame = pandas.DataFrame({"loss": [4.1, 3.9]}, index=pandas.Index([10, 20], name="step"))
    >>> {name: list(column) for name, column in table_columns(frame).items()}
    {'step': [10, 20], 'loss': [4.1, 3.9]}
    """
    fields = getattr(getattr(table, "dtype", None), "names", None)
    if fields:  # an array of records
        return {name: table[name] for name in fields}
    if hasattr(table, "iloc") and hasattr(table, "columns"):
        pairs = [(_joined(name), table.iloc[:, at]) for at, name in enumerate(table.columns)]
        names = {name for name, _ in pairs}
        levels = enumerate(getattr(table.index, "names", ()))
        pairs = [
            (name, table.index.get_level_values(at))
            for at, name in levels
            if name in ("step", "epoch") and name not in names
        ] + pairs
    elif hasattr(table, "column_names") and hasattr(table, "itercolumns"):
        pairs = list(zip(table.column_names, table.itercolumns(), strict=True))
    elif hasattr(table, "get_columns") and hasattr(table, "columns"):
        pairs = list(zip(table.columns, table.get_columns(), strict=True))
    elif hasattr(table, "collect_schema"):
        raise NearfarError("the log is a table that is not computed yet; pass table.collect()")
    else:
        return None
    columns = dict(pairs)
    if len(columns) < len(pairs):
        every = [name for name, _ in pairs]
        twice = next(name for name in every if every.count(name) > 1)
        raise NearfarError(f"the table has several columns '{twice}'; rename them, or drop all but one")
    return columns


def _joined(name: Any) -> str:
    """The name of a column, of several levels joined."""
    if isinstance(name, tuple):
        return "/".join(str(part) for part in name if not is_empty(part) and part == part)
    return str(name)


def _of_pandas(column: Any) -> bool:
    """Whether an empty cell of this column is a NaN, so that NaN does not say which it is."""
    return hasattr(column, "to_numpy") and type(column).__module__.partition(".")[0] == "pandas"


def _cells(column: Any) -> Any:
    """The cells of a column: an array of numbers, or a list."""
    if isinstance(column, np.ndarray) and type(column) is np.ndarray and column.ndim == 1:
        return column
    if _of_pandas(column):
        if not isinstance(column.dtype, np.dtype) and getattr(column.dtype, "kind", "O") in "fiub":
            return np.ma.masked_array(
                column.to_numpy(float, na_value=np.nan), np.asarray(column.isna(), bool)
            )
        array = column.to_numpy() if isinstance(column.dtype, np.dtype) else None
        if array is not None and array.dtype.kind in "fiub":
            return array
        values = list(column)
        if any(
            isinstance(value, str) for value in values
        ):  # among which a loss that is NaN is a text as well
            values = [None if isinstance(value, float) and value != value else value for value in values]
        return values
    return list(plain(column))


def read_columns(columns: Mapping[Any, Any]) -> Columns:
    """The log that a mapping of series is; a single number is a constant.

    Series have one length, with None where nothing was measured. Where ``epoch`` says which epoch each row belongs to,
    fields of an epoch (plans, probes, validation metrics) may instead have one value per epoch. A log whose rows all
    hold such fields and no ``epoch`` has one row per epoch.

    >>> log = read_columns({"loss": [4.1, 3.9], "candidates": 64, "sampler": "random"})
    >>> log.length, log.fields["candidates"][1].tolist(), log.context
    (2, [64.0, 64.0], {'sampler': 'random'})
    """
    given = {_joined(name): value for name, value in columns.items()}
    inner = given.get("val")
    inner = inner if isinstance(inner, Mapping) else table_columns(inner)
    if inner is not None:
        del given["val"]
        given |= {f"val/{name}": value for name, value in inner.items()}
    context: dict[str, Any] = {}
    series: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    table = set()
    for name, value in given.items():
        if isinstance(value, (set, frozenset)):
            raise NearfarError(f"the log: the field '{name}' is a set, which has no order; pass a list")
        if hasattr(value, "columns") and table_columns(value) is not None:
            raise NearfarError(
                f"the log: the field '{name}' is a table with {len(table_columns(value) or ())} columns, and a series "
                "of one value per row is needed"
            )
        if is_series(value) and name not in _NAMES:
            if _of_pandas(value):
                table.add(name)
            series[name] = _cells(value)
            continue
        if not isinstance(value, Mapping):
            value = plain(value)
        if name in CONTEXT:
            context[name] = value
        if isinstance(value, str) and name in CONTEXT and (not is_field(name) or not _is_number(value)):
            continue
        if is_field(name):
            constants[name] = number(value, name, "the log")
        elif name not in CONTEXT:
            constants[name] = value
    length, ends = _length(series)
    log = Columns(length, context=context, table=table)
    for name, values in series.items():
        if len(values) == length:
            rows: Any = np.arange(length)
            if not isinstance(values, np.ndarray) and None in values:  # nothing was measured there
                rows = [at for at, value in enumerate(values) if value is not None]
                values = [value for value in values if value is not None]
        else:
            rows = ends
        log.put(name, rows, values)
    for name, value in constants.items():
        if value is not None and not is_series(value) and not isinstance(value, Mapping):
            log.put(name, np.arange(length), [value] * length)
    if "epoch" not in series and any(_of_an_epoch(name) and _complete(log, name) for name in series):
        log.put("epoch", np.arange(length), np.arange(1, length + 1))
    return log


def _is_number(text: str) -> bool:
    try:
        return number(text, "", "") is not None
    except NearfarError:
        return False


def _complete(log: Columns, name: str) -> bool:
    if name in log.lists:
        return len(log.lists[name]) == log.length
    rows, _, cells = log.fields.get(name, ((), (), np.zeros(0)))
    return len(rows) == log.length and bool((cells != Cell.EMPTY).all())


def _of_an_epoch(name: str) -> bool:
    return any(matches(pattern, name) for pattern in OF_AN_EPOCH)


def _length(series: Mapping[str, Any]) -> tuple[int, np.ndarray]:
    """The number of rows, and the last row of each epoch, to which fields of an epoch belong; the first for plans would
    do as well."""
    nothing = np.zeros(0, np.int64)
    if not series:
        return 1, nothing
    lengths = {name: len(values) for name, values in series.items()}
    long = {name: n for name, n in lengths.items() if not _of_an_epoch(name)} or lengths
    length = next(
        (long[name] for name in ("loss", "step", "epoch") if name in long), next(iter(long.values()))
    )
    ends = nothing
    if lengths.get("epoch") == length and length:
        epochs = read_cells(series["epoch"], "epoch", lambda at: _where(at), True)[0]
        ends = np.flatnonzero(np.append(epochs[1:] != epochs[:-1], True))
    for name, n in lengths.items():
        if n == length or (_of_an_epoch(name) and len(ends) == n):
            continue
        other = next(k for k, v in lengths.items() if v == length)
        hint = "; with 'epoch' for each row, fields of an epoch may have one value per epoch"
        raise NearfarError(
            f"series of different lengths: '{other}' has {length} values, '{name}' has {n}. Write None where "
            f"nothing was measured{hint if _of_an_epoch(name) else ''}"
        )
    return length, ends


def read_records(records: Iterable[Any]) -> Columns:
    """The log that a list of rows is: mappings of fields to numbers, as ``train_log.jsonl`` or ``csv.DictReader`` has
    them. Raises ``NearfarError`` for a row that is no mapping."""
    cells: dict[str, tuple[list[int], list[Any]]] = {}
    estimates: dict[str, Any] = {}
    row = -1
    for row, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise NearfarError(
                f"record {row + 1} of the log is {type(record).__name__}, not a mapping of fields to numbers"
            )
        if None in record.values() and _all_text(record):
            record = {name: "" if value is None else value for name, value in record.items()}
        for name, value in record.items():
            place = cells.get(name)
            if place is None:
                place = cells[name] = ([], [])
            place[0].append(row)
            place[1].append(value)
        if "estimates" in record:
            estimates |= _mapping(record["estimates"], "estimates", _where(row))
    for at, value in zip(*cells.get("val", ((), ())), strict=True):
        for name, metric in _mapping(value, "val", _where(at)).items():
            place = cells.setdefault(f"val/{name}", ([], []))
            place[0].append(at)
            place[1].append(metric)
    log = Columns(row + 1, context={"estimates": estimates} if estimates else {})
    for name, (rows, values) in cells.items():
        if name not in _PLACE:
            log.put(_joined(name), rows, values)
    return log


def _all_text(record: Mapping[Any, Any]) -> bool:
    """Whether a record is a row of a CSV file: a None in it is a cell that a short row lacks."""
    values = [value for name, value in record.items() if value is not None and name not in TEXTS]
    return bool(values) and all(isinstance(value, (str, list)) for value in values)


def _mapping(value: Any, name: str, where: str) -> Mapping[str, Any]:
    if is_empty(value):
        return {}
    if not isinstance(value, Mapping):
        raise NearfarError(
            f"{where}: {name} is {type(value).__name__}; a mapping of metrics to numbers is needed"
        )
    return value
