"""By how much do hard batches raise MRR over random ones?

The same encoder, data and number of steps; only the batches differ. The stated settings (half hard; half hard after
five random epochs; seven tenths hard) stand beside a control whose neighbour list is in a different order from the
data: it must change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from claims.hard_batches import HardBatches
from nearfar.batching import BatchSampler, Neighbors

QUANTITIES = {
    "random": "MRR after random batches",
    "half": "gain of half hard batches, as a share of the MRR after random ones",
    "curriculum": "gain of half hard batches after random epochs",
    "strong": "gain of batches of which 70 % are hard",
    "misaligned": "gain of half hard batches built from a neighbour list in a different order: a control",
}


@dataclass(frozen=True)
class Settings(HardBatches):
    """``curriculum_epoch``: random epochs before the hard ones."""

    hard_ratio: float = field(default=0.5, init=False)
    curriculum_epoch: int = 5


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train once for each sampler and compare MRR on unseen pairs, the gallery all of them."""
    world = settings.world(seed)
    samplers: dict[str, BatchSampler] = {
        "half": world.hard(),
        "curriculum": world.hard(curriculum_epoch=settings.curriculum_epoch),
        "strong": world.hard(0.7),
        "misaligned": world.hard(neighbors=misaligned(world.near, seed)),
    }
    base = world.mrr_after(world.random())
    return {"random": base} | {
        name: world.mrr_after(sampler) / base - 1 for name, sampler in samplers.items()
    }


def misaligned(near: Neighbors, seed: int) -> Neighbors:
    """A neighbour list as it is when it was computed in a different order from the data's: wrong, without an error.

    >>> misaligned(Neighbors(np.array([[1], [0], [3], [2]])), 0).indices.ravel().tolist()
    [3, 2, 1, 0]
    """
    order = np.random.default_rng(seed).permutation(near.n)
    return Neighbors(np.argsort(order)[near.indices[order]].astype(np.int32))
