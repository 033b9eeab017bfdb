"""How far can the old multi-label contrastive loss fall?

Its weights count agreement about nothing as agreement, so that its least value is far from 0 and a collapsed encoder is
near it. Measured on generated labels with the stated share of "neutral or absent".
"""

from __future__ import annotations

import torch

from nearfar.losses import MultiLabelSupConLoss

QUANTITIES = {
    "floor": "least value of the loss, nats",
    "collapsed": "value of an encoder that gives the same for every review, nats",
    "room": "the latter minus the former",
}


def run(
    seed: int, *, batch_size: int = 32, aspects: int = 11, neutral: float = 0.887, batches: int = 50
) -> dict[str, float]:
    """Draw batches of labels; aspects are independent, and the two polarities equally likely."""
    g = torch.Generator().manual_seed(seed)
    loss = MultiLabelSupConLoss(weights="legacy", neutral=0)
    floors, levels = [], []
    for _ in range(batches):
        polar = torch.rand(batch_size, aspects, generator=g) >= neutral
        codes = polar * torch.randint(1, 3, (batch_size, aspects), generator=g)
        levels.append(loss(torch.ones(batch_size, 4), codes).item())
        assert loss.record is not None
        floors.append(loss.record.floor)
    floor, level = sum(floors) / batches, sum(levels) / batches
    return {"floor": floor, "collapsed": level, "room": level - floor}
