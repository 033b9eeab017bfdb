"""Which share of hard items is best, from scratch and for an encoder that has learned already?

The same encoder, data and number of steps; only the share of each batch that is drawn from an item's nearest neighbours
differs. How steady a training is shows in how much MRR moves from one of its last epochs to the next.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from claims.hard_batches import HardBatches

QUANTITIES = {
    "half": "MRR after half hard batches",
    "all_minus_half": "MRR with a hard_ratio of 1, less that of .5",
    "realised": "share of hard items that batches with a hard_ratio of 1 do hold",
    "wobble_all_minus_half": "standard deviation of MRR over the last five epochs, hard_ratio 1 less .5",
    "scratch_half_minus_strong": "MRR from scratch, hard_ratio .5 less .7",
    "tuned_strong_minus_half": "MRR of an encoder trained with random batches before, hard_ratio .7 less .5",
}


@dataclass(frozen=True)
class Settings(HardBatches):
    """``before``: epochs of random batches before the hard ones, of the encoder that is tuned."""

    hard_ratio: float = field(default=0.5, init=False)
    before: int = 10


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train with each share from scratch, and with two of them after ``before`` epochs of random batches."""
    world = settings.world(seed)
    realised: dict[float, float | None] = {}

    def scores(hard_ratio: float, before: int = 0) -> list[float]:
        """MRR after each of the epochs with hard batches."""
        model = world.encoder()
        if before:
            world.fit(model, world.random(), before)
        values: list[float] = []
        sampler = world.hard(hard_ratio)
        world.fit(model, sampler, after=lambda *_: values.append(world.mrr(model)))
        realised[hard_ratio] = sampler.realised_hardness().hard_share
        return values

    scratch = {ratio: scores(ratio) for ratio in (0.5, 0.7, 1.0)}
    tuned = {ratio: scores(ratio, settings.before) for ratio in (0.5, 0.7)}
    wobble = {ratio: statistics.pstdev(values[-5:]) for ratio, values in scratch.items()}
    return {
        "half": scratch[0.5][-1],
        "all_minus_half": scratch[1.0][-1] - scratch[0.5][-1],
        "realised": realised[1.0] or 0.0,
        "wobble_all_minus_half": wobble[1.0] - wobble[0.5],
        "scratch_half_minus_strong": scratch[0.5][-1] - scratch[0.7][-1],
        "tuned_strong_minus_half": tuned[0.7][-1] - tuned[0.5][-1],
    }
