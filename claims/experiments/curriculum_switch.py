"""What happens to loss and MRR when a curriculum goes over from random to hard batches?

The loss of a hard batch is that of a harder question, so that it may rise while the encoder gets better. MRR is
measured at the switch and some epochs later; the same encoder trained on with random batches shows what the switch
itself did. Once more with near-duplicates in the training set, which hard batches bring together.
"""

from __future__ import annotations

from claims.pairs import Pairs, clustered_pairs
from claims.training import encoder, fit_pairs, mrr
from nearfar.batching import BatchSampler, HardNegativeSampler, RandomBatchSampler, nearest_neighbors

QUANTITIES = {
    "loss_rise": "mean loss of the first hard epoch minus that of the last random one, nats",
    "mrr_rise": "MRR some hard epochs after the switch minus MRR at the switch",
    "mrr_beside_random": "MRR some hard epochs after the switch minus MRR after as many more random ones",
    "mrr_rise_duplicates": "mrr_rise with near-duplicates in the training set",
    "mrr_beside_random_duplicates": "mrr_beside_random with near-duplicates in the training set",
}


def run(
    seed: int,
    *,
    items: int = 2000,
    test: int = 1000,
    clusters: int = 40,
    spread: float = 0.3,
    noise: float = 0.2,
    switch: int = 5,
    further: int = 3,
    hard_ratio: float = 0.5,
    hardness_k: int = 50,
    batch_size: int = 32,
    duplicates: float = 0.6,
) -> dict[str, float]:
    """Train through the switch and, with the same batches up to there, on without it."""
    found: dict[str, float] = {}
    for suffix, share in (("", 0.0), ("_duplicates", duplicates)):
        pairs, unseen = clustered_pairs(
            seed, items, test, clusters=clusters, spread=spread, noise=noise, duplicates=share
        )
        near = nearest_neighbors(pairs.text, hardness_k)
        hard = HardNegativeSampler(near, batch_size, hard_ratio, hardness_k, switch, seed=seed)
        losses, scores = _curves(seed, pairs, unseen, hard, switch, further)
        _, on_random = _curves(
            seed, pairs, unseen, RandomBatchSampler(items, batch_size, seed=seed), switch, further
        )
        last = switch + further
        if not share:
            found["loss_rise"] = losses[switch + 1] - losses[switch]
        found["mrr_rise" + suffix] = scores[last] - scores[switch]
        found["mrr_beside_random" + suffix] = scores[last] - on_random[last]
    return found


def _curves(
    seed: int, pairs: Pairs, unseen: Pairs, sampler: BatchSampler, switch: int, further: int
) -> tuple[dict[int, float], dict[int, float]]:
    """The mean loss of each epoch, and MRR at the switch and at the end, by the number of epochs done."""
    model = encoder(seed, pairs.view.shape[1], pairs.text.shape[1])
    losses: dict[int, float] = {}
    scores: dict[int, float] = {}

    def note(epoch: int, loss: float) -> None:
        losses[epoch] = loss
        if epoch in (switch, switch + further):
            scores[epoch] = mrr(model, unseen)

    fit_pairs(model, pairs, sampler, switch + further, after=note)
    return losses, scores
