"""Does drawing from fewer nearest neighbours make harder batches?

Each item comes once per epoch, so that neighbours run out: the smaller the list, the sooner a pivot finds none of its
own left. Measured on the plan itself, for both orders of the sampler: the share of items that were drawn as
neighbours, and, because that share says nothing of how near they are, the mean cosine inside a batch.
"""

from __future__ import annotations

import numpy as np

from nearfar.batching import HardNegativeSampler, in_batch_similarity, nearest_neighbors

QUANTITIES = {
    "greedy": "mean cosine in a batch, small k minus large k, order greedy",
    "level": "the same, order level",
    "greedy_share": "realised share of hard items at small k, order greedy",
    "level_share": "realised share of hard items at small k, order level",
    "greedy_share_large": "realised share of hard items at large k, order greedy",
    "greedy_last_quarter": "realised share of hard items in the last quarter of the epoch, small k, order greedy",
}


def run(
    seed: int,
    *,
    items: int = 4000,
    clusters: int = 40,
    dims: int = 32,
    spread: float = 1.0,
    batch_size: int = 32,
    hard_ratio: float = 0.5,
    small_k: int = 10,
    large_k: int = 100,
) -> dict[str, float]:
    """Plan one epoch for each k and order."""
    vectors = clustered_vectors(seed, items, clusters, dims, spread)
    near = nearest_neighbors(vectors, large_k)
    cosine, share, last = {}, {}, {}
    for order in ("greedy", "level"):
        for k in (small_k, large_k):
            sampler = HardNegativeSampler(near, batch_size, hard_ratio, k, order=order, seed=seed)
            cosine[order, k] = float(in_batch_similarity(vectors, sampler.plan().batches()).mean())
            report = sampler.realised_hardness()
            assert report.hard_share is not None
            assert report.hard_share_by_quarter is not None
            share[order, k], last[order, k] = report.hard_share, report.hard_share_by_quarter[-1]
    return {
        "greedy": cosine["greedy", small_k] - cosine["greedy", large_k],
        "level": cosine["level", small_k] - cosine["level", large_k],
        "greedy_share": share["greedy", small_k],
        "level_share": share["level", small_k],
        "greedy_share_large": share["greedy", large_k],
        "greedy_last_quarter": last["greedy", small_k],
    }


def clustered_vectors(seed: int, items: int, clusters: int, dims: int, spread: float) -> np.ndarray:
    """Vectors around centres of length about 1, ``spread`` away from them.

    >>> clustered_vectors(0, 6, 2, 4, 1.0).shape
    (6, 4)
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dims))
    noise = spread * rng.standard_normal((items, dims))
    return (centres[rng.integers(clusters, size=items)] + noise) / np.sqrt(dims)
