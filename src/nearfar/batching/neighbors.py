"""The nearest neighbours of every item, by exact or approximate search: what hard-negative batches are built from."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, replace

import faiss
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import array, flag, number, whole_number
from nearfar.batching.base import as_ids, compare_ids, digest
from nearfar.errors import NearfarError, nearest_name
from nearfar.ids import Ids, canonical_ids

__all__ = ["Neighbors", "SearchResult", "approximate", "as_neighbors", "exhaustive", "nearest_neighbors"]


log = logging.getLogger("nearfar.batching")

_BLOCK = 8192  # queries per call: bounds the 64-bit answers FAISS gives
_SAMPLE = 1000  # queries on which recall is measured
_MARGIN = 2.0  # standard errors by which the measured recall must exceed the bound


@dataclass
class SearchResult:
    """What a search returns; see `nearfar.batching.Neighbors`."""

    indices: NDArray[np.int32]
    similarities: NDArray[np.float32]
    exact: bool
    index: str
    recall: float
    queries: int = 0


def _without_self(
    values: NDArray[np.float32], indices: NDArray[np.int64], own: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Drop each query from its k + 1 answers, or the last answer where exact duplicates crowded it out."""
    drop = indices == own[:, None]
    drop[~drop.any(1), -1] = True
    rows, k = len(own), indices.shape[1] - 1
    return values[~drop].reshape(rows, k), indices[~drop].reshape(rows, k)


def _search_all(
    index: faiss.Index, rows: NDArray[np.float32], k: int, which: NDArray[np.int64]
) -> SearchResult:
    indices = np.empty((len(which), k), np.int32)
    values = np.empty((len(which), k), np.float32)
    for begin in range(0, len(which), _BLOCK):
        part = which[begin : begin + _BLOCK]
        block = _without_self(*index.search(rows[part], k + 1), part)
        values[begin : begin + len(part)], indices[begin : begin + len(part)] = block
    return SearchResult(indices, values, True, "flat", 1.0)


def exhaustive(rows: NDArray[np.float32], k: int) -> SearchResult:
    """All pairs, in blocks."""
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return _search_all(index, rows, k, np.arange(len(rows)))


def _recall(
    indices: NDArray[np.int32], truth: SearchResult, seen: NDArray[np.float32]
) -> tuple[float, float]:
    """Mean recall and its standard error. A tie with the k-th true neighbour is as good as that neighbour."""
    edge = truth.similarities[:, -1:] - 1e-6
    share = ((seen >= edge) & (indices >= 0)).mean(1)
    return float(share.mean()), float(share.std(ddof=1) / np.sqrt(len(share)))


def approximate(rows: NDArray[np.float32], k: int, min_recall: float, seed: int) -> SearchResult | None:
    """Search an inverted file with as many probes as the recall needs; None where all pairs are better.

    The number of probes is doubled until the measured recall lies two standard errors above ``min_recall`` on
    one sample of queries; the recall that is reported comes from a second sample, which must reach
    ``min_recall`` too.
    """
    n, d = rows.shape
    rng = np.random.default_rng(seed)
    cells = max(1, min(int(2 * np.sqrt(n)), n // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = 10, 1 + seed % 2**31, 64
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    index.add(rows)

    size = min(_SAMPLE, n // 2)
    sample = rng.choice(n, 2 * size, replace=False)
    flat = faiss.IndexFlatIP(d)
    flat.add(rows)
    began = time.perf_counter()
    truth = _search_all(flat, rows, k, sample[:size])
    all_pairs = time.perf_counter() - began
    check = None
    probes = min(8, cells)
    while True:
        index.nprobe = probes
        began = time.perf_counter()
        tried = _search_all(index, rows, k, sample[:size])
        cost = time.perf_counter() - began
        recall, error = _recall(tried.indices, truth, tried.similarities)
        log.debug("%d of %d cells: recall %.4f, %.2g s per query", probes, cells, recall, cost / size)
        if recall - _MARGIN * error >= min_recall or (probes == cells and recall >= min_recall):
            check = check or _search_all(flat, rows, k, sample[size:])
            again = _search_all(index, rows, k, sample[size:])
            recall, _ = _recall(again.indices, check, again.similarities)
            if recall >= min_recall:
                break
        if probes == cells or 2 * probes >= cells // 2 or cost > all_pairs:
            warnings.warn(
                f"an inverted file over {n} items reaches recall {recall:.3f} with {probes} of {cells} "
                f"cells, short of "
                f"{min_recall:g}, and wider probing would cost as much as comparing all pairs: the search "
                f"is exact and "
                f"takes about {all_pairs / size * n:.0f} s; a lower min_recall would be faster",
                stacklevel=3,
            )
            return None
        probes = min(2 * probes, cells)
    result = _search_all(index, rows, k, np.arange(n))
    short = np.flatnonzero((result.indices < 0).any(1))
    if len(short):  # too few candidates in the probed cells: rare, and answered exactly
        better = _search_all(flat, rows, k, short)
        result.indices[short], result.similarities[short] = better.indices, better.similarities
    result.exact, result.recall, result.queries = False, recall, size
    result.index = f"IVF, {cells} cells, {probes} probes"
    return result


# From here on an exact search takes minutes on a few cores, and an index is tried first.
APPROXIMATE_FROM = 50_000
_METRICS = ("cosine", "dot")
_ROWS = 65_536  # rows looked at together


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The ``k`` nearest neighbours of each of ``n`` items, nearest first, by position in the embeddings.

    An item is never its own neighbour, and a row names nobody twice: of a neighbour that comes again (lists that
    were joined, rows padded with their last neighbour) the first, nearest place is kept, with a warning that counts
    them. ``indices`` (n, k) int32, with -1 where there is none, at the end of the row; ``similarities`` (n, k)
    float32, falling along each row (-inf where there is no neighbour), or None for lists that came without. ``ids``
    names the items, so that a list in one order cannot be used with a dataset in a different one. ``exact``,
    ``index`` and ``recall`` say how the list was found: ``recall`` is 1 for an exact search, otherwise the
    share of true neighbours found for ``queries`` sampled items, and None if unknown.
    """

    indices: NDArray[np.int32]
    similarities: NDArray[np.float32] | None = None
    ids: np.ndarray | None = None
    metric: str = "cosine"
    exact: bool = False
    index: str = "given"
    recall: float | None = None
    queries: int = 0

    def __post_init__(self) -> None:
        needs = "positions of neighbours as whole numbers of shape (n, k), with -1 for none"
        indices = array("neighbour indices", self.indices, needs, "iu")
        if indices.ndim != 2 or not indices.shape[1]:
            raise NearfarError(f"neighbour indices have shape {indices.shape}; give {needs}")
        values = self.similarities
        if values is not None:
            values = array("similarities", values, "numbers of the shape of the neighbour indices, or None")
            if values.shape != indices.shape:
                raise NearfarError(
                    f"similarities {values.shape} do not match neighbour indices {indices.shape}"
                )
            values = np.ascontiguousarray(values, dtype=np.float32)
        indices, values = _as_sets(indices, values)
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "similarities", values)
        if self.ids is not None:
            object.__setattr__(self, "ids", as_ids(self.ids, len(indices)))
        for name in ("metric", "index"):
            if not isinstance(getattr(self, name), str):
                raise NearfarError(f"{name} is {getattr(self, name)!r}; a text is needed")
        object.__setattr__(self, "exact", flag("exact", self.exact))
        object.__setattr__(self, "queries", whole_number("queries", self.queries, 0))
        if self.recall is not None:
            object.__setattr__(self, "recall", number("recall", self.recall, 0, 1))

    @property
    def n(self) -> int:
        """Number of items."""
        return int(self.indices.shape[0])

    @property
    def k(self) -> int:
        """Neighbours listed per item."""
        return int(self.indices.shape[1])

    def check_ids(self, ids: Ids) -> None:
        """Raise unless ``ids`` are the ids of this list, in its order."""
        if self.ids is None:
            raise NearfarError("these neighbours carry no ids to compare; pass ids= to nearest_neighbors")
        compare_ids(self.ids, canonical_ids(ids), "neighbour list", "dataset")

    def aligned_to(self, ids: Ids) -> Neighbors:
        """The same list for the same items in the order of ``ids``.

        >>> near = Neighbors(np.array([[1], [0], [1]]), ids=np.array(["a", "b", "c"]))
        >>> near.aligned_to(["c", "a", "b"]).indices.ravel().tolist()
        [2, 2, 1]
        """
        if self.ids is None:
            raise NearfarError("these neighbours carry no ids to align by; pass ids= to nearest_neighbors")
        position = {name: at for at, name in enumerate(self.ids.tolist())}
        target_ids = canonical_ids(ids)
        wanted = target_ids.tolist()
        unknown = [name for name in wanted if name not in position]
        if unknown or len(wanted) != self.n or len(set(wanted)) != self.n or len(position) != self.n:
            raise NearfarError(
                f"the neighbour list has {self.n} items and {len(position)} distinct ids, the order asked "
                f"for "
                f"{len(wanted)} with {len(set(wanted))} distinct ids, {len(unknown)} of them unknown"
                + (
                    f" (first {unknown[0]!r}; {nearest_name(str(unknown[0]), map(str, list(position)[:1000]))})"
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
        return replace(self, indices=target[self.indices[source]], similarities=values, ids=target_ids)

    def too_close(self, threshold: float | None) -> NDArray[np.int32]:
        """How many leading neighbours of each item are at least so similar, (n,); 0 without a threshold.

        These are likely false negatives: near-duplicates that a batch would push apart.
        """
        if threshold is None:
            return np.zeros(self.n, np.int32)
        threshold = number("threshold", threshold, infinite=True)
        if self.similarities is None:
            raise NearfarError(
                "false_negative_threshold needs similarities, and this neighbour list has none; "
                "build it with nearest_neighbors"
            )
        count = np.empty(self.n, np.int32)
        for begin in range(0, self.n, _ROWS):
            values = self.similarities[begin : begin + _ROWS]
            if (values[:, 1:] - 1e-6 > values[:, :-1]).any():
                raise NearfarError(
                    "similarities must fall along each row, from the nearest neighbour outwards"
                )
            real = self.indices[begin : begin + len(values)] >= 0
            count[begin : begin + len(values)] = ((values >= threshold) & real).sum(1)
        return count

    def count_inside(
        self, items: NDArray[np.int32], k: int, close: NDArray[np.int32], label: NDArray[np.int32]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Of each item given, how many of its first ``k`` neighbours have its ``label`` (n,), and how many of its
        ``close`` (n,) leading ones."""
        from nearfar.batching import _kernels

        return _kernels.count_inside(items, self.indices, k, close, label)

    def fingerprint(self) -> str:
        """A short hash of the list (of about 20,000 evenly spaced rows) and of its ids."""
        return digest(self.indices, *([] if self.ids is None else [self.ids]))


def as_neighbors(neighbors: Neighbors | NDArray[np.integer] | Tensor) -> Neighbors:
    """Neighbours as they are, or an (n, k) array of indices wrapped as such."""
    return neighbors if isinstance(neighbors, Neighbors) else Neighbors(neighbors)  # type: ignore[arg-type]


def _as_sets(
    indices: np.ndarray, values: NDArray[np.float32] | None
) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
    """Checked rows in which nobody comes twice and -1 stands at the end; copies only where something changes."""
    n = len(indices)
    result = np.ascontiguousarray(indices, np.int32) if n <= np.iinfo(np.int32).max else None
    if result is None:
        raise NearfarError(f"{n} items do not fit the 32-bit positions of a plan")
    repeats, rows, first = 0, 0, -1
    own_result, own_values = False, False  # the caller's own arrays are never written to
    for begin in range(0, n, _ROWS):  # in blocks: no second array of n x k
        given = indices[begin : begin + _ROWS]
        if given.size and (
            given.min() < -1 or given.max() >= n
        ):  # before the cut to 32 bits, which would wrap
            raise NearfarError(
                f"neighbour indices must be positions from 0 to {n - 1} (or -1 for none); rows from {begin} hold "
                f"{given.min()} to {given.max()}: they belong to a different set of items"
            )
        block = result[begin : begin + _ROWS]
        own = np.flatnonzero((block == np.arange(begin, begin + len(block))[:, None]).any(1))
        if len(own):
            raise NearfarError(
                f"item {begin + own[0]} is listed as its own neighbour; put -1 in its place, or build the "
                "list with nearest_neighbors"
            )
        none = block < 0
        ordered = np.sort(block, axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
        mend = np.flatnonzero(twice | (none[:, :-1] & ~none[:, 1:]).any(1))
        if len(mend):
            drop = _come_again(block[mend])
            repeats, rows = repeats + int(drop.sum()), rows + int(twice.sum())
            first = begin + int(np.argmax(twice)) if first < 0 and twice.any() else first
            gone = drop | none[mend]
            order = np.argsort(gone, axis=1, kind="stable")  # what stays keeps its order
            if not own_result:
                result, own_result = result.copy(), True
            kept = np.take_along_axis(block[mend], order, 1)
            gone = np.take_along_axis(gone, order, 1)
            result[begin + mend] = np.where(gone, -1, kept)
            if values is not None:
                values, own_values = values if own_values else values.copy(), True
                values[begin + mend] = np.take_along_axis(values[begin + mend], order, 1)
        if values is not None:
            values, own_values = _checked(values, result, begin, own_values)
    if repeats:
        warnings.warn(
            f"{repeats} neighbours in {rows} of {n} rows come a second time in their row, first in row {first}; each "
            "is kept once, where it is nearest, and the row is shorter. Rows that are padded should end in -1",
            stacklevel=4,
        )
    return result, values


def _checked(
    values: NDArray[np.float32], indices: NDArray[np.int32], begin: int, own: bool
) -> tuple[NDArray[np.float32], bool]:
    """Similarities of a block of rows: numbers where there is a neighbour, -inf where there is none."""
    part, none = values[begin : begin + _ROWS], indices[begin : begin + _ROWS] < 0
    bad = np.isnan(part) & ~none
    if bad.any():
        row = int(np.argmax(bad.any(1)))
        raise NearfarError(
            f"similarities hold {int(bad.sum())} NaN, first in row {begin + row}; leave them out"
        )
    if (none & (part != -np.inf)).any():
        values, own = values if own else values.copy(), True
        values[begin : begin + _ROWS][none] = -np.inf
    return values, own


def _come_again(block: NDArray[np.int32]) -> NDArray[np.bool_]:
    """True where a neighbour stands in its row a second time."""
    order = np.argsort(block, axis=1, kind="stable")  # the first of equals stays first
    ordered = np.take_along_axis(block, order, 1)
    again = np.zeros(block.shape, bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    placed = np.empty_like(again)
    np.put_along_axis(placed, order, again, 1)
    return placed


def nearest_neighbors(
    embeddings: Tensor | NDArray[np.floating],
    k: int,
    *,
    metric: str = "cosine",
    exact: bool | None = None,
    min_recall: float = 0.99,
    seed: int = 0,
    ids: Ids | None = None,
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
    if not isinstance(metric, str) or metric not in _METRICS:
        raise NearfarError(f"metric {metric!r} is unknown; {nearest_name(str(metric), _METRICS)}")
    min_recall = number("min_recall", min_recall, above=0, most=1)
    seed = whole_number("seed", seed, 0)
    exact = None if exact is None else flag("exact", exact)
    rows = _as_rows(embeddings, metric)
    n = len(rows)
    k = whole_number("k", k, 1)
    if k > n - 1:
        raise NearfarError(f"k={k} neighbours were asked for, but each of {n} items has only {n - 1} others")
    names = None if ids is None else as_ids(ids, n)
    result = None
    if not exact and (exact is False or n >= APPROXIMATE_FROM):
        result = approximate(rows, int(k), min_recall, seed)
    if result is None:
        result = exhaustive(rows, int(k))
    if metric == "cosine":
        np.clip(result.similarities, -1.0, 1.0, out=result.similarities)
    return Neighbors(
        indices=result.indices,
        similarities=result.similarities,
        ids=names,
        metric=metric,
        exact=result.exact,
        index=result.index,
        recall=result.recall,
        queries=result.queries,
    )


def _as_rows(embeddings: Tensor | NDArray[np.floating], metric: str) -> NDArray[np.float32]:
    """Checked float32 rows, of unit length for the cosine; a copy only where something changes."""
    rows = array("embeddings", embeddings, "numbers of shape (n, d)")
    if rows.ndim != 2 or not rows.size:
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
