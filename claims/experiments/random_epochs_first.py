"""How many epochs of random batches should come before hard ones?

The same encoder, data and number of steps; a run goes over to hard batches at once, after some epochs, or late.
"""

from __future__ import annotations

from dataclasses import dataclass

from claims.hard_batches import HardBatches

QUANTITIES = {
    "none": "MRR with hard batches from the start",
    "five_minus_none": "MRR with five random epochs first, less that with none",
    "ten_minus_five": "MRR with ten random epochs first, less that with five",
    "ten_minus_none": "MRR with ten random epochs first, less that with none",
}


@dataclass(frozen=True)
class Settings(HardBatches):
    """Numbers of random epochs before the hard ones, ``epochs`` in all."""

    epochs: int = 15
    some: int = 5
    many: int = 10


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train once for each number of random epochs, ``epochs`` in all."""
    world = settings.world(seed)
    none, some, many = (
        world.mrr_after(world.hard(curriculum_epoch=first)) for first in (0, settings.some, settings.many)
    )
    return {
        "none": none,
        "five_minus_none": some - none,
        "ten_minus_five": many - some,
        "ten_minus_none": many - none,
    }
