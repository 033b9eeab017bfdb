"""Do hard batches gain more where items are more alike?

The same clusters, ever tighter: ``spread`` is how far an item's text lies from the centre of its cluster, 1 being as
far as the centres lie from the origin. Tight clusters have harder negatives, and items that no encoder can tell apart.
"""

from __future__ import annotations

from claims.pairs import clustered_pairs
from claims.training import random_and_hard

QUANTITIES = {
    "random_loose": "MRR after random batches, loose clusters",
    "random_tight": "MRR after random batches, tight clusters",
    "gain_loose": "gain of half hard batches in MRR, loose clusters",
    "gain_middle": "the same, clusters in between",
    "gain_tight": "the same, tight clusters",
    "gain_tightest": "the same, the tightest clusters",
    "tight_minus_loose": "gain in tight clusters less that in loose ones",
    "tightest_minus_middle": "gain in the tightest clusters less that in those in between",
}


def run(
    seed: int,
    *,
    items: int = 2000,
    test: int = 1000,
    clusters: int = 40,
    spreads: tuple[float, float, float, float] = (1.0, 0.5, 0.25, 0.1),
    noise: float = 0.2,
    epochs: int = 10,
    hard_ratio: float = 0.5,
    hardness_k: int = 50,
    batch_size: int = 32,
) -> dict[str, float]:
    """Train with random and with half hard batches on each of the worlds, from loose to tight."""
    found: dict[str, float] = {}
    for name, spread in zip(("loose", "middle", "tight", "tightest"), spreads, strict=True):
        pairs, unseen = clustered_pairs(seed, items, test, clusters=clusters, spread=spread, noise=noise)
        on_random, on_hard = random_and_hard(
            seed,
            pairs,
            unseen,
            batch_size=batch_size,
            hard_ratio=hard_ratio,
            hardness_k=hardness_k,
            epochs=epochs,
        )
        found[f"random_{name}"], found[f"gain_{name}"] = on_random, on_hard - on_random
    found["tight_minus_loose"] = found["gain_tight"] - found["gain_loose"]
    found["tightest_minus_middle"] = found["gain_tightest"] - found["gain_middle"]
    return {name: found[name] for name in QUANTITIES}
