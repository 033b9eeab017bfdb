"""The nearest documents of every query: all pairs, or an inverted file whose recall is measured."""

from __future__ import annotations

import time

import faiss
import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from nearfar.arguments import array, number, whole_number
from nearfar.batching.neighbors import SearchResult
from nearfar.errors import NearfarError

__all__ = ["nearest_documents", "unit_rows"]

#: queries per call: bounds the 64-bit answers that FAISS gives
_BLOCK = 8192
#: queries on which recall is measured
_SAMPLE = 1000
#: pairs from which on an index is tried before all of them are compared
_PAIRS = 2_500_000_000
#: standard errors by which the measured recall must exceed what is wanted
_MARGIN = 2.0


def unit_rows(name: str, vectors: object) -> NDArray[np.float32]:
    """Vectors (n, d) as float32 of unit length; rows of zeros stay zero, a number that is not finite is refused."""
    given = array(name, vectors, "vectors (rows, dimensions)", "fiu")
    if given.ndim != 2 or not given.shape[1]:
        raise NearfarError(f"{name} are {given.shape}; vectors (rows, dimensions) are needed")
    rows = np.array(given, dtype=np.float32, order="C")
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise NearfarError(
            f"{name}: {int(bad.sum())} rows hold numbers that are not finite (first: row {int(bad.argmax())})"
        )
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1.0), dtype=np.float32)


def nearest_documents(
    queries: Float[np.ndarray, "n d"],
    corpus: Float[np.ndarray, "m d"],
    k: int,
    min_recall: float = 0.99,
    seed: int = 0,
) -> SearchResult:
    """The ``k`` documents of highest dot product for each query, best first, and how they were found.

    Up to 2.5 · 10⁹ pairs all are compared. Above, an inverted file is tried: its probes are doubled until the recall on
    1,000 sampled queries lies two standard errors above ``min_recall``, and what is stated was measured on 1,000
    others; where that would cost as much as all pairs, these are compared. ``indices`` (n, k) are −1 where there is
    nothing more.

    >>> nearest = nearest_documents(np.eye(2, dtype=np.float32), np.eye(3, 2, dtype=np.float32), 2)
    >>> nearest.indices.tolist(), nearest.recall
    ([[0, 1], [1, 0]], 1.0)
    """
    queries, corpus = np.ascontiguousarray(queries, np.float32), np.ascontiguousarray(corpus, np.float32)
    k, min_recall = whole_number("k", k, 1), number("min_recall", min_recall, 0, 1)
    if queries.ndim != 2 or corpus.ndim != 2 or queries.shape[1] != corpus.shape[1]:
        raise NearfarError(
            f"queries are {queries.shape} and the corpus {corpus.shape}; both need the same dimensions (columns)"
        )
    k = min(k, len(corpus))
    if not len(queries) or not k:
        raise NearfarError(f"{len(queries)} queries and {len(corpus)} documents: nothing can be searched")
    if len(queries) * len(corpus) > _PAIRS and min_recall < 1 and len(queries) > 2 * _SAMPLE:
        nearest = _inverted(queries, corpus, k, min_recall, seed)
        if nearest is not None:
            return nearest
    flat = faiss.IndexFlatIP(corpus.shape[1])
    flat.add(corpus)
    return _search(flat, queries, k)


def _search(index: faiss.Index, queries: NDArray[np.float32], k: int) -> SearchResult:
    indices, values = np.empty((len(queries), k), np.int32), np.empty((len(queries), k), np.float32)
    for begin in range(0, len(queries), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        values[block], indices[block] = index.search(queries[block], k)
    return SearchResult(indices, values, True, "flat", 1.0)


def _recall(tried: SearchResult, truth: SearchResult) -> tuple[float, float]:
    """Mean recall and its standard error; a tie with the last true one is as good as that."""
    share = ((tried.similarities >= truth.similarities[:, -1:] - 1e-6) & (tried.indices >= 0)).mean(1)
    return float(share.mean()), float(share.std(ddof=1) / np.sqrt(len(share)))


def _inverted(
    queries: NDArray[np.float32], corpus: NDArray[np.float32], k: int, min_recall: float, seed: int
) -> SearchResult | None:
    """None where all pairs are as cheap."""
    m, d = corpus.shape
    cells = max(1, min(int(2 * np.sqrt(m)), m // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = 10, 1 + seed % 2**31, 64
    index.cp.min_points_per_centroid = 1
    index.train(corpus)
    index.add(corpus)
    sample = np.random.default_rng(seed).choice(len(queries), 2 * _SAMPLE, replace=False)
    first, second = queries[sample[:_SAMPLE]], queries[sample[_SAMPLE:]]
    flat = faiss.IndexFlatIP(d)
    flat.add(corpus)
    began = time.perf_counter()
    truth = _search(flat, first, k)
    all_pairs = time.perf_counter() - began
    probes = min(8, cells)
    while True:
        index.nprobe = probes
        began = time.perf_counter()
        recall, error = _recall(_search(index, first, k), truth)
        cost = time.perf_counter() - began
        if recall - _MARGIN * error >= min_recall:
            recall, _ = _recall(_search(index, second, k), _search(flat, second, k))
            if recall >= min_recall:
                break
        if cost > 0.5 * all_pairs or probes == cells:
            return None
        probes = min(2 * probes, cells)
    if cost > all_pairs:
        return None
    nearest = _search(index, queries, k)
    short = np.flatnonzero((nearest.indices < 0).any(1))
    if len(short):  # too few documents in the probed cells: rare, and answered exactly
        better = _search(flat, queries[short], k)
        nearest.indices[short], nearest.similarities[short] = better.indices, better.similarities
    nearest.exact, nearest.recall, nearest.queries = False, recall, _SAMPLE
    nearest.index = f"IVF, {cells} cells, {probes} probes"
    return nearest
