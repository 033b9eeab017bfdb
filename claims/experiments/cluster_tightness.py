"""Do hard batches gain more where items are more alike?

The same clusters, ever tighter: ``spread`` is how far an item's text lies from the centre of its cluster, 1 being as
far as the centres lie from the origin. Tight clusters have harder negatives, and items that no encoder can tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from claims.hard_batches import HardBatches

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


@dataclass(frozen=True)
class Settings(HardBatches):
    """``spreads``: of the clusters, from loose to tightest."""

    spread: float = field(default=1.0, init=False)
    spreads: tuple[float, float, float, float] = (1.0, 0.5, 0.25, 0.1)


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train with random and with half hard batches on each of the worlds, from loose to tight."""
    random: dict[str, float] = {}
    gain: dict[str, float] = {}
    for name, spread in zip(("loose", "middle", "tight", "tightest"), settings.spreads, strict=True):
        world = settings.world(seed, spread=spread)
        random[name] = world.mrr_after(world.random())
        gain[name] = world.mrr_after(world.hard()) - random[name]
    return {
        "random_loose": random["loose"],
        "random_tight": random["tight"],
        **{f"gain_{name}": value for name, value in gain.items()},
        "tight_minus_loose": gain["tight"] - gain["loose"],
        "tightest_minus_middle": gain["tightest"] - gain["middle"],
    }
