"""Indexes of rows in files: centres of cells, codes in memory, vectors mapped, and how widely a search must go for a
recall.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from nearfar.batching.neighbors import _MARGIN, SearchResult, _recall, _without_self
from nearfar.errors import NearfarError

__all__ = [
    "POINTS",
    "RefinedIndex",
    "cell_centres",
    "checked_rows",
    "flat_head",
    "lists_of",
    "nearest_stored",
    "padded",
    "stored_vectors",
]


log = logging.getLogger("nearfar.batching")

#: queries of one search: bounds the 64-bit candidates that FAISS gives
QUERIES = 8192
_REFINE, _MOST_REFINE = 2, 32  # candidates for each neighbour that are compared exactly
_FIRST_PROBES = 4
_BLOCK_BYTES = 64 << 20  # of stored vectors that are compared with sampled queries at once


class RefinedIndex:
    """The index of a folder: 4-bit codes in memory, whose best ``refine`` · k are compared exactly with the vectors,
    which are mapped. Rows are those of the files, in the order of the cells."""

    def __init__(self, folder: Path, probes: int = _FIRST_PROBES, refine: float = _REFINE) -> None:
        self._codes: Any = faiss.read_index(str(folder / "codes.faiss"))
        vectors = faiss.read_index(str(folder / "vectors.faiss"), cast(Any, faiss).IO_FLAG_MMAP_IFC)
        self._index = faiss.IndexRefine(self._codes, vectors)
        self.probes, self.refine = min(probes, self.cells), refine

    @property
    def cells(self) -> int:
        """Cells of the index, of which a query looks into its ``probes`` nearest."""
        return int(self._codes.nlist)

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities and rows of the ``k`` best of each query (m, width), -1 where there are no more."""
        self._codes.nprobe, self._index.k_factor = self.probes, self.refine
        similarity, row = self._index.search(queries, k)
        return similarity, row

    def recall(
        self, queries: NDArray[np.float32], truth: SearchResult, own: NDArray[np.int64] | None = None
    ) -> tuple[float, float]:
        """The mean recall of a search for queries whose true neighbours are known, and its standard error; ``own`` are
        the rows of the queries themselves, which are no neighbours."""
        k = truth.indices.shape[1]
        similarity, row = self.search(queries, k + (own is not None))
        if own is not None:
            similarity, row = _without_self(similarity, row, own)
        return _recall(row.astype(np.int32), truth, similarity)

    def tune(
        self,
        queries: NDArray[np.float32],
        truth: SearchResult,
        min_recall: float,
        own: NDArray[np.int64] | None = None,
    ) -> None:
        """Look into more cells until the recall lies two standard errors above ``min_recall``; where the codes are too
        coarse for that, compare more candidates."""
        before = 0.0
        while True:
            recall, error = self.recall(queries, truth, own)
            log.info("%d of %d cells, %g for each: recall %.4f", self.probes, self.cells, self.refine, recall)
            if recall - _MARGIN * error >= min_recall:
                return
            # More cells, as long as they help.
            if self.probes < self.cells and (recall - before > 0.002 or self.refine >= _MOST_REFINE):
                self.probes = min(math.ceil(self.probes * 2**0.5), self.cells)
            elif self.refine < _MOST_REFINE:
                self.refine *= 2
            else:
                return
            before = recall


def nearest_stored(
    vectors: NDArray[np.float16], queries: NDArray[np.float32], k: int, own: NDArray[np.int64] | None = None
) -> SearchResult:
    """The ``k`` true neighbours of some queries among all stored rows, which are read in blocks."""
    best = faiss.ResultHeap(len(queries), k + (own is not None), keep_max=True)
    block = max(1, _BLOCK_BYTES // (4 * vectors.shape[1]))
    for begin in range(0, len(vectors), block):
        part = vectors[begin : begin + block].astype(np.float32)
        most = min(k + (own is not None), len(part))
        similarity, row = faiss.knn(queries, part, most, metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(similarity, row + begin)
    best.finalize()
    similarity, row = (best.D, best.I) if own is None else _without_self(best.D, best.I, own)
    return SearchResult(row.astype(np.int32), similarity, True, "flat", 1.0)


@dataclass(frozen=True)
class Stretch:
    """Rows whose lists are searched, and recorded as done, together."""

    work: Path
    build: str  # of the index: a process may outlive it, and its folder hold a new one
    n: int
    width: int
    k: int
    probes: int
    refine: float
    metric: str
    exact: bool  # all pairs are compared
    begin: int
    end: int


@lru_cache(maxsize=1)
def _opened(work: Path, build: str, probes: int, refine: float) -> RefinedIndex:
    return RefinedIndex(work, probes, refine)


def lists_of(stretch: Stretch) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """The neighbours of a stretch of stored rows, by row, and their similarities."""
    vectors = stored_vectors(stretch.work, stretch.n, stretch.width)
    rows, k = stretch.end - stretch.begin, stretch.k
    indices, values = np.empty((rows, k), np.int32), np.empty((rows, k), np.float16)
    for low in range(stretch.begin, stretch.end, QUERIES):
        own = np.arange(low, min(low + QUERIES, stretch.end))
        queries = vectors[own].astype(np.float32)
        if stretch.exact:
            best = nearest_stored(vectors, queries, k, own)
            similarity, row = best.similarities, best.indices.astype(np.int64)
        else:
            index = _opened(stretch.work, stretch.build, stretch.probes, stretch.refine)
            similarity, row = _without_self(*index.search(queries, k + 1), own)
        similarity = np.where(row < 0, -np.inf, similarity)
        if stretch.metric == "cosine":
            similarity = np.minimum(similarity, 1.0)
        part = slice(low - stretch.begin, low - stretch.begin + len(own))
        indices[part], values[part] = row, similarity
    return indices, values


def close_index() -> None:
    """Let go of the index that `lists_of` keeps open between stretches."""
    _opened.cache_clear()


# -- files -----------------------------------------------------------------------------------------------------
def padded(rows: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """A copy with columns of zeros up to ``width``, which change no product."""
    wide = np.zeros((len(rows), width), np.float32)
    wide[:, : rows.shape[1]] = rows
    return wide


def flat_head(n: int, width: int) -> bytes:
    """What FAISS writes before the rows of a flat float16 index: the rows themselves are written by others."""
    index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index.is_trained, index.ntotal = True, n
    empty = bytes(faiss.serialize_index(index))
    return empty[:-8] + np.uint64(n * width * 2).tobytes()


def stored_vectors(folder: Path, n: int, width: int) -> NDArray[np.float16]:
    """The vectors of a folder, mapped: in the order of the cells, with columns of zeros up to ``width``."""
    offset = len(flat_head(n, width))
    return np.asarray(np.memmap(folder / "vectors.faiss", np.float16, "r", offset, (n, width)))


#: rows of the sample for each cell
POINTS = 64
_HALF = 65_504  # the largest float16
#: rows compared with all centres, times the centres, in a pass of k-means over all of them: 5 s of a core for 128 dims
_WORK = 400_000_000


def checked_rows(
    given: NDArray[np.float32], positions: NDArray[np.int64], width: int, metric: str
) -> NDArray[np.float32]:
    """Checked rows of unit length (cosine), with columns of zeros up to ``width``; as float16 would hold them.

    Products of rows must lie within float16, too: none is larger than the largest product of a row with itself.
    """
    own = np.einsum("nd,nd->n", given, given, dtype=np.float64)
    length = np.sqrt(own)
    bad = ~np.isfinite(length)
    if bad.any():
        raise NearfarError(
            f"{int(bad.sum())} of the vectors {positions[0]} to {positions[-1]} are not finite; first is number "
            f"{positions[bad.argmax()]}. Look at what made them before searching neighbours"
        )
    if metric == "dot" and len(own) and own.max() >= _HALF * (1 - 2**-10):  # rounding may lengthen a row
        raise NearfarError(
            f"the product of vector {positions[own.argmax()]} with itself is {own.max():.4g}, beyond float16 "
            f"({_HALF:,}), as which similarities are stored. Multiply all vectors by one factor, here at most "
            f"{_factor(own.max()):.1g}: that changes no order. Or use metric='cosine'"
        )
    if metric == "cosine":
        if (length == 0).any():
            zero = length == 0
            raise NearfarError(
                f"{int(zero.sum())} of the vectors {positions[0]} to {positions[-1]} are all zero, first is number "
                f"{positions[zero.argmax()]}: they have no direction, so no cosine; drop these items (an empty text?) "
                "or use metric='dot'"
            )
        given = (given / length[:, None]).astype(np.float32)
    rounded = padded(given, width).astype(np.float16).astype(np.float32)
    lost = (length > 0) & ~rounded.any(axis=1)
    if lost.any():
        raise NearfarError(
            f"{int(lost.sum())} of the vectors {positions[0]} to {positions[-1]} are zero as float16, which is how "
            f"they are stored, first is number {positions[lost.argmax()]}. Multiply all vectors by one factor: that "
            "changes no order"
        )
    return rounded


def _factor(largest: float) -> float:
    """A power of ten that brings the largest product within float16."""
    return float(10.0 ** np.floor(np.log10(np.sqrt(_HALF / largest))))


def cell_centres(sample: NDArray[np.float32], cells: int, spherical: bool, seed: int) -> NDArray[np.float32]:
    """k-means in two levels, so that its work for each row grows with the root of the number of cells.

    Groups of cells stand in a chain of near ones: cells with near numbers are near each other. Clusters that groups cut
    are put together by some passes over all cells, as far as that costs seconds: for 5 · 10⁶ rows of
    ``benchmarks/scale.py`` the recall of 13 cells rises from .952 to .959.
    """

    def means(
        rows: NDArray[np.float32], k: int, points: int, first: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], faiss.Index]:
        model = faiss.Kmeans(
            rows.shape[1], k, niter=8 if first is None else 3, spherical=spherical, seed=1 + seed % 2**31,
            min_points_per_centroid=1, max_points_per_centroid=points,
        )  # fmt: skip
        model.train(np.ascontiguousarray(rows), init_centroids=first)
        assert model.centroids is not None
        assert model.index is not None
        return model.centroids, model.index

    groups = max(1, round(cells**0.5))
    if groups == 1:
        return np.asarray(means(sample, min(cells, len(sample)), POINTS)[0])
    first, index = means(sample, groups, 1024)
    _, of = index.search(sample, 1)
    size = np.bincount(of[:, 0], minlength=groups)
    order = np.argsort(of[:, 0], kind="stable")
    ends = np.cumsum(size)
    centres = []
    for group in _chain(first):
        if size[group]:
            share = max(1, min(int(size[group]), round(cells * size[group] / len(sample))))
            rows = sample[order[ends[group] - size[group] : ends[group]]]
            centres.append(means(rows, share, POINTS)[0])
    all_centres = np.concatenate(centres)
    points = min(POINTS, _WORK // len(all_centres) ** 2)
    if points < 4:
        return all_centres
    return means(sample, len(all_centres), points, all_centres)[0]


def _chain(points: NDArray[np.float32]) -> list[int]:
    """An order in which each point is followed by the nearest of those that are left."""
    near = points @ points.T
    order, left = [0], np.ones(len(points), bool)
    left[0] = False
    while left.any():
        order.append(int(np.argmax(np.where(left, near[order[-1]], -np.inf))))
        left[order[-1]] = False
    return order
