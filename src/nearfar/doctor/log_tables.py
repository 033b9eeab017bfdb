"""Logs as tables: mappings of fields to series, data frames, lists of records, rows of a CSV file.

Whether an empty cell of the loss is a step at which nothing was measured, or a loss that was not a number.

``pandas`` has NaN for both, and JSON null for NaN. The row decides: what else it holds, and where else that stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.data.files import Json
from nearfar.doctor.fields import CONTEXT, FIELDS, LISTED, OF_AN_EPOCH, is_field, is_text, matches
from nearfar.doctor.series import Cell, is_empty, is_series, number, plain, read_cells
from nearfar.errors import NearfarError

__all__ = ["LOSSES", "Columns", "read_columns", "read_records", "settle_gaps", "table_columns"]


#: lists that are no series
_NAMES = ("loss_weight_names",)
#: fields of a view, as a log of one view alone may call them
OF_A_VIEW = ("effective_rank", "rank_limit", "dimensions", "variance", "uniformity", "mean_cosine")
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
    context: Json = field(default_factory=dict)
    table: set[str] = field(default_factory=set)

    def put(self, name: str, rows: Iterable[int], values: Iterable[object]) -> None:
        """Read the cells of one field. Raises ``NearfarError``, naming field and row, for what is no number."""
        rows = np.asarray(rows, np.int64)
        if name in OF_A_VIEW:
            name = f"embeddings/{name}"
        known = is_field(name)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
            rows, values = self._set_apart(name, rows, list(values), known)
        if len(values):
            floats, cells = read_cells(
                values, name, lambda at: _where(rows[at]), known or name in ("step", "epoch")
            )
            if known or name in ("step", "epoch") or (cells != Cell.EMPTY).any():
                self.fields[name] = rows, floats, cells

    def _set_apart(
        self, name: str, rows: np.ndarray, values: list[object], known: bool
    ) -> tuple[np.ndarray, list[object]]:
        """Texts and lists are kept by themselves; what is left are numbers, or should be."""
        if set(map(type, values)) <= {float, int, bool, type(None)}:
            return rows, values
        if is_text(name) or (not known and name in CONTEXT):
            texts = [
                (int(row), value) for row, value in zip(rows, values, strict=True) if isinstance(value, str)
            ]
            texts = [(row, value) for row, value in texts if not is_empty(value)]
            if texts:
                self.texts[name] = texts
            if is_text(name):
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


def _listed(values: Iterable[object], name: str, where: str) -> list[float]:
    floats = (number(value, name, where) for value in values)
    return [float("nan") if value is None else value for value in floats]


def _where(row: int) -> str:
    return f"record {row + 1} of the log"


def table_columns(table: Any) -> Json | None:
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


def _joined(name: object) -> str:
    """The name of a column, of several levels joined."""
    if isinstance(name, tuple):
        return "/".join(str(part) for part in name if not is_empty(part) and part == part)
    return str(name)


def _of_pandas(column: object) -> bool:
    """Whether an empty cell of this column is a NaN, so that NaN does not say which it is."""
    return hasattr(column, "to_numpy") and type(column).__module__.partition(".")[0] == "pandas"


def _cells(column: Any) -> np.ndarray | list[object]:
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


def read_columns(columns: Mapping[Any, object]) -> Columns:
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
    context: Json = {}
    series: Json = {}
    constants: Json = {}
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
            rows: Sequence[int] | np.ndarray = np.arange(length)
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


def _length(series: Mapping[str, Sequence[object] | np.ndarray]) -> tuple[int, np.ndarray]:
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


def read_records(records: Iterable[object]) -> Columns:
    """The log that a list of rows is: mappings of fields to numbers, as ``train_log.jsonl`` or ``csv.DictReader`` has
    them. Raises ``NearfarError`` for a row that is no mapping."""
    cells: dict[str, tuple[list[int], list[object]]] = {}
    estimates: Json = {}
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


def _all_text(record: Mapping[str, object]) -> bool:
    """Whether a record is a row of a CSV file: a None in it is a cell that a short row lacks."""
    values = [value for name, value in record.items() if value is not None and not is_text(name)]
    return bool(values) and all(isinstance(value, (str, list)) for value in values)


def _mapping(value: object, name: str, where: str) -> Json:
    if is_empty(value):
        return {}
    if not isinstance(value, Mapping):
        raise NearfarError(
            f"{where}: {name} is {type(value).__name__}; a mapping of metrics to numbers is needed"
        )
    return dict(value)


#: fields in which a NaN is a finding
LOSSES = ("loss", "train_loss")
#: fields that say where a row stands, not what was measured there
_TIME_FIELDS = ("step", "epoch", "seconds", "time")
#: share of rows without a number from which a loss is one that is logged now and then
SPARSE = 0.2


def settle_gaps(log: Columns, null_is_nan: bool) -> list[str]:
    """Turn each doubtful cell into a NaN that was logged or an empty one, and say in sentences what was assumed.

    In a log of records (``null_is_nan``) None is as doubtful as NaN; in a column it is empty.
    """
    assumptions = []
    for name, (rows, _, cells) in log.fields.items():
        null = cells == Cell.NULL
        nan = cells == Cell.NAN
        doubtful = nan | null if null_is_nan else nan
        if not null_is_nan:
            cells[null] = Cell.EMPTY
        if name not in LOSSES:
            cells[nan | null] = Cell.EMPTY
            continue
        if not doubtful.any():
            continue
        logged = _logged(log, name, rows, cells, doubtful)
        cells[doubtful & ~logged] = Cell.EMPTY
        cells[logged] = Cell.WRITTEN_NAN
        empty = int((doubtful & ~logged).sum())
        if empty:
            cell = "cell" if empty == 1 else "cells"
            assumptions.append(f"{empty} empty {cell} of '{name}' taken as not measured")
        if name in log.table and logged.any():
            assumptions.append(
                f"{int(logged.sum())} NaN of '{name}' taken as values of the loss, not as empty cells, by what else "
                "their rows hold"
            )
    return assumptions


def _logged(
    log: Columns,
    name: str,
    rows: NDArray[np.int64],
    cells: NDArray[np.uint8],
    doubtful: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which doubtful cells are values: those in rows that hold what stands beside the loss elsewhere, and, unless the
    loss is logged only now and then, those in rows that nothing else explains."""
    measured = np.zeros(log.length, bool)
    measured[rows[cells == Cell.NUMBER]] = True
    last = int(np.flatnonzero(measured).max(initial=-1))
    beside, elsewhere = np.zeros(log.length, bool), np.zeros(log.length, bool)
    for other, (where, _, contents) in _others(log, name).items():
        here = np.zeros(log.length, bool)
        here[where[np.isin(contents, (Cell.NUMBER, Cell.WRITTEN_NAN))]] = True
        if here.all():  # what stands in every row explains none of them
            continue
        known = here[: last + 1]
        with_loss = (
            bool(measured[: last + 1][known].mean() >= 0.5) if known.any() else other in FIELDS["step"]
        )
        (beside if with_loss else elsewhere).__ior__(here)
    for where_text in (log.texts, log.lists):
        for other, entries in where_text.items():
            here = np.zeros(log.length, bool)
            here[[row for row, _ in entries]] = True
            if not here.all() and not measured[here].any() and other not in _TIME_FIELDS:
                elsewhere |= here
    place = rows
    unexplained = doubtful & ~beside[place] & ~elsewhere[place]
    if name in log.table:
        unexplained &= _dense(rows, measured, unexplained, last)
    return (doubtful & beside[place]) | unexplained


def _others(
    log: Columns, name: str
) -> Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.uint8]]]:
    return {
        other: column for other, column in log.fields.items() if other != name and other not in _TIME_FIELDS
    }


def _dense(
    rows: NDArray[np.int64], measured: NDArray[np.bool_], unexplained: NDArray[np.bool_], last: int
) -> NDArray[np.bool_]:
    """For a table that has rows without a loss for no reason in the row: which cells are values all the same.

    Where such rows are few, all of them. Where they are many, the loss is logged now and then, and only what comes
    after its last value, and is more than twice as long as any gap before, is a loss that broke.
    """
    inner = unexplained & (rows < last)
    numbers = int(measured.sum())
    if inner.sum() <= SPARSE * (inner.sum() + numbers):
        return np.ones(len(rows), bool)
    longest = int(np.diff(np.flatnonzero(measured)).max(initial=1)) - 1
    after = unexplained & (rows > last)
    return after if after.sum() > 2 * longest else np.zeros(len(rows), bool)
