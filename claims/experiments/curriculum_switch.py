"""What happens to loss and MRR when a curriculum goes over from random to hard batches?

The loss of a hard batch is that of a harder question, so that it may rise while the encoder gets better. MRR is
measured at the switch and some epochs later; the same encoder trained on with random batches shows what the switch
itself did. Once more with near-duplicates in the training set, which hard batches bring together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from claims.hard_batches import HardBatches, World
from nearfar.batching import BatchSampler

QUANTITIES = {
    "loss_rise": "mean loss of the first hard epoch minus that of the last random one, nats",
    "mrr_rise": "MRR some hard epochs after the switch minus MRR at the switch",
    "mrr_beside_random": "MRR some hard epochs after the switch minus MRR after as many more random ones",
    "mrr_rise_duplicates": "mrr_rise with near-duplicates in the training set",
    "mrr_beside_random_duplicates": "mrr_beside_random with near-duplicates in the training set",
}


@dataclass(frozen=True)
class Settings(HardBatches):
    """Random epochs up to ``switch``, ``further`` hard ones; ``duplicates`` is the share of near-duplicates."""

    epochs: int = field(default=0, init=False)  # switch + further
    switch: int = 5
    further: int = 3
    duplicates: float = 0.6


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train through the switch and, with the same batches up to there, on without it."""
    switch, last = settings.switch, settings.switch + settings.further
    values: dict[str, float] = {}
    for suffix, share in (("", 0.0), ("_duplicates", settings.duplicates)):
        world = settings.world(seed, duplicates=share)
        losses, scores = _curves(world, world.hard(curriculum_epoch=switch), switch, last)
        _, on_random = _curves(world, world.random(), switch, last)
        if not share:
            values["loss_rise"] = losses[switch + 1] - losses[switch]
        values["mrr_rise" + suffix] = scores[last] - scores[switch]
        values["mrr_beside_random" + suffix] = scores[last] - on_random[last]
    return values


def _curves(
    world: World, sampler: BatchSampler, switch: int, last: int
) -> tuple[dict[int, float], dict[int, float]]:
    """The mean loss of each epoch, and MRR at the switch and at the end, by the number of epochs done."""
    model = world.encoder()
    losses: dict[int, float] = {}
    scores: dict[int, float] = {}

    def note(epoch: int, loss: float) -> None:
        losses[epoch] = loss
        if epoch in (switch, last):
            scores[epoch] = world.mrr(model)

    world.fit(model, sampler, last, after=note)
    return losses, scores
