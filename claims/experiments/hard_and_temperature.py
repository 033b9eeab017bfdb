"""Do hard batches and the temperature act independently?

Random and half hard batches at a low and a high temperature: if they do, the gain of hard batches is the same at both.
The temperature weighs hard negatives itself (Wang and Liu 2021, "Understanding the Behaviour of Contrastive Loss").
"""

from __future__ import annotations

from dataclasses import dataclass

from claims.hard_batches import HardBatches

QUANTITIES = {
    "random_low": "MRR after random batches, low temperature",
    "random_high": "MRR after random batches, high temperature",
    "gain_low": "gain of half hard batches in MRR, low temperature",
    "gain_high": "the same, high temperature",
    "interaction": "gain at the low temperature less that at the high one",
}


@dataclass(frozen=True)
class Settings(HardBatches):
    """The two temperatures."""

    low: float = 0.03
    high: float = 0.2


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train with both kinds of batches at both temperatures."""
    world = settings.world(seed)
    temperatures = {"low": settings.low, "high": settings.high}
    random = {name: world.mrr_after(world.random(), temperature=t) for name, t in temperatures.items()}
    gain = {
        name: world.mrr_after(world.hard(), temperature=t) - random[name] for name, t in temperatures.items()
    }
    return {
        "random_low": random["low"],
        "random_high": random["high"],
        "gain_low": gain["low"],
        "gain_high": gain["high"],
        "interaction": gain["low"] - gain["high"],
    }
