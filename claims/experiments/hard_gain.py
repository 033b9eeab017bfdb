"""By how much do hard batches raise MRR over random ones?

The same encoder, data and number of steps; only the batches differ. The stated settings (half hard; half hard after
five random epochs; seven tenths hard) stand beside a control whose neighbour list is in another order than the data:
it must change nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from claims.pairs import clustered_pairs
from claims.training import encoder, fit_pairs, mrr
from nearfar.batching import (
    BatchSampler,
    HardNegativeSampler,
    Neighbors,
    RandomBatchSampler,
    nearest_neighbors,
)

QUANTITIES = {
    "random": "MRR after random batches",
    "half": "gain of half hard batches, as a share of the MRR after random ones",
    "curriculum": "gain of half hard batches after random epochs",
    "strong": "gain of batches of which 70 % are hard",
    "misaligned": "gain of half hard batches built from a neighbour list in another order: a control",
}


def run(
    seed: int,
    *,
    items: int = 2000,
    test: int = 1000,
    clusters: int = 40,
    spread: float = 0.3,
    noise: float = 0.2,
    epochs: int = 10,
    curriculum_epoch: int = 5,
    hardness_k: int = 50,
    batch_size: int = 32,
) -> dict[str, float]:
    """Train once for each sampler and compare MRR on unseen pairs, the gallery all of them."""
    pairs, unseen = clustered_pairs(seed, items, test, clusters=clusters, spread=spread, noise=noise)
    near = nearest_neighbors(pairs.text, hardness_k)

    def hard(neighbors: Neighbors = near, hard_ratio: float = 0.5, **options: Any) -> HardNegativeSampler:
        return HardNegativeSampler(neighbors, batch_size, hard_ratio, hardness_k, seed=seed, **options)

    samplers: dict[str, BatchSampler] = {
        "random": RandomBatchSampler(items, batch_size, seed=seed),
        "half": hard(),
        "curriculum": hard(curriculum_epoch=curriculum_epoch),
        "strong": hard(hard_ratio=0.7),
        "misaligned": hard(misaligned(near, seed)),
    }
    reached = {}
    for name, sampler in samplers.items():
        model = encoder(seed, pairs.view.shape[1], pairs.text.shape[1])
        fit_pairs(model, pairs, sampler, epochs)
        reached[name] = mrr(model, unseen)
    base = reached.pop("random")
    return {"random": base} | {name: value / base - 1 for name, value in reached.items()}


def misaligned(near: Neighbors, seed: int) -> Neighbors:
    """A neighbour list as it is when it was computed in another order than the data's: wrong, without an error.

    >>> misaligned(Neighbors(np.array([[1], [0], [3], [2]])), 0).indices.ravel().tolist()
    [3, 2, 1, 0]
    """
    order = np.random.default_rng(seed).permutation(near.n)
    return Neighbors(np.argsort(order)[near.indices[order]].astype(np.int32))
