"""Which batches have anchors, when scores of 0.5 and more are "good" and nearly all scores are above 0.9?

Batches of seven images, each with a score between 0 and 1. With a fixed threshold the anchors are the rows below it; by
rank they are the lowest of the batch, however good. The ranking is tested a second time: scored again with the
noise of the measurement, would the same rows be anchors?
"""

from __future__ import annotations

import torch

from nearfar.lab.claims.ledger import Share
from nearfar.losses import AdaptiveScoreContrastiveLoss

QUANTITIES = {
    "empty_fixed": "share of batches without an anchor, fixed threshold, scores of mean 0.95",
    "empty_ranked": "the same by rank",
    "empty_mixture": "share of batches without an anchor, fixed threshold, same mean but some scores fail",
    "mean_score": "mean of the scores",
    "gap_ranked": "mean score of positives minus that of anchors, by rank",
    "stable_anchors": "share of anchors by rank that are anchors again when scored again",
    "stable_by_chance": "the same for anchors drawn at random",
}


def run(
    seed: int,
    *,
    batches: int = 500,
    batch_size: int = 7,
    threshold: float = 0.5,
    spread: float = 0.02,
    measurement: float = 0.02,
    failing: float = 0.05,
) -> dict[str, float | Share]:
    """Draw batches of scores and ask the losses for their anchors.

    ``spread``: standard deviation of the true scores; ``measurement``: of the noise on each reading; ``failing``: in
    the mixture, the share of scores between 0.1 and 0.4.
    """
    g = torch.Generator().manual_seed(seed)
    fixed = AdaptiveScoreContrastiveLoss(threshold=threshold)
    ranked = AdaptiveScoreContrastiveLoss()
    empty = {"fixed": 0, "ranked": 0, "mixture": 0}
    again, anchors, gaps, means = 0, 0, [], []
    for _ in range(batches):
        z = torch.randn(batch_size, 8, generator=g)
        true = 0.95 + spread * torch.randn(batch_size, generator=g)
        first, second = (
            (true + measurement * torch.randn(batch_size, generator=g)).clamp(0, 1) for _ in range(2)
        )
        fails = torch.rand(batch_size, generator=g) < failing
        low = 0.1 + 0.3 * torch.rand(batch_size, generator=g)
        for name, loss, scores in (
            ("fixed", fixed, first),
            ("ranked", ranked, first),
            ("mixture", fixed, torch.where(fails, low, first)),
        ):
            loss(z, scores)
            assert loss.record is not None
            extra = loss.record.extra
            empty[name] += extra["anchors"] == 0
            if name == "ranked":
                number = int(extra["anchors"])
                gaps.append(extra["score_gap"])
                chosen, rechosen = (set(s.argsort()[:number].tolist()) for s in (first, second))
                again, anchors = again + len(chosen & rechosen), anchors + number
        means.append(float(first.mean()))
    return {
        "empty_fixed": Share(empty["fixed"], batches),
        "empty_ranked": Share(empty["ranked"], batches),
        "empty_mixture": Share(empty["mixture"], batches),
        "mean_score": sum(means) / len(means),
        "gap_ranked": sum(gaps) / len(gaps),
        "stable_anchors": again / anchors,
        "stable_by_chance": anchors / batches / batch_size,
    }
