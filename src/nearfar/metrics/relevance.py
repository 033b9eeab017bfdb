"""Which keys are relevant to which queries, by what ids they go, and which key is the query itself.

Counting ranks needs three views of it: the number of relevant keys per query, the relevant pairs, and the
piece under one tile. Labels stay labels, so that classes of thousands of items never become a list of pairs.
How relevance is read from what people have: ``nearfar.metrics.relevance_forms``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import entries, shown, whole_numbers
from nearfar.errors import NearfarError

__all__ = ["ItemIds", "Relevance", "places_in_rows"]


@dataclass(frozen=True)
class Relevance:
    """Relevance of ``keys`` keys to ``queries`` queries, as labels that agree or as rows of indices.

    ``own``: the position among the keys of each query itself, −1 where it is not among them. That key is no
    candidate:
    it is never relevant, and counting leaves it out. ``without_label`` counts the queries and the keys whose
    label is missing. ``grades``: how relevant each of the ``indices`` is, above 0; ``None`` where all count 1.
    """

    queries: int
    keys: int
    labels: tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]] | None = None
    starts: Int64[Tensor, " boundaries"] | None = None
    indices: Int64[Tensor, " pairs"] | None = None
    own: Int64[Tensor, " n"] | None = None
    without_label: tuple[int, int] = (0, 0)
    grades: Float64[Tensor, " pairs"] | None = None

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


class ItemIds:
    """The ids of ``queries`` queries and ``keys`` keys in the order of their rows, where there are any.

    >>> ids = ItemIds(2, 3, ["a", "c"], ["a", "b", "c"])
    >>> ids.own(True), ids.place("b"), ids.place("z")
    (array([0, 2]), 1, -1)
    """

    def __init__(self, queries: int, keys: int, query_ids: object = None, key_ids: object = None) -> None:
        self.queries, self.keys = queries, keys
        self.of_queries = None if query_ids is None else _checked(query_ids, queries, "query_ids", "queries")
        self.of_keys = None if key_ids is None else _checked(key_ids, keys, "key_ids", "keys")
        self._places = {name: i for i, name in enumerate(self.of_keys or ())}
        if self.of_keys is not None and len(self._places) < keys:
            seen: set[Hashable] = set()
            twice = next(name for name in self.of_keys if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise NearfarError(f"key_ids holds {twice!r} more than once; an id names one key")

    @property
    def given(self) -> bool:
        return self.of_queries is not None or self.of_keys is not None

    def knows(self, name: object) -> bool:
        """Whether a key has this id."""
        return self.place(name) >= 0

    def place(self, name: object) -> int:
        """Position of the key with this id, −1 if there is none."""
        try:
            return self._places.get(name, -1)
        except TypeError:
            raise NearfarError(f"relevant names the key {shown(name)}; ids are numbers or texts") from None

    def positions(self, names: Iterable[object], where: str) -> NDArray[np.int64]:
        """Positions of the keys with these ids; an unknown one is an error."""
        places = []
        for name in names:
            place = self.place(name)
            if place < 0:
                assert self.of_keys is not None
                raise NearfarError(
                    f"relevant: {where} names {name!r}, which is not among key_ids (such as "
                    f"{self.of_keys[0]!r}). With key_ids= lists hold ids, not positions, and 1 and '1' are "
                    "different ids"
                )
            places.append(place)
        return np.unique(np.array(places, dtype=np.int64))

    def own(self, leave_one_out: object) -> NDArray[np.int64] | None:
        """The position among the keys of each query itself, −1 where it is not among them; ``None``: not asked
        for."""
        if isinstance(leave_one_out, (bool, np.bool_)):
            if not leave_one_out:
                return None
            if self.of_queries is not None and self.of_keys is not None:
                places = np.array([self.place(name) for name in self.of_queries], dtype=np.int64)
                if (places < 0).all():
                    raise NearfarError(
                        f"leave_one_out: no query is among the keys: query_ids hold {self.of_queries[0]!r} …, "
                        f"key_ids {self.of_keys[0]!r} …; 1 and '1' are different ids"
                    )
                return places
            if self.queries != self.keys:
                raise NearfarError(
                    f"leave_one_out=True takes query i as key i, but there are {self.queries} queries and "
                    f"{self.keys} keys: pass leave_one_out=positions, for each query its own position among "
                    "the keys (−1: not there), or query_ids= and key_ids="
                )
            return np.arange(self.queries, dtype=np.int64)
        places = whole_numbers("leave_one_out", leave_one_out)
        if places.shape != (self.queries,):
            raise NearfarError(
                f"leave_one_out has shape {places.shape}; it is True, False, or for each of the {self.queries} "
                "queries its own position among the keys"
            )
        if ((places < -1) | (places >= self.keys)).any():
            raise NearfarError(
                f"leave_one_out holds positions from {places.min()} to {places.max()}, but keys are 0 to "
                f"{self.keys - 1} (−1: the query is not among them)"
            )
        return places


def _checked(ids: object, n: int, name: str, what: str) -> list[Hashable]:
    names = entries(name, ids)
    if len(names) != n:
        raise NearfarError(
            f"{name} has {len(names)} ids for {n} {what}; one for each is needed, in the order of the rows"
        )
    for i, item in enumerate(names):
        if item is None or type(item).__name__ in ("NAType", "NaTType") or item != item:
            raise NearfarError(f"{name} misses the id of row {i}; every item needs one")
        try:
            hash(item)
        except TypeError:
            raise NearfarError(f"{name} holds {shown(item)} for row {i}; ids are numbers or texts") from None
    return names
