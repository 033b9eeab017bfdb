"""Which keys are relevant to which queries, and which key is the query itself.

Counting ranks needs three views of it: the number of relevant keys per query, the relevant pairs, and the
piece under one tile. Labels stay labels, so that classes of thousands of items never become a list of pairs.
How relevance is read from what people have: ``nearfar.metrics.relevance_forms``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

__all__ = ["Relevance", "places_in_rows"]


@dataclass(frozen=True)
class Relevance:
    """Relevance of ``keys`` keys to ``queries`` queries, as labels that agree or as rows of indices.

    ``own``: the position among the keys of each query itself, −1 where it is not among them. That key is no
    candidate:
    it is never relevant, and counting leaves it out. ``without_label`` counts the queries and the keys whose
    label is missing.
    """

    queries: int
    keys: int
    labels: tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]] | None = None
    starts: Int64[Tensor, " boundaries"] | None = None
    indices: Int64[Tensor, " pairs"] | None = None
    own: Int64[Tensor, " n"] | None = None
    without_label: tuple[int, int] = (0, 0)

    def counts(self) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
        """Relevant keys of each query, and relevant queries of each key."""
        if self.labels is not None:
            of_queries, of_keys = self.labels
            classes = int(torch.cat([of_queries, of_keys]).max()) + 1
            per_class = (
                torch.bincount(of_queries, minlength=classes),
                torch.bincount(of_keys, minlength=classes),
            )
            numbers = per_class[1][of_queries], per_class[0][of_keys]
            if self.own is not None:
                rows = (self.own >= 0).nonzero().flatten()
                rows = rows[of_queries[rows] == of_keys[self.own[rows]]]
                numbers[0][rows] -= 1
                numbers[1].index_add_(0, self.own[rows], torch.full_like(rows, -1))
            return numbers
        starts, indices = self._rows()
        return starts.diff(), torch.bincount(indices, minlength=self.keys)

    def pairs(self) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
        """Query and key of every relevant pair."""
        if self.labels is not None:
            of_queries, of_keys = self.labels
            order = torch.argsort(of_keys, stable=True)
            first = torch.searchsorted(of_keys[order], of_queries)
            after = torch.searchsorted(of_keys[order], of_queries, right=True)
            rows, within = places_in_rows(after - first)
            columns = order[first[rows] + within]
            if self.own is None:
                return rows, columns
            others = columns != self.own[rows]
            return rows[others], columns[others]
        starts, indices = self._rows()
        return places_in_rows(starts.diff())[0], indices

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        """The relevance matrix under one tile."""
        if self.labels is not None:
            same = self.labels[0][rows, None] == self.labels[1][None, columns]
            if self.own is not None:
                same[self.own_entries(rows, columns)] = False
            return same
        starts, indices = self._rows()
        height, width = rows.stop - rows.start, columns.stop - columns.start
        tile = torch.zeros(height, width, dtype=torch.bool, device=indices.device)
        here = indices[starts[rows.start] : starts[rows.stop]] - columns.start
        row = places_in_rows(starts[rows.start : rows.stop + 1].diff())[0]
        inside = (here >= 0) & (here < width)
        tile[row[inside], here[inside]] = True
        return tile

    def own_entries(self, rows: slice, columns: slice) -> tuple[Int64[Tensor, " k"], Int64[Tensor, " k"]]:
        """Where, under one tile, a query meets itself."""
        if self.own is None:
            none = torch.zeros(0, dtype=torch.int64, device=self._device())
            return none, none
        column = self.own[rows] - columns.start
        line = ((column >= 0) & (column < columns.stop - columns.start)).nonzero().flatten()
        return line, column[line]

    def candidates(self) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
        """How many keys each query may be given, and how many queries each key."""
        device = self._device()
        of_queries = torch.full((self.queries,), self.keys, device=device)
        of_keys = torch.full((self.keys,), self.queries, device=device)
        if self.own is not None:
            inside = self.own >= 0
            of_queries -= inside.long()
            of_keys -= torch.bincount(self.own[inside], minlength=self.keys)
        return of_queries, of_keys

    def _device(self) -> torch.device:
        return self.labels[0].device if self.labels is not None else self._rows()[0].device

    def _rows(self) -> tuple[Tensor, Tensor]:
        assert self.starts is not None
        assert self.indices is not None
        return self.starts, self.indices


def places_in_rows(lengths: Int64[Tensor, " n"]) -> tuple[Int64[Tensor, " total"], Int64[Tensor, " total"]]:
    """The row of every element and its place in the row, for rows of these lengths."""
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    before = lengths.cumsum(0) - lengths
    return row, torch.arange(len(row), device=lengths.device) - before[row]
