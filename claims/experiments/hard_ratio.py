"""Which share of hard items is best, from scratch and for an encoder that has learned already?

The same encoder, data and number of steps; only the share of each batch that is drawn from an item's nearest neighbours
differs. How steady a training is shows in how much MRR moves from one of its last epochs to the next.
"""

from __future__ import annotations

import statistics

from claims.pairs import clustered_pairs
from claims.training import encoder, fit_pairs, mrr
from nearfar.batching import HardNegativeSampler, RandomBatchSampler, nearest_neighbors

QUANTITIES = {
    "half": "MRR after half hard batches",
    "all_minus_half": "MRR with a hard_ratio of 1, less that of .5",
    "realised": "share of hard items that batches with a hard_ratio of 1 do hold",
    "wobble_all_minus_half": "standard deviation of MRR over the last five epochs, hard_ratio 1 less .5",
    "scratch_half_minus_strong": "MRR from scratch, hard_ratio .5 less .7",
    "tuned_strong_minus_half": "MRR of an encoder trained with random batches before, hard_ratio .7 less .5",
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
    before: int = 10,
    hardness_k: int = 50,
    batch_size: int = 32,
) -> dict[str, float]:
    """Train with each share from scratch, and with two of them after ``before`` epochs of random batches."""
    pairs, unseen = clustered_pairs(seed, items, test, clusters=clusters, spread=spread, noise=noise)
    near = nearest_neighbors(pairs.text, hardness_k)
    realised: list[float | None] = []

    def reached(hard_ratio: float, before: int = 0) -> list[float]:
        """MRR after each of the epochs with hard batches."""
        model = encoder(seed, pairs.view.shape[1], pairs.text.shape[1])
        if before:
            fit_pairs(model, pairs, RandomBatchSampler(items, batch_size, seed=seed), before)
        scores: list[float] = []
        sampler = HardNegativeSampler(near, batch_size, hard_ratio, hardness_k, seed=seed)
        fit_pairs(model, pairs, sampler, epochs, after=lambda *_: scores.append(mrr(model, unseen)))
        if hard_ratio == 1.0:
            realised.append(sampler.realised_hardness().hard_share)
        return scores

    scratch = {ratio: reached(ratio) for ratio in (0.5, 0.7, 1.0)}
    tuned = {ratio: reached(ratio, before) for ratio in (0.5, 0.7)}
    wobble = {ratio: statistics.pstdev(scores[-5:]) for ratio, scores in scratch.items()}
    return {
        "half": scratch[0.5][-1],
        "all_minus_half": scratch[1.0][-1] - scratch[0.5][-1],
        "realised": realised[0] or 0.0,
        "wobble_all_minus_half": wobble[1.0] - wobble[0.5],
        "scratch_half_minus_strong": scratch[0.5][-1] - scratch[0.7][-1],
        "tuned_strong_minus_half": tuned[0.7][-1] - tuned[0.5][-1],
    }
