"""Who lies beside whom on a slide, and how near: the neighbours of a spot and their Gaussian weights."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int64
from numpy.typing import ArrayLike, NDArray

from nearfar.errors import NearfarError

__all__ = ["RULE", "neighbor_scale", "spatial_neighbors"]

#: the definition, as the index of shards states it
RULE = (
    "the k nearest spots of the same slide; weight exp(-d^2 / (2 sigma^2)) divided by the sum over them; "
    "sigma: median of all distances of the slide's spots to their k nearest"
)
_SPARE = 8  # further candidates, among which equal distances are put in order


def spatial_neighbors(
    positions: Float[ArrayLike, "n 2"], k: int = 6
) -> tuple[Int64[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """The ``k`` nearest spots of each spot of one slide, nearest first, and their weights α.

    α_ij = exp(−d_ij² / 2σ²), divided by its sum over the k nearest, σ the median of all distances to the k nearest. Of
    spots equally far away the one that comes first is taken. A slide of fewer than k + 1 spots has -1 and weight 0 in
    the places that are left.

    Raises:
        NearfarError: places that are no (n, 2) or not finite, k below 1.

    >>> index, alpha = spatial_neighbors([[0, 0], [1, 0], [0, 2]], k=1)
    >>> index.ravel().tolist(), alpha.ravel().tolist()
    ([1, 0, 0], [1.0, 1.0, 1.0])
    >>> spatial_neighbors([[0, 0], [1, 0]], k=2)[0].tolist()
    [[1, -1], [0, -1]]
    """
    index, distance = _nearest(positions, k)
    n, there = len(index), index.shape[1]
    sigma = _sigma(distance)
    # Only differences of the exponents matter: a spot far from all others must not divide 0 by 0.
    beyond = distance**2 - distance[:, :1] ** 2
    weight = np.exp(-0.5 * beyond / sigma**2) if sigma > 0 else np.ones_like(distance)
    weight /= weight.sum(axis=1, keepdims=True)
    neighbors = np.full((n, k), -1, np.int64)
    alpha = np.zeros((n, k), np.float32)
    neighbors[:, :there], alpha[:, :there] = index, weight
    return neighbors, alpha


def neighbor_scale(positions: Float[ArrayLike, "n 2"], k: int = 6) -> float:
    """σ of a slide: the median of all distances of its spots to their k nearest; 0 for a single spot.

    >>> neighbor_scale([[0, 0], [1, 0], [0, 2]], k=1)
    1.0
    """
    return _sigma(_nearest(positions, k)[1])


def _sigma(distance: NDArray[np.float64]) -> float:
    return float(np.median(distance)) if distance.size else 0.0


def _nearest(positions: ArrayLike, k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Indices and distances, (n, min(k, n - 1))."""
    places = np.asarray(positions, np.float64)
    if places.ndim != 2 or places.shape[1] != 2 or not np.isfinite(places).all():
        raise NearfarError(
            f"positions of shape {places.shape}: finite x and y of each spot, (n, 2), are needed."
        )
    if k < 1:
        raise NearfarError(f"neighbors={k}: at least one neighbour is needed.")
    n = len(places)
    there = min(k, n - 1)
    if there < 1:
        return np.empty((n, 0), np.int64), np.empty((n, 0))
    from scipy.spatial import cKDTree

    distance, index = cKDTree(places).query(places, min(n, there + 1 + _SPARE))
    distance[
        index == np.arange(n)[:, None]
    ] = -1.0  # the spot itself comes first, also among spots in one place
    # Distances that are equal on paper differ in the last bits: on a grid the order of the spots decides.
    rounded = np.round(distance, 6)
    order = np.lexsort((index, rounded), axis=1)[:, 1 : there + 1]
    found = np.take_along_axis(index, order, axis=1).astype(np.int64)
    return found, np.take_along_axis(distance, order, axis=1)
