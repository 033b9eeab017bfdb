"""Do hard batches lose their gain as near-duplicates grow, and does leaving them out bring it back?

Near-duplicates are pairs whose texts say the same and whose views show the same. A hard batch brings them together as
negatives. The share of such pairs in the training set is dialled; the unseen pairs have none. The filter keeps them out
of a batch where it can (``false_negative_threshold``) and out of the loss where it cannot (``SimilarityMask``).
"""

from __future__ import annotations

from claims.pairs import clustered_pairs
from claims.training import encoder, fit_pairs, mrr
from nearfar.batching import HardNegativeSampler, RandomBatchSampler, nearest_neighbors

QUANTITIES = {
    "gain_few": "gain of hard batches over random ones, without a filter, at the smaller share of near-duplicates",
    "gain_many": "the same at the larger share",
    "loss_of_gain": "the former minus the latter",
    "filtered_few": "gain of hard batches with the filter, at the smaller share",
    "filtered_many": "the same at the larger share",
    "filter": "MRR with the filter over MRR without, hard batches, larger share, less 1",
    "anchors_hit": "share of anchors with a near-duplicate among their negatives, without a filter, larger share",
}


def run(
    seed: int,
    *,
    items: int = 2000,
    test: int = 1000,
    clusters: int = 40,
    spread: float = 0.3,
    noise: float = 0.2,
    epochs: int = 10,
    hard_ratio: float = 0.5,
    hardness_k: int = 50,
    batch_size: int = 32,
    few: float = 0.0,
    many: float = 0.6,
    threshold: float = 0.97,
) -> dict[str, float]:
    """Train on random, hard and filtered hard batches at two shares of near-duplicates."""
    found, anchors_hit = {}, 0.0
    for share in (few, many):
        pairs, unseen = clustered_pairs(
            seed, items, test, clusters=clusters, spread=spread, noise=noise, duplicates=share
        )
        near = nearest_neighbors(pairs.text, hardness_k)
        plain = HardNegativeSampler(near, batch_size, hard_ratio, hardness_k, seed=seed)
        filtered = HardNegativeSampler(
            near, batch_size, hard_ratio, hardness_k, false_negative_threshold=threshold, seed=seed
        )
        anchors_hit = plain.realised_hardness(threshold=threshold).anchors_hit or 0.0
        arms = {
            "random": (RandomBatchSampler(items, batch_size, seed=seed), None),
            "plain": (plain, None),
            "filtered": (filtered, threshold),
        }
        for name, (sampler, mask_from) in arms.items():
            model = encoder(seed, pairs.view.shape[1], pairs.text.shape[1])
            fit_pairs(model, pairs, sampler, epochs, mask_from=mask_from)
            found[name, share] = mrr(model, unseen)
    gain = {key: value / found["random", key[1]] - 1 for key, value in found.items()}
    return {
        "gain_few": gain["plain", few],
        "gain_many": gain["plain", many],
        "loss_of_gain": gain["plain", few] - gain["plain", many],
        "filtered_few": gain["filtered", few],
        "filtered_many": gain["filtered", many],
        "filter": found["filtered", many] / found["plain", many] - 1,
        "anchors_hit": anchors_hit,
    }
