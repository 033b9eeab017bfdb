"""Do hard batches lose their gain as near-duplicates grow, and does leaving them out bring it back?

Near-duplicates are pairs whose texts say the same and whose views show the same. A hard batch brings them together as
negatives. The share of such pairs in the training set is dialled; the unseen pairs have none. The filter keeps them out
of a batch where it can (``false_negative_threshold``) and out of the loss where it cannot (``SimilarityMask``).
"""

from __future__ import annotations

from dataclasses import dataclass

from claims.hard_batches import HardBatches

QUANTITIES = {
    "gain_few": "gain of hard batches over random ones, without a filter, at the smaller share of near-duplicates",
    "gain_many": "the same at the larger share",
    "loss_of_gain": "the former minus the latter",
    "filtered_few": "gain of hard batches with the filter, at the smaller share",
    "filtered_many": "the same at the larger share",
    "filter": "MRR with the filter over MRR without, hard batches, larger share, less 1",
    "anchors_hit": "share of anchors with a near-duplicate among their negatives, without a filter, larger share",
}


@dataclass(frozen=True)
class Settings(HardBatches):
    """Two shares of near-duplicates, and the cosine from which the filter takes a pair for one."""

    few: float = 0.0
    many: float = 0.6
    threshold: float = 0.97


def run(seed: int, settings: Settings) -> dict[str, float]:
    """Train on random, hard and filtered hard batches at two shares of near-duplicates."""
    few, many, threshold = settings.few, settings.many, settings.threshold
    mrr, anchors_hit = {}, 0.0
    for share in (few, many):
        world = settings.world(seed, duplicates=share)
        plain = world.hard()
        anchors_hit = plain.realised_hardness(threshold=threshold).anchors_hit or 0.0
        mrr["random", share] = world.mrr_after(world.random())
        mrr["plain", share] = world.mrr_after(plain)
        mrr["filtered", share] = world.mrr_after(world.hard(threshold=threshold), mask_from=threshold)
    gain = {(arm, share): value / mrr["random", share] - 1 for (arm, share), value in mrr.items()}
    return {
        "gain_few": gain["plain", few],
        "gain_many": gain["plain", many],
        "loss_of_gain": gain["plain", few] - gain["plain", many],
        "filtered_few": gain["filtered", few],
        "filtered_many": gain["filtered", many],
        "filter": mrr["filtered", many] / mrr["plain", many] - 1,
        "anchors_hit": anchors_hit,
    }
