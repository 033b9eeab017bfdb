"""Relevance as a list: one key for each query, or a row of keys, of flags or of grades for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import shown
from nearfar.errors import NearfarError
from nearfar.metrics.relevance import ItemIds, places_in_rows

__all__ = [
    "FORMS",
    "as_pairs",
    "is_key",
    "is_nothing",
    "is_relevant_grade",
    "is_single",
    "read_entries",
    "row_grades",
    "two_readings",
    "zeros_and_ones",
]

FORMS = (
    "relevant takes an index for each query, a list of the indices of each query's keys, a Boolean (queries, "
    "keys) matrix, labels as a tuple (query_labels, key_labels), or with query_ids= and key_ids= a dictionary "
    "{query: {key: grade}}"
)


def read_entries(
    relevant: object, n: int, m: int, ids: ItemIds, own: NDArray[np.int64] | None
) -> tuple[Tensor, Tensor]:
    """A flat list of one key for each query, or a list of one row for each."""
    if (
        isinstance(relevant, (str, bytes, set, frozenset))
        or not isinstance(relevant, (Iterable, Tensor))
        or not hasattr(relevant, "__len__")
        or getattr(relevant, "ndim", 1) != 1
    ):
        raise NearfarError(f"relevant is {shown(relevant)}, which is not understood. {FORMS}")
    if np.ma.isMaskedArray(relevant):
        raise NearfarError(
            "relevant is a masked array; pass .filled(-1) of positions, or .filled(False) of Booleans"
        )
    if isinstance(relevant, (Tensor, np.ndarray)):
        kind = "b" if isinstance(relevant, Tensor) else relevant.dtype.kind
        if kind not in "iuOUS" and len(relevant):
            what = {"b": "Booleans", "f": "floats"}.get(kind, str(relevant.dtype))
            raise NearfarError(
                f"relevant is one-dimensional and holds {what}, which is not understood: positions are "
                "integers. Cast whole numbers with .astype(int) after setting missing ones to −1; Booleans "
                f"are a (queries, keys) matrix. {FORMS}"
            )
        if isinstance(relevant, np.ndarray) and kind in "iu" and not ids.of_keys:
            return _other_than_own(_of_positions(relevant, n, m), own)
        relevant = relevant.tolist() if kind in "iuUS" else list(relevant)
    entries = [entry.item() if is_single(entry) else entry for entry in relevant]
    if len(entries) != n:
        hint = (
            "; a pair of label lists goes in as a tuple: relevant=(query_labels, key_labels)"
            if len(entries) == 2 and not any(is_key(entry) for entry in entries)
            else ""
        )
        what = "has one entry for each of" if entries and is_key(entries[0]) else "lists the keys of"
        raise NearfarError(f"relevant {what} {len(entries)} queries, but there are {n}{hint}")
    single = [i for i, entry in enumerate(entries) if is_key(entry)]
    rows = [i for i, entry in enumerate(entries) if not is_key(entry) and not is_nothing(entry)]
    if single and rows:
        raise NearfarError(
            f"relevant mixes single keys (entry {single[0]}: {shown(entries[single[0]])}) and lists (entry "
            f"{rows[0]}: {shown(entries[rows[0]])}); give one of them for all queries"
        )
    if single or not rows:
        keys = [[] if is_nothing(entry) else [entry] for entry in entries]
        return _other_than_own(as_pairs([_row_of(i, key, m, ids) for i, key in enumerate(keys)]), own)
    flags = _as_flags(entries, m)
    if flags is not None:
        row, column = torch.from_numpy(flags).nonzero().unbind(1)
        return row, column
    return as_pairs([_row_of(i, [] if is_nothing(row) else row, m, ids) for i, row in enumerate(entries)])


def _of_positions(array: np.ndarray, n: int, m: int) -> tuple[Tensor, Tensor]:
    if len(array) != n:
        raise NearfarError(f"relevant has {len(array)} entries for {n} queries; it takes one for each")
    kept = array >= 0 if array.dtype.kind == "u" else array != -1
    rows = np.flatnonzero(kept)
    _check_range(rows, array[kept], m)
    return torch.from_numpy(rows), torch.from_numpy(array[kept].astype(np.int64))


def _other_than_own(pairs: tuple[Tensor, Tensor], own: NDArray[np.int64] | None) -> tuple[Tensor, Tensor]:
    """The pairs of one key for each query, unless they are class labels to all appearances.

    Where queries are keys, labels come to mind as soon as positions. Then a query names itself, which ``leave_one_out``
    takes away, or few keys are named by all.
    """
    if own is not None:
        rows, columns = pairs
        itself = (columns == torch.from_numpy(own)[rows]).nonzero().flatten()
        few = len(columns) >= 8 and 4 * len(columns.unique()) <= len(columns)
        if len(itself) or few:
            what = (
                f"query {int(rows[itself[0]])} names itself as its relevant key, which leave_one_out takes away"
                if len(itself)
                else f"{len(columns)} queries name {len(columns.unique())} keys in all"
            )
            raise NearfarError(
                f"relevant: {what}. One integer for each query is the position of its key; class labels go in as a "
                "tuple, relevant=(labels, labels), and positions that are meant so as lists, [[p] for p in relevant]"
            )
    return pairs


def _row_of(i: int, row: Any, m: int, ids: ItemIds) -> NDArray[np.int64]:
    """Positions of the keys that the row of query i names."""
    if isinstance(row, Mapping):
        named = [key for key, grade in row.items() if is_relevant_grade(i, grade)]
        if ids.of_keys is not None:
            return ids.positions(named, f"the row of query {i}")
        odd = [key for key in named if isinstance(key, bool) or not isinstance(key, (int, np.integer))]
        if odd:
            raise NearfarError(
                f"relevant: the row of query {i} grades the key {shown(odd[0])}; without ids a row of grades is "
                "{position: grade}, and with key_ids= the keys can be looked up"
            )
        _check_range(np.full(len(named), i), np.array(named, dtype=object), m)
        return np.unique(np.array(named, dtype=np.int64))
    if isinstance(row, (set, frozenset)):
        row = sorted(row, key=repr)
        if any(isinstance(value, (bool, np.bool_)) for value in row):
            raise NearfarError(f"relevant: the row of query {i} is a set of Booleans; a set holds keys")
    if (
        isinstance(row, (str, bytes))
        or not isinstance(row, Iterable)
        or (isinstance(row, Tensor) and row.ndim == 0)
    ):
        raise NearfarError(f"relevant: the row of query {i} is {shown(row)}; a list of keys is needed")
    if isinstance(row, Tensor):
        if row.layout != torch.strided:
            raise NearfarError(
                f"relevant: the row of query {i} is a sparse tensor; stack the rows to one matrix"
            )
        row = row.detach().cpu()
        row = (row.double() if row.is_floating_point() else row).numpy()
    if getattr(row, "ndim", 1) != 1:
        raise NearfarError(
            f"relevant: the row of query {i} has shape {tuple(row.shape)}; one dimension is needed"
        )
    if isinstance(row, np.ndarray) and row.dtype != object:
        kind = (
            {"b": "b", "i": "i", "u": "i", "U": "s", "S": "o", "f": "f"}.get(row.dtype.kind, "o")
            if len(row)
            else "i"
        )
        values: list[object] = []
    else:
        values = [value.item() if is_single(value) else value for value in row]
        kind = _kind_of(i, values)
    if kind == "b":
        flags = np.asarray(row if isinstance(row, np.ndarray) else values, dtype=bool)
        if len(flags) != m:
            raise NearfarError(
                f"relevant: the row of query {i} holds {len(flags)} Booleans, but there are {m} keys; one for "
                "each is needed"
            )
        return np.flatnonzero(flags)
    if ids.of_keys is not None and kind in "iso":
        named = values or (row.tolist() if isinstance(row, np.ndarray) else [])
        return ids.positions(
            [v for v in named if not is_nothing(v) and not _is_padding(v, ids)], f"the row of query {i}"
        )
    if kind == "s":
        first = (values or row.tolist())[0]
        raise NearfarError(
            f"relevant: query {i} names the key {first!r}, a text; pass the ids of the keys in their order as "
            "key_ids=, or, if these are class labels, a tuple (query_labels, key_labels)"
        )
    if kind != "i":
        first = next((v for v in (values or row.tolist()) if not isinstance(v, (int, np.integer))), None)
        what = "floats" if kind == "f" else "values"
        raise NearfarError(
            f"relevant: the row of query {i} holds {what} ({shown(first)}); keys are whole numbers, and "
            "floats are not cut to them: pass integers, or Booleans for all keys"
        )
    if isinstance(row, np.ndarray) and row.dtype.kind in "iu":
        indices = row[row >= 0] if row.dtype.kind == "u" else row[row != -1]
    else:
        indices = np.array([v for v in values if not is_nothing(v) and v != -1], dtype=object)
    _check_range(np.full(len(indices), i), indices, m)
    return np.unique(indices.astype(np.int64))


def _kind_of(i: int, values: Sequence[object]) -> str:
    """Booleans, integers, texts, floats or others; several of them in one row are refused."""
    kinds = set()
    for value in values:
        if isinstance(value, (bool, np.bool_)):
            kinds.add("b")
        elif isinstance(value, (int, np.integer)):
            kinds.add("i")
        elif isinstance(value, str):
            kinds.add("s")
        elif not is_nothing(value):
            kinds.add("f" if isinstance(value, (float, np.floating)) else "o")
    if len(kinds) > 1 or ("b" in kinds and any(is_nothing(value) for value in values)):
        raise NearfarError(f"relevant: the row of query {i} mixes kinds of values: {shown(list(values))}")
    return kinds.pop() if kinds else "i"


def _as_flags(entries: list[Any], m: int) -> NDArray[np.bool_] | None:
    """Rows of 0 and 1 for all keys, as ``tolist()`` of a matrix of integers gives; ``None`` if they are none."""
    if any(isinstance(entry, (Mapping, set, frozenset, str, bytes)) for entry in entries):
        return None
    if not all(hasattr(entry, "__len__") and len(entry) == m for entry in entries):
        return None
    rows = []
    for entry in entries:
        values = entry.tolist() if isinstance(entry, (Tensor, np.ndarray)) else list(entry)
        if not all(type(v) is int or isinstance(v, np.integer) for v in values):
            return None
        rows.append(values)
    array = np.array(rows, dtype=object)
    if zeros_and_ones(array):
        if m <= 2:
            raise NearfarError(two_readings(m))
        return np.asarray(array == 1)
    if any(len(set(row) - {-1}) < sum(v != -1 for v in row) for row in rows):
        raise NearfarError(
            "relevant has an integer for every query and key, and other ones than 0 and 1: grades are no "
            "positions. Pass what counts as relevant, such as np.asarray(relevant) > 0"
        )
    return None


def zeros_and_ones(array: np.ndarray) -> bool:
    return bool(((array == 0) | (array == 1)).all())


def two_readings(m: int) -> str:
    return (
        f"relevant holds rows of 0 and 1, and there are {m} keys: this may be a matrix or lists of positions. "
        "Pass a matrix as Booleans, np.asarray(relevant, dtype=bool), and positions as a Boolean matrix too"
    )


def is_relevant_grade(query: object, grade: Any) -> bool:
    """Whether a grade makes a key relevant: those above 0 do, as in TREC."""
    if isinstance(grade, (Tensor, np.ndarray)) and grade.ndim == 0:
        grade = grade.item()
    number = isinstance(grade, (bool, int, float, np.number, np.bool_))
    if not number or not abs(grade) < np.inf:
        raise NearfarError(
            f"relevant: query {query!r} has the grade {shown(grade)}; grades are numbers, 0 is not relevant"
        )
    return bool(grade > 0)


def row_grades(rows: Sequence[Mapping[Any, Any]], ids: ItemIds) -> Tensor:
    """The grades above 0 of rows {key: grade}, in the order of ``as_pairs``: row after row, by position."""
    grades = []
    for i, row in enumerate(rows):
        kept = {key: float(grade) for key, grade in row.items() if is_relevant_grade(i, grade)}
        by_place = {int(key) if ids.of_keys is None else ids.place(key): grade for key, grade in kept.items()}
        grades += [by_place[place] for place in sorted(by_place)]
    return torch.tensor(grades, dtype=torch.float64)


def as_pairs(rows: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    row = places_in_rows(torch.tensor([len(r) for r in rows], dtype=torch.int64))[0]
    column = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    return row, torch.from_numpy(column.astype(np.int64))


def _check_range(rows: np.ndarray, columns: np.ndarray, m: int) -> None:
    outside = np.flatnonzero((columns < 0) | (columns >= m))
    if len(outside):
        at = int(outside[0])
        raise NearfarError(
            f"relevant: query {int(rows[at])} names key {int(columns[at])} as relevant, but keys are 0 to "
            f"{m - 1}, and −1 says none; class labels go in as a tuple (query_labels, key_labels)"
        )


def is_single(entry: object) -> bool:
    return isinstance(entry, (Tensor, np.ndarray, np.generic)) and entry.ndim == 0


def is_key(entry: object) -> bool:
    """One key: an integer or a text. (Other single values are no keys; the row's own check names them.)"""
    return isinstance(entry, (bool, int, float, str, bytes, np.number, np.bool_)) and not is_nothing(entry)


def is_nothing(entry: object) -> bool:
    """None, NaN and pandas' NA: no key. (−1 says the same, as an integer.)"""
    missing = entry is None or type(entry).__name__ in ("NAType", "NaTType")
    return missing or (isinstance(entry, (float, np.floating)) and bool(np.isnan(entry)))


def _is_padding(value: object, ids: ItemIds) -> bool:
    return isinstance(value, (int, np.integer)) and value == -1 and not ids.knows(-1)
