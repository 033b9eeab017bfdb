"""Which keys are relevant to which queries, in the forms people have them.

Counting ranks needs three views of it: the number of relevant keys per query, the relevant pairs, and the
piece under one tile. Labels stay labels, so that classes of thousands of items never become a list of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from nearfar.errors import NearfarError

__all__ = ["Relevance", "read_relevance"]


@dataclass(frozen=True)
class Relevance:
    """Relevance of ``keys`` keys to ``queries`` queries, as labels that agree or as rows of indices."""

    queries: int
    keys: int
    labels: tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]] | None = None
    starts: Int64[Tensor, " n+1"] | None = None
    indices: Int64[Tensor, " pairs"] | None = None

    def counts(self) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
        """Relevant keys of each query, and relevant queries of each key."""
        if self.labels is not None:
            of_queries, of_keys = self.labels
            classes = int(torch.cat([of_queries, of_keys]).max()) + 1
            per_class = (
                torch.bincount(of_queries, minlength=classes),
                torch.bincount(of_keys, minlength=classes),
            )
            return per_class[1][of_queries], per_class[0][of_keys]
        starts, indices = self._rows()
        return starts.diff(), torch.bincount(indices, minlength=self.keys)

    def pairs(self) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
        """Query and key of every relevant pair."""
        if self.labels is not None:
            of_queries, of_keys = self.labels
            order = torch.argsort(of_keys, stable=True)
            first = torch.searchsorted(of_keys[order], of_queries)
            after = torch.searchsorted(of_keys[order], of_queries, right=True)
            rows, within = _ranges(after - first)
            return rows, order[first[rows] + within]
        starts, indices = self._rows()
        return _ranges(starts.diff())[0], indices

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        """The relevance matrix under one tile."""
        if self.labels is not None:
            return self.labels[0][rows, None] == self.labels[1][None, columns]
        starts, indices = self._rows()
        height, width = rows.stop - rows.start, columns.stop - columns.start
        tile = torch.zeros(height, width, dtype=torch.bool, device=indices.device)
        here = indices[starts[rows.start] : starts[rows.stop]] - columns.start
        row = _ranges(starts[rows.start : rows.stop + 1].diff())[0]
        inside = (here >= 0) & (here < width)
        tile[row[inside], here[inside]] = True
        return tile

    def _rows(self) -> tuple[Tensor, Tensor]:
        assert self.starts is not None
        assert self.indices is not None
        return self.starts, self.indices


def read_relevance(relevant: Any, queries: int, keys: int, device: torch.device) -> Relevance:
    """``relevant`` as the user gave it, checked and brought to one of two forms.

    ``None``: query i belongs to key i. A 1-d tensor or flat list of integers: the index of each query's key
    (−1: none). A list of lists: the indices of each query's keys. A pair ``(query_labels, key_labels)`` as a
    tuple: equal labels are relevant. A Boolean (queries, keys) matrix, dense or sparse (PyTorch, SciPy).
    """
    if relevant is None:
        if queries != keys:
            raise NearfarError(
                f"{queries} queries and {keys} keys cannot be paired by position; state who belongs to "
                "whom with relevant= (an index for each query, lists of indices, or a pair of label lists)"
            )
        return _from_rows(torch.arange(queries + 1), torch.arange(queries), queries, keys, device)
    if isinstance(relevant, tuple):
        return _from_labels(relevant, queries, keys, device)
    if hasattr(relevant, "tocsr"):
        matrix = relevant.tocsr()
        _check_matrix_shape(matrix.shape, queries, keys)
        row, column = matrix.nonzero()
        return _from_pairs(torch.as_tensor(row), torch.as_tensor(column), queries, keys, device)
    if isinstance(relevant, Tensor) and relevant.layout != torch.strided:
        _check_matrix_shape(relevant.shape, queries, keys)
        entries = relevant.to_sparse_coo().coalesce()
        row, column = entries.indices()[:, entries.values() != 0]
        return _from_pairs(row, column, queries, keys, device)
    if isinstance(relevant, Sequence) and len(relevant) and not _is_integer(relevant[0]):
        return _from_lists(relevant, queries, keys, device)
    array = torch.as_tensor(relevant)
    if array.ndim == 2 and array.dtype == torch.bool:
        _check_matrix_shape(array.shape, queries, keys)
        row, column = array.nonzero().unbind(1)
        return _from_pairs(row, column, queries, keys, device)
    if array.ndim == 1 and not array.is_floating_point() and array.dtype != torch.bool:
        if len(array) != queries:
            raise NearfarError(
                f"relevant has {len(array)} entries for {queries} queries; it takes one for each"
            )
        row = torch.arange(queries, device=array.device)
        return _from_pairs(row[array != -1], array[array != -1].long(), queries, keys, device)
    raise NearfarError(
        f"relevant of shape {tuple(array.shape)} and type {array.dtype} is not understood: pass an integer "
        "for each "
        "query, a list of index lists, a Boolean (queries, keys) matrix, or a tuple (query_labels, "
        "key_labels)"
    )


def _from_labels(relevant: tuple[Any, ...], queries: int, keys: int, device: torch.device) -> Relevance:
    if len(relevant) != 2 or len(relevant[0]) != queries or len(relevant[1]) != keys:
        sizes = " and ".join(str(len(part)) for part in relevant)
        raise NearfarError(
            f"a tuple states labels: ({queries} query labels, {keys} key labels), but its parts have "
            f"{sizes}; lists of relevant indices go in as a list, not as a tuple"
        )
    parts = [p.detach().cpu().numpy() if isinstance(p, Tensor) else np.asarray(p) for p in relevant]
    if any(part.ndim != 1 for part in parts):
        raise NearfarError(
            "labels are one for each item; for items with several labels pass a Boolean matrix"
        )
    _, codes = np.unique(np.concatenate(parts), return_inverse=True)
    of_all = torch.from_numpy(codes.reshape(-1).astype(np.int64)).to(device)
    return Relevance(queries, keys, labels=(of_all[:queries], of_all[queries:]))


def _from_lists(relevant: Sequence[Any], queries: int, keys: int, device: torch.device) -> Relevance:
    if len(relevant) != queries:
        raise NearfarError(f"relevant lists the keys of {len(relevant)} queries, but there are {queries}")
    rows = [torch.as_tensor(row, dtype=torch.int64).reshape(-1).unique() for row in relevant]
    row = _ranges(torch.tensor([len(r) for r in rows]))[0]
    return _from_pairs(row, torch.cat(rows), queries, keys, device)


def _from_pairs(row: Tensor, column: Tensor, queries: int, keys: int, device: torch.device) -> Relevance:
    row, column = row.long(), column.long()
    outside = ((column < 0) | (column >= keys)).nonzero().flatten()
    if len(outside):
        at = int(outside[0])
        raise NearfarError(
            f"query {int(row[at])} names key {int(column[at])} as relevant, but keys are 0 to {keys - 1}; "
            "class labels go in as a tuple (query_labels, key_labels)"
        )
    starts = torch.zeros(queries + 1, dtype=torch.int64, device=row.device)
    starts[1:] = torch.bincount(row, minlength=queries).cumsum(0)
    order = torch.argsort(row, stable=True)
    return _from_rows(starts, column[order], queries, keys, device)


def _from_rows(starts: Tensor, indices: Tensor, queries: int, keys: int, device: torch.device) -> Relevance:
    return Relevance(queries, keys, starts=starts.to(device), indices=indices.to(device))


def _ranges(lengths: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " total"], Int64[Tensor, " total"]]:
    """The row of every element and its place in the row, for rows of these lengths."""
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    before = lengths.cumsum(0) - lengths
    return row, torch.arange(len(row), device=lengths.device) - before[row]


def _check_matrix_shape(shape: Sequence[int], queries: int, keys: int) -> None:
    if tuple(shape) != (queries, keys):
        raise NearfarError(
            f"the relevance matrix is {tuple(shape)}, but there are {queries} queries and {keys} keys"
        )


def _is_integer(entry: Any) -> bool:
    return isinstance(entry, int | np.integer) and not isinstance(entry, bool)
