"""The nearest neighbours of every item: what hard-negative and partition batches are built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.batching.base import as_ids, compare_ids, digest
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Neighbors", "as_neighbors", "nearest_neighbors"]

# From here on an exact search takes minutes on a few cores, and an index is tried first.
APPROXIMATE_FROM = 50_000
_METRICS = ("cosine", "dot")


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The ``k`` nearest neighbours of each of ``n`` items, nearest first, by position in the embeddings.

    An item is never its own neighbour. ``indices`` (n, k) int32, with -1 where there is none;
    ``similarities`` (n, k) float32, falling along each row, or None for lists that came without. ``ids``
    names the items, so that a list in one order cannot be used with a dataset in another. ``exact``,
    ``index`` and ``recall`` say how the list was found: ``recall`` is 1 for an exact search, otherwise the
    share of true neighbours found for ``queries`` sampled items, and None if unknown.
    """

    indices: NDArray[np.int32]
    similarities: NDArray[np.float32] | None = None
    ids: NDArray[Any] | None = None
    metric: str = "cosine"
    exact: bool = False
    index: str = "given"
    recall: float | None = None
    queries: int = 0

    def __post_init__(self) -> None:
        indices = np.asarray(self.indices)
        if indices.ndim != 2 or not np.issubdtype(indices.dtype, np.integer):
            raise NearfarError(
                f"neighbour indices must be whole numbers of shape (n, k), not {indices.dtype} "
                f"{indices.shape}"
            )
        n = len(indices)
        for begin in range(0, n, 65_536):  # in blocks: no second array of n x k
            block = indices[begin : begin + 65_536]
            if block.size and (block.min() < -1 or block.max() >= n):
                raise NearfarError(
                    f"neighbour indices must be positions from 0 to {n - 1} (or -1 for none); rows from "
                    f"{begin} hold "
                    f"{block.min()} to {block.max()}: they belong to another set of items"
                )
            own = np.flatnonzero((block == np.arange(begin, begin + len(block))[:, None]).any(1))
            if len(own):
                raise NearfarError(
                    f"item {begin + own[0]} is listed as its own neighbour; build the list with "
                    f"nearest_neighbors"
                )
        object.__setattr__(self, "indices", np.ascontiguousarray(indices, dtype=np.int32))
        if self.similarities is not None:
            values = np.ascontiguousarray(self.similarities, dtype=np.float32)
            if values.shape != indices.shape:
                raise NearfarError(
                    f"similarities {values.shape} do not match neighbour indices {indices.shape}"
                )
            object.__setattr__(self, "similarities", values)
        if self.ids is not None:
            object.__setattr__(self, "ids", as_ids(self.ids, n))

    @property
    def n(self) -> int:
        """Number of items."""
        return int(self.indices.shape[0])

    @property
    def k(self) -> int:
        """Neighbours listed per item."""
        return int(self.indices.shape[1])

    def check_ids(self, ids: Sequence[Any] | NDArray[Any]) -> None:
        """Raise unless ``ids`` are the ids of this list, in its order."""
        if self.ids is None:
            raise NearfarError("these neighbours carry no ids to compare; pass ids= to nearest_neighbors")
        compare_ids(self.ids, np.asarray(ids), "neighbour list", "dataset")

    def aligned_to(self, ids: Sequence[Any] | NDArray[Any]) -> Neighbors:
        """The same list for the same items in the order of ``ids``.

        >>> near = Neighbors(np.array([[1], [0], [1]]), ids=np.array(["a", "b", "c"]))
        >>> near.aligned_to(["c", "a", "b"]).indices.ravel().tolist()
        [2, 2, 1]
        """
        if self.ids is None:
            raise NearfarError("these neighbours carry no ids to align by; pass ids= to nearest_neighbors")
        position = {str(name): at for at, name in enumerate(self.ids)}
        wanted = [str(name) for name in ids]
        unknown = [name for name in wanted if name not in position]
        if unknown or len(wanted) != self.n or len(set(wanted)) != self.n or len(position) != self.n:
            raise NearfarError(
                f"the neighbour list has {self.n} items and {len(position)} distinct ids, the order asked "
                f"for "
                f"{len(wanted)} with {len(set(wanted))} distinct ids, {len(unknown)} of them unknown"
                + (
                    f" (first {unknown[0]!r}; {nearest_name(unknown[0], list(position)[:1000])})"
                    if unknown
                    else ""
                )
                + "; compute the neighbours of exactly these items"
            )
        source = np.array([position[name] for name in wanted])
        target = np.empty(self.n + 1, np.int32)
        target[source] = np.arange(self.n, dtype=np.int32)
        target[-1] = -1  # so that "none" stays none
        values = None if self.similarities is None else self.similarities[source]
        return replace(self, indices=target[self.indices[source]], similarities=values, ids=np.asarray(ids))

    def too_close(self, threshold: float | None) -> NDArray[np.int32]:
        """How many leading neighbours of each item are at least so similar, (n,); 0 without a threshold.

        These are likely false negatives: near-duplicates that a batch would push apart.
        """
        if threshold is None:
            return np.zeros(self.n, np.int32)
        if self.similarities is None:
            raise NearfarError(
                "false_negative_threshold needs similarities, and this neighbour list has none; "
                "build it with nearest_neighbors"
            )
        count = np.empty(self.n, np.int32)
        for begin in range(0, self.n, 65_536):
            values = self.similarities[begin : begin + 65_536]
            if values.shape[1] > 1 and (np.diff(values, axis=1) > 1e-6).any():
                raise NearfarError(
                    "similarities must fall along each row, from the nearest neighbour outwards"
                )
            count[begin : begin + len(values)] = (values >= threshold).sum(1)
        return count

    def fingerprint(self) -> str:
        """A short hash of the list (of about 20,000 evenly spaced rows) and of its ids."""
        return digest(self.indices, *([] if self.ids is None else [self.ids]))


def as_neighbors(neighbors: Neighbors | NDArray[np.integer] | Tensor) -> Neighbors:
    """Neighbours as they are, or an (n, k) array of indices wrapped as such."""
    if isinstance(neighbors, Neighbors):
        return neighbors
    if isinstance(neighbors, Tensor):
        neighbors = neighbors.detach().cpu().numpy()
    return Neighbors(np.asarray(neighbors))


def nearest_neighbors(
    embeddings: Tensor | NDArray[np.floating],
    k: int,
    *,
    metric: str = "cosine",
    exact: bool | None = None,
    min_recall: float = 0.99,
    seed: int = 0,
    ids: Sequence[Any] | NDArray[Any] | None = None,
) -> Neighbors:
    """The ``k`` nearest neighbours of every row of ``embeddings`` (n, d) among the other rows.

    ``metric`` is "cosine" (rows need not be normalised, a row of zeros is an error) or "dot". Below 50,000
    items, or with ``exact=True``, the search compares all pairs; above, or with ``exact=False``, an
    inverted-file index is built and searched ever more widely until its recall, measured on a sample against
    the exact answer, is at least ``min_recall``. Where that would cost as much as comparing all pairs, this
    is said in a warning and the search is exact. Memory is O(n (k + d)); no n x n matrix is stored.

    Equal similarities come in no particular order. Errors: fewer than ``k`` other items, values that are not
    finite.

    >>> near = nearest_neighbors(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), 1)
    >>> near.indices.ravel().tolist(), near.exact
    ([1, 0, 3, 2], True)
    """
    if metric not in _METRICS:
        raise NearfarError(f"metric {metric!r} is unknown; {nearest_name(str(metric), _METRICS)}")
    if not 0.0 < min_recall <= 1.0:
        raise NearfarError(f"min_recall is {min_recall}; give a share above 0, at most 1")
    rows = _as_rows(embeddings, metric)
    n = len(rows)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise NearfarError(f"k is {k!r}; give a whole number of at least 1")
    if k > n - 1:
        raise NearfarError(f"k={k} neighbours were asked for, but each of {n} items has only {n - 1} others")
    names = None if ids is None else as_ids(ids, n)
    from nearfar.batching import search

    found = None
    if not exact and (exact is False or n >= APPROXIMATE_FROM):
        found = search.approximate(rows, int(k), min_recall, seed)
    if found is None:
        found = search.exhaustive(rows, int(k))
    if metric == "cosine":
        np.clip(found.similarities, -1.0, 1.0, out=found.similarities)
    return Neighbors(
        indices=found.indices,
        similarities=found.similarities,
        ids=names,
        metric=metric,
        exact=found.exact,
        index=found.index,
        recall=found.recall,
        queries=found.queries,
    )


def _as_rows(embeddings: Tensor | NDArray[np.floating], metric: str) -> NDArray[np.float32]:
    """Checked float32 rows, of unit length for the cosine; a copy only where something changes."""
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.detach().cpu().float().numpy()
    rows = np.asarray(embeddings)
    if (
        rows.ndim != 2
        or not rows.size
        or not (np.issubdtype(rows.dtype, np.floating) or np.issubdtype(rows.dtype, np.integer))
    ):
        raise NearfarError(f"embeddings must be numbers of shape (n, d), not {rows.dtype} {rows.shape}")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(length))
    if len(bad):
        raise NearfarError(
            f"{len(bad)} of {len(rows)} embeddings are not finite, first row {bad[0]}; "
            "look at what made them before searching neighbours"
        )
    if metric == "dot":
        return rows
    zero = np.flatnonzero(length == 0)
    if len(zero):
        raise NearfarError(
            f"{len(zero)} of {len(rows)} embeddings are all zero, first row {zero[0]}: they have no "
            f"direction, so no "
            "cosine; drop these items (an empty text?) or use metric='dot'"
        )
    return (rows / length[:, None]).astype(np.float32)
