"""Relevance as people have it: labels, indices, matrices, tables, qrels. Each is read as what it is, or refused.

Nothing is guessed: Booleans are never indices, floats are never cut to integers, grades are never positions, and a
form that two readings fit is an error that names both.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import check_dense, shown
from nearfar.errors import NearfarError
from nearfar.labels import shared_codes
from nearfar.metrics.relevance import ItemIds, Relevance
from nearfar.metrics.relevance_rows import (
    FORMS,
    as_pairs,
    is_key,
    is_nothing,
    is_relevant_grade,
    is_single,
    read_entries,
    row_grades,
    two_readings,
    zeros_and_ones,
)

if TYPE_CHECKING:
    import pandas
    from scipy import sparse

__all__ = ["read_relevance"]


def read_relevance(
    relevant: object, ids: ItemIds, device: torch.device, own: NDArray[np.int64] | None = None
) -> Relevance:
    """``relevant`` as the user gave it, checked and brought to one of two forms, less each query's ``own`` key.

    ``None``: query i belongs to key i. A tuple of two: labels, of which equal ones are relevant. A (queries, keys)
    matrix of Booleans, or of integers 0 and 1, dense or sparse. One integer for each query: the position of its key
    (−1: none). Rows, one for each query: positions (−1: padding), or Booleans for all keys. A mapping of query ids to
    key ids, or to grades by key id, of which those above 0 are relevant. Where there are ``key_ids``, integers and
    texts are ids, not positions.
    """
    n, m = ids.queries, ids.keys
    if relevant is None:
        if ids.given:
            raise NearfarError(
                "relevant=None pairs by position, and ids are given: state who belongs to whom with "
                "relevant=, such as a dictionary {query id: {key id: grade}}"
            )
        if n != m:
            raise NearfarError(
                f"relevant=None: {n} queries and {m} keys cannot be paired by position; state who belongs to "
                "whom with relevant= (an index for each query, lists of indices, or a pair of label lists)"
            )
        if own is not None and (own == np.arange(n)).all():
            raise NearfarError(
                "relevant=None makes query i relevant to key i alone, and leave_one_out takes that key away: "
                "state the others with relevant=, such as labels as a tuple (labels, labels)"
            )
        return _from_pairs(torch.arange(n), torch.arange(n), n, m, device, own)
    if isinstance(relevant, tuple):
        return _from_labels(relevant, n, m, device, own)
    if hasattr(relevant, "tocsr"):
        return _from_scipy(relevant, n, m, device, own)
    if isinstance(relevant, Tensor) and relevant.device.type == "meta":
        check_dense("relevant", relevant)
    if isinstance(relevant, Tensor) and relevant.layout != torch.strided:
        return _from_sparse(relevant, n, m, device, own)
    if hasattr(relevant, "columns") and hasattr(relevant, "to_numpy"):
        relevant = _of_frame(relevant, n, m, ids)
    elif hasattr(relevant, "index") and hasattr(relevant, "to_numpy"):
        relevant = _of_series(relevant, ids)
    if isinstance(relevant, Mapping):
        return _from_qrels(relevant, ids, device, own)
    if isinstance(relevant, Tensor) and relevant.dtype != torch.bool:
        relevant = relevant.detach().cpu()
        relevant = (relevant.double() if relevant.is_floating_point() else relevant).numpy()
    if isinstance(relevant, (Tensor, np.ndarray)) and relevant.ndim == 2:
        rows, columns = _of_matrix(relevant, n, m, ids, own)
    elif isinstance(relevant, list) and relevant and all(isinstance(row, Mapping) for row in relevant):
        pairs = read_entries(relevant, n, m, ids, own)
        return _from_pairs(*pairs, n, m, device, own, row_grades(relevant, ids))
    else:
        rows, columns = read_entries(relevant, n, m, ids, own)
    return _from_pairs(rows, columns, n, m, device, own)


# -- labels ----------------------------------------------------------------------------------------------------
def _from_labels(
    relevant: tuple[object, ...], n: int, m: int, device: torch.device, own: NDArray[np.int64] | None
) -> Relevance:
    sizes = [len(part) if hasattr(part, "__len__") and not is_single(part) else None for part in relevant]
    if sizes != [n, m]:
        stated = " and ".join("a single value" if size is None else str(size) for size in sizes)
        stated = f"its parts have {stated}" if len(sizes) == 2 else f"it has {len(sizes)} parts"
        raise NearfarError(
            f"a tuple states labels, relevant=({n} query labels, {m} key labels), but {stated}; "
            "lists of relevant indices go in as a list, not as a tuple"
        )
    if any(len(getattr(part, "shape", (0,))) != 1 for part in relevant):
        raise NearfarError(
            "relevant as a tuple holds labels, one for each item in one dimension; for items with several "
            "labels pass a Boolean matrix"
        )
    first, second = shared_codes(
        **{"relevant[0], the query labels,": relevant[0], "relevant[1], the key labels,": relevant[1]}
    )
    classes = int(max(first.max(), second.max())) + 1
    missing = int((first < 0).sum()), int((second < 0).sum())
    # Codes of their own make a missing label different from every other one, missing ones of the other side included.
    first[first < 0], second[second < 0] = classes, classes + 1
    codes = (torch.from_numpy(first).to(device), torch.from_numpy(second).to(device))
    return Relevance(n, m, labels=codes, own=_on(own, device), without_label=missing)


# -- matrices --------------------------------------------------------------------------------------------------
def _from_scipy(
    relevant: sparse.spmatrix, n: int, m: int, device: torch.device, own: NDArray[np.int64] | None
) -> Relevance:
    matrix = relevant.tocsr().tocoo()  # an entry stated twice is one, the sum of both
    _check_matrix_shape(matrix.shape, n, m)
    _check_zeros_and_ones(np.asarray(matrix.data))
    kept = np.asarray(matrix.data) != 0
    row, column = (
        torch.from_numpy(np.asarray(place)[kept].astype(np.int64)) for place in (matrix.row, matrix.col)
    )
    return _from_pairs(row, column, n, m, device, own)


def _from_sparse(
    relevant: Tensor, n: int, m: int, device: torch.device, own: NDArray[np.int64] | None
) -> Relevance:
    _check_matrix_shape(relevant.shape, n, m)
    entries = relevant.detach().to_sparse_coo()
    entries = (entries.to(torch.int64) if entries.dtype == torch.bool else entries).coalesce()
    values = entries.values()
    if relevant.dtype != torch.bool:
        _check_zeros_and_ones(values.cpu().double().numpy())
    row, column = entries.indices()[:, values != 0]
    return _from_pairs(row, column, n, m, device, own)


def _check_zeros_and_ones(values: np.ndarray) -> None:
    odd = values[(values != 0) & (values != 1)]
    if odd.size:
        raise NearfarError(
            f"relevant is a sparse matrix that holds {odd[0]!s}; entries are 0 and 1. Of grades, pass relevant "
            "> 0; of scores, what counts as relevant"
        )


def _of_matrix(
    array: np.ndarray | Tensor, n: int, m: int, ids: ItemIds, own: NDArray[np.int64] | None
) -> tuple[Tensor, Tensor]:
    """A 2-d array: a matrix of Booleans or of 0 and 1, or rows of positions padded with −1."""
    if np.ma.isMaskedArray(array):
        raise NearfarError(
            "relevant is a masked array; pass .filled(-1) of positions, or .filled(False) of Booleans"
        )
    if isinstance(array, Tensor) or array.dtype == bool:
        _check_matrix_shape(array.shape, n, m)
        row, column = (
            array.nonzero(as_tuple=True)
            if isinstance(array, Tensor)
            else map(torch.from_numpy, array.nonzero())
        )
        return row, column
    if array.dtype.kind in "iu" and tuple(array.shape) == (n, m) and zeros_and_ones(array):
        if m <= 2:
            raise NearfarError(two_readings(m))
        row, column = torch.from_numpy(array == 1).nonzero().unbind(1)
        return row, column
    if array.dtype.kind == "f" and array.size:
        raise NearfarError(
            f"relevant is a matrix of floats {tuple(array.shape)}, which is not understood: scores or "
            f"distances are no relevance. Pass Booleans, such as relevant > 0.5. {FORMS}"
        )
    if array.dtype.kind not in "iuOUSf":
        raise NearfarError(f"relevant of type {array.dtype} is not understood. {FORMS}")
    return read_entries(list(array), n, m, ids, own)


def _of_frame(frame: pandas.DataFrame, n: int, m: int, ids: ItemIds) -> np.ndarray:
    """A table whose rows are queries and whose columns are keys; by name where its names are the ids."""
    if tuple(frame.shape) != (n, m):
        raise NearfarError(
            f"relevant is a table {tuple(frame.shape)}, but there are {n} queries and {m} keys: as a matrix it "
            "needs a row for each query and a column for each key. Of a table with columns query, key, grade make a "
            "dictionary: {q: dict(zip(t['key'], t['grade'])) for q, t in table.groupby('query')}, with query_ids= and "
            "key_ids="
        )
    if ids.given:
        index = list(getattr(frame, "index", range(n)))
        named = [(index, ids.of_queries), (list(frame.columns), ids.of_keys)]
        for own, given in named:
            if given is not None and own != list(given) and own != list(range(len(own))):
                if set(own) != set(given) or len(set(own)) != len(own):
                    raise NearfarError(
                        f"relevant is a table with the names {own[:3]} …, but the ids are {list(given)[:3]} …; "
                        "name its rows by query_ids and its columns by key_ids"
                    )
                frame = frame.loc[list(given)] if given is ids.of_queries else frame[list(given)]
    array = frame.to_numpy()
    if array.dtype == object:
        if not all(isinstance(value, (bool, np.bool_)) for value in array.flat):
            raise NearfarError(
                "relevant is a table that holds other values than True and False; Booleans are needed"
            )
        array = array.astype(bool)
    elif array.dtype.kind in "iu" and zeros_and_ones(array):
        array = array == 1  # a table of this shape is a matrix, never positions
    if array.dtype != bool:
        raise NearfarError(
            "relevant is a table that holds other values than True, False, 0 and 1; of grades, pass table > 0"
        )
    return np.asarray(array)


def _of_series(series: pandas.Series, ids: ItemIds) -> dict[Hashable, object] | np.ndarray | list[object]:
    """A column: by its index where that holds the query ids, by position otherwise."""
    if getattr(series.index, "nlevels", 1) > 1:
        raise NearfarError(
            "relevant is a Series with an index of several levels; make a dictionary of it: {q: "
            "t.droplevel(0).to_dict() for q, t in series.groupby(level=0)}, with query_ids= and key_ids="
        )
    names = list(series.index)
    if names != list(range(len(names))):
        if ids.of_queries is not None:
            return dict(zip(names, series, strict=True))
        if all(isinstance(name, str) for name in names):
            raise NearfarError(
                f"relevant is a Series named by {names[0]!r} …; pass query_ids= to read it by name, or "
                "relevant.to_numpy() for the order of the queries"
            )
    # A nullable column would become floats, and its gaps NaN.
    plain = isinstance(series.dtype, np.dtype) and series.dtype != object
    return series.to_numpy() if plain else list(series)


# -- qrels -----------------------------------------------------------------------------------------------------
def _from_qrels(
    qrels: Mapping[Hashable, Any], ids: ItemIds, device: torch.device, own: NDArray[np.int64] | None
) -> Relevance:
    if ids.of_queries is None or ids.of_keys is None:
        missing = " and ".join(
            name
            for name, given in (("query_ids=", ids.of_queries), ("key_ids=", ids.of_keys))
            if given is None
        )
        raise NearfarError(
            f"relevant is a dictionary, which names queries and keys by their ids: pass {missing}, the ids in "
            "the order of the rows. If its ids are positions, pass range(len(queries)) and range(len(keys))"
        )
    rows: list[NDArray[np.int64]] = []
    grades: list[NDArray[np.float64]] = []
    unknown: list[Hashable] = []
    for name in ids.of_queries:
        entry = qrels.get(name, ())
        if isinstance(entry, Mapping):
            named = [key for key, grade in entry.items() if is_relevant_grade(name, grade)]
        elif is_key(entry) or is_single(entry):
            named = [entry.item() if is_single(entry) else entry]
        elif is_nothing(entry):
            named = []
        elif isinstance(entry, Iterable):
            named = [v.item() if is_single(v) else v for v in entry]
            odd = [
                v
                for v in named
                if not isinstance(v, (str, bytes)) and isinstance(v, (bool, np.bool_, float, Iterable))
            ]
            if odd and not any(ids.knows(v) for v in odd):
                raise NearfarError(
                    f"relevant[{name!r}] holds {shown(odd[0])}; ids of keys are needed, or a dictionary of grades"
                )
        else:
            raise NearfarError(
                f"relevant[{name!r}] is {shown(entry)}; a dictionary {{key: grade}} or a list of keys is needed"
            )
        places = [ids.place(key) for key in named]
        unknown += [key for key, place in zip(named, places, strict=True) if place < 0]
        of_each = {
            place: float(entry[key]) if isinstance(entry, Mapping) else 1.0
            for key, place in zip(named, places, strict=True)
            if place >= 0
        }
        rows.append(np.array(sorted(of_each), dtype=np.int64))
        grades.append(np.array([of_each[place] for place in sorted(of_each)]))
    known = set(ids.of_queries)
    strangers = [name for name in qrels if name not in known]
    if qrels and len(strangers) == len(qrels):
        raise NearfarError(
            f"relevant names queries such as {strangers[0]!r}, and query_ids such as {ids.of_queries[0]!r}: "
            "they have none in common; 1 and '1' are different ids"
        )
    if unknown and not any(len(row) for row in rows):
        raise NearfarError(
            f"relevant names keys such as {unknown[0]!r}, and key_ids such as {ids.of_keys[0]!r}: they have "
            "none in common; 1 and '1' are different ids"
        )
    if unknown or strangers:
        parts = []
        if unknown:
            parts.append(
                f"{len(unknown)} relevant keys are not among key_ids (such as {unknown[0]!r}) and cannot be "
                "retrieved; a query that has no other is left out and counted"
            )
        if strangers:
            parts.append(
                f"{len(strangers)} of its {len(qrels)} queries are not among query_ids (such as {strangers[0]!r})"
            )
        warnings.warn("relevant: " + "; ".join(parts), stacklevel=5)
    pairs = as_pairs(rows)
    graded = torch.from_numpy(np.concatenate(grades)) if grades else None
    return _from_pairs(*pairs, ids.queries, ids.keys, device, own, graded)


# -- pairs -----------------------------------------------------------------------------------------------------
def _from_pairs(
    row: Tensor,
    column: Tensor,
    n: int,
    m: int,
    device: torch.device,
    own: NDArray[np.int64] | None,
    grades: Tensor | None = None,
) -> Relevance:
    row, column = row.to(device).long(), column.to(device).long()
    grades = None if grades is None or bool((grades == 1).all()) else grades.to(device)
    mine = _on(own, device)
    if mine is not None:
        others = column != mine[row]
        row, column = row[others], column[others]
        grades = None if grades is None else grades[others]
    starts = torch.zeros(n + 1, dtype=torch.int64, device=device)
    starts[1:] = torch.bincount(row, minlength=n).cumsum(0)
    order = torch.argsort(row, stable=True)
    grades = None if grades is None else grades[order]
    return Relevance(n, m, starts=starts, indices=column[order], own=mine, grades=grades)


def _on(own: NDArray[np.int64] | None, device: torch.device) -> Tensor | None:
    return None if own is None else torch.from_numpy(own).to(device)


def _check_matrix_shape(shape: Sequence[int], n: int, m: int) -> None:
    if tuple(shape) != (n, m):
        raise NearfarError(
            f"relevant is a matrix {tuple(shape)}, but there are {n} queries and {m} keys: (queries, keys) is needed"
        )
