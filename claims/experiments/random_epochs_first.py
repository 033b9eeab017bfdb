"""How many epochs of random batches should come before hard ones?

The same encoder, data and number of steps; a run goes over to hard batches at once, after some epochs, or late.
"""

from __future__ import annotations

from claims.pairs import clustered_pairs
from claims.training import encoder, fit_pairs, mrr
from nearfar.batching import HardNegativeSampler, nearest_neighbors

QUANTITIES = {
    "none": "MRR with hard batches from the start",
    "five_minus_none": "MRR with five random epochs first, less that with none",
    "ten_minus_five": "MRR with ten random epochs first, less that with five",
    "ten_minus_none": "MRR with ten random epochs first, less that with none",
}


def run(
    seed: int,
    *,
    items: int = 2000,
    test: int = 1000,
    clusters: int = 40,
    spread: float = 0.3,
    noise: float = 0.2,
    epochs: int = 15,
    some: int = 5,
    many: int = 10,
    hard_ratio: float = 0.5,
    hardness_k: int = 50,
    batch_size: int = 32,
) -> dict[str, float]:
    """Train once for each number of random epochs, ``epochs`` in all."""
    pairs, unseen = clustered_pairs(seed, items, test, clusters=clusters, spread=spread, noise=noise)
    near = nearest_neighbors(pairs.text, hardness_k)
    reached = []
    for first in (0, some, many):
        model = encoder(seed, pairs.view.shape[1], pairs.text.shape[1])
        sampler = HardNegativeSampler(near, batch_size, hard_ratio, hardness_k, first, seed=seed)
        fit_pairs(model, pairs, sampler, epochs)
        reached.append(mrr(model, unseen))
    none, five, ten = reached
    return {
        "none": none,
        "five_minus_none": five - none,
        "ten_minus_five": ten - five,
        "ten_minus_none": ten - none,
    }
