"""Neighbours within a window of a stream: quick, since each window is searched once and used once."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numba import njit
from numpy.typing import NDArray

from nearfar.batching.neighbors import Neighbors, _as_rows, nearest_neighbors

__all__ = ["window_neighbors"]

_CELL = 128  # rows of a cell
_LEAST = 1024  # rows below which all pairs are as quick
_SHARE = 8  # a row is compared with the rows of every eighth cell, the nearest, and of at least so many:
_CELLS = 4
_ROUNDS = 4  # of k-means


def window_neighbors(vectors: NDArray[np.floating], k: int, seed: int = 0) -> Neighbors:
    """The ``k`` nearest others of every row by cosine, among those of the cells that are nearest to its own.

    k-means puts about 128 rows into a cell; the rows of a cell are compared with those of the nearest eighth of the
    cells. That takes a third of the time of all pairs; the neighbours that differ are nearly as near (docs/scale.md).
    Below 1,024 rows, and for more than 128 neighbours, all pairs are compared. Errors are those of `nearest_neighbors`.

    >>> rng = np.random.default_rng(0)
    >>> points = rng.standard_normal((20, 16))[rng.integers(20, size=2000)] + 0.3 * rng.standard_normal((2000, 16))
    >>> near, all_pairs = window_neighbors(points, 10), nearest_neighbors(points, 10)
    >>> bool(near.similarities.mean() > 0.99 * all_pairs.similarities.mean())
    True
    """
    n = len(vectors)
    cells = n // _CELL
    if n < _LEAST or k > _CELL:
        return nearest_neighbors(vectors, k, seed=seed, exact=True)
    rows = _as_rows(vectors, "cosine")
    model = faiss.Kmeans(
        rows.shape[1], cells, niter=_ROUNDS, spherical=True, seed=1 + seed % 2**31, min_points_per_centroid=1,
        max_points_per_centroid=_CELL,
    )  # fmt: skip
    model.train(rows)
    centres = model.centroids
    assert centres is not None
    of = (rows @ centres.T).argmax(1)
    order = np.argsort(of, kind="stable")
    ends = np.cumsum(np.bincount(of, minlength=cells))
    ordered, sizes = rows[order], np.diff(ends, prepend=0)
    begins = ends - sizes
    indices, similarities = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    closeness = centres @ centres.T
    np.fill_diagonal(closeness, np.inf)  # the cell itself comes first
    nearest = np.argsort(-closeness, axis=1, kind="stable")
    for cell in np.flatnonzero(sizes).tolist():
        count = max(_CELLS, cells // _SHARE)
        while sizes[nearest[cell, :count]].sum() <= k:
            count += 1
        among = np.concatenate([np.arange(begins[each], ends[each]) for each in nearest[cell, :count]])
        own = np.arange(begins[cell], ends[cell])
        product = ordered[own] @ ordered[among].T
        product[np.arange(len(own)), np.arange(len(own))] = -np.inf  # nobody is its own neighbour
        indices[order[own]], similarities[order[own]] = _largest(product, order[among].astype(np.int32), k)
    np.clip(similarities, -1.0, 1.0, out=similarities)
    how = f"{cells} cells, {max(_CELLS, cells // _SHARE)} of them compared"
    return Neighbors(indices, similarities, index=how)


@njit(cache=True, nogil=True)
def _largest(product: Any, names: Any, k: int) -> Any:
    """The ``k`` largest of each row, falling, and the names of their columns."""
    rows, columns = product.shape
    chosen, value = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    for row in range(rows):
        size = 0
        for column in range(columns):
            each = product[row, column]
            if size < k:
                at = size
                size += 1
            elif each > value[row, k - 1]:
                at = k - 1
            else:
                continue
            while at > 0 and value[row, at - 1] < each:
                value[row, at], chosen[row, at] = value[row, at - 1], chosen[row, at - 1]
                at -= 1
            value[row, at], chosen[row, at] = each, names[column]
    return chosen, value
