"""Are the anchors by low score the disadvantaged group?

Batches of seven pictures, three or four of each group in turn; both groups' scores scatter alike, and one group's lie
lower by as much as a given AUC means (the probability that a picture of it scores below one of the other).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from nearfar.lab.claims.ledger import Share
from nearfar.losses import AdaptiveScoreContrastiveLoss

LEVELS = (55, 60, 75, 90)
QUANTITIES = {
    **{f"share_at_{level}": f"share of that group among the anchors, AUC .{level}" for level in LEVELS},
    "share_in_batches": "its share of the batches",
}


def run(seed: int, *, batches: int = 400, batch_size: int = 7) -> dict[str, float | Share]:
    """Draw scores and ask the loss for its anchors."""
    g = torch.Generator().manual_seed(seed)
    loss = AdaptiveScoreContrastiveLoss()
    z = torch.eye(batch_size)
    values: dict[str, float | Share] = {}
    rows = 0
    for level in LEVELS:
        shift = math.sqrt(2) * NormalDist().inv_cdf(level / 100)
        of_group, anchors, rows = 0, 0, 0
        for i in range(batches):
            lower = torch.arange(batch_size) < batch_size // 2 + (i % 2) * (batch_size % 2)
            scores = torch.randn(batch_size, generator=g) - shift * lower
            loss(z, scores)
            assert loss.record is not None
            number = int(loss.record.extra["anchors"])
            of_group += int(lower[scores.argsort()[:number]].sum())
            anchors += number
            rows += int(lower.sum())
        values[f"share_at_{level}"] = Share(of_group, anchors)
    return values | {"share_in_batches": rows / (batches * batch_size)}
