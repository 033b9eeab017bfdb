"""Names of queries and keys, for relevance stated by name and for the place of a query in its own gallery."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import NearfarError
from nearfar.metrics.arguments import described, whole_numbers
from nearfar.metrics.labels import entries

__all__ = ["ItemIds"]


class ItemIds:
    """The ids of ``queries`` queries and ``keys`` keys in the order of their rows, where there are any.

    >>> ids = ItemIds(2, 3, ["a", "c"], ["a", "b", "c"])
    >>> ids.own(True), ids.place("b"), ids.place("z")
    (array([0, 2]), 1, -1)
    """

    def __init__(self, queries: int, keys: int, query_ids: Any = None, key_ids: Any = None) -> None:
        self.queries, self.keys = queries, keys
        self.of_queries = None if query_ids is None else _checked(query_ids, queries, "query_ids", "queries")
        self.of_keys = None if key_ids is None else _checked(key_ids, keys, "key_ids", "keys")
        self._places = {name: i for i, name in enumerate(self.of_keys or ())}
        if self.of_keys is not None and len(self._places) < keys:
            seen: set[Any] = set()
            twice = next(name for name in self.of_keys if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise NearfarError(f"key_ids holds {twice!r} more than once; an id names one key")

    @property
    def given(self) -> bool:
        return self.of_queries is not None or self.of_keys is not None

    def knows(self, name: Any) -> bool:
        """Whether a key has this id."""
        return self.place(name) >= 0

    def place(self, name: Any) -> int:
        """Position of the key with this id, −1 if there is none."""
        try:
            return self._places.get(name, -1)
        except TypeError:
            raise NearfarError(
                f"relevant names the key {described(name)}; ids are numbers or texts"
            ) from None

    def positions(self, names: Iterable[Any], where: str) -> NDArray[np.int64]:
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

    def own(self, leave_one_out: Any) -> NDArray[np.int64] | None:
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


def _checked(ids: Any, n: int, name: str, what: str) -> list[Any]:
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
            raise NearfarError(
                f"{name} holds {described(item)} for row {i}; ids are numbers or texts"
            ) from None
    return names
