"""Do hard batches and the temperature act independently?

Random and half hard batches at a low and a high temperature: if they do, the gain of hard batches is the same at both.
The temperature weighs hard negatives itself (Wang and Liu 2021, "Understanding the Behaviour of Contrastive Loss").
"""

from __future__ import annotations

from nearfar.batching import BatchSampler, HardNegativeSampler, RandomBatchSampler, nearest_neighbors
from nearfar.lab.claims.pairs import clustered_pairs
from nearfar.lab.claims.training import encoder, fit_pairs, mrr

QUANTITIES = {
    "random_low": "MRR after random batches, low temperature",
    "random_high": "MRR after random batches, high temperature",
    "gain_low": "gain of half hard batches in MRR, low temperature",
    "gain_high": "the same, high temperature",
    "interaction": "gain at the low temperature less that at the high one",
}


def run(
    seed: int,
    *,
    items: int = 2000,
    test: int = 1000,
    clusters: int = 40,
    spread: float = 0.3,
    noise: float = 0.2,
    low: float = 0.03,
    high: float = 0.2,
    epochs: int = 10,
    hard_ratio: float = 0.5,
    hardness_k: int = 50,
    batch_size: int = 32,
) -> dict[str, float]:
    """Train with both kinds of batches at both temperatures."""
    pairs, unseen = clustered_pairs(seed, items, test, clusters=clusters, spread=spread, noise=noise)
    near = nearest_neighbors(pairs.text, hardness_k)
    found: dict[str, float] = {}
    for name, temperature in (("low", low), ("high", high)):
        samplers: list[BatchSampler] = [
            RandomBatchSampler(items, batch_size, seed=seed),
            HardNegativeSampler(near, batch_size, hard_ratio, hardness_k, seed=seed),
        ]
        reached = []
        for sampler in samplers:
            model = encoder(seed, pairs.view.shape[1], pairs.text.shape[1])
            fit_pairs(model, pairs, sampler, epochs, temperature=temperature)
            reached.append(mrr(model, unseen))
        found[f"random_{name}"], found[f"gain_{name}"] = reached[0], reached[1] - reached[0]
    found["interaction"] = found["gain_low"] - found["gain_high"]
    return {name: found[name] for name in QUANTITIES}
