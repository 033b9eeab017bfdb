"""Do hard batches and the temperature act independently?

Random and half hard batches at a low and a high temperature: if they do, the gain of hard batches is the same at both.
The temperature weighs hard negatives itself (Wang and Liu 2021, "Understanding the Behaviour of Contrastive Loss").
"""

from __future__ import annotations

from claims.pairs import clustered_pairs
from claims.training import random_and_hard

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
    found: dict[str, float] = {}
    for name, temperature in (("low", low), ("high", high)):
        on_random, on_hard = random_and_hard(
            seed, pairs, unseen, batch_size=batch_size, hard_ratio=hard_ratio, hardness_k=hardness_k, epochs=epochs,
            temperature=temperature,
        )  # fmt: skip
        found[f"random_{name}"], found[f"gain_{name}"] = on_random, on_hard - on_random
    found["interaction"] = found["gain_low"] - found["gain_high"]
    return {name: found[name] for name in QUANTITIES}
