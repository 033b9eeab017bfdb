"""Rows as an index on disk takes them, and the centres of its cells."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from nearfar.batching.disk_search import padded
from nearfar.errors import NearfarError

__all__ = ["POINTS", "cell_centres", "checked_rows"]

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
