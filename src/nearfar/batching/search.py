"""Finding nearest neighbours: all pairs, or an inverted file whose recall is measured and raised."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass

import faiss
import numpy as np
from numpy.typing import NDArray

__all__ = ["Found", "approximate", "exhaustive"]

log = logging.getLogger("nearfar.batching")

_BLOCK = 8192  # queries per call: bounds the 64-bit answers FAISS gives
_SAMPLE = 1000  # queries on which recall is measured
_MARGIN = 2.0  # standard errors by which the measured recall must exceed the bound


@dataclass
class Found:
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


def _search_all(index: faiss.Index, rows: NDArray[np.float32], k: int, which: NDArray[np.int64]) -> Found:
    indices = np.empty((len(which), k), np.int32)
    values = np.empty((len(which), k), np.float32)
    for begin in range(0, len(which), _BLOCK):
        part = which[begin : begin + _BLOCK]
        found = _without_self(*index.search(rows[part], k + 1), part)
        values[begin : begin + len(part)], indices[begin : begin + len(part)] = found
    return Found(indices, values, True, "flat", 1.0)


def exhaustive(rows: NDArray[np.float32], k: int) -> Found:
    """All pairs, in blocks."""
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return _search_all(index, rows, k, np.arange(len(rows)))


def _recall(found: NDArray[np.int32], truth: Found, seen: NDArray[np.float32]) -> tuple[float, float]:
    """Mean recall and its standard error. A tie with the k-th true neighbour is as good as that neighbour."""
    edge = truth.similarities[:, -1:] - 1e-6
    share = ((seen >= edge) & (found >= 0)).mean(1)
    return float(share.mean()), float(share.std(ddof=1) / np.sqrt(len(share)))


def approximate(rows: NDArray[np.float32], k: int, min_recall: float, seed: int) -> Found | None:
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
    found = _search_all(index, rows, k, np.arange(n))
    short = np.flatnonzero((found.indices < 0).any(1))
    if len(short):  # too few candidates in the probed cells: rare, and answered exactly
        better = _search_all(flat, rows, k, short)
        found.indices[short], found.similarities[short] = better.indices, better.similarities
    found.exact, found.recall, found.queries = False, recall, size
    found.index = f"IVF, {cells} cells, {probes} probes"
    return found
