"""Is a batch always split into 40 % positives, 20 % margin and 40 % anchors?

Counts are whole numbers and at least two, so that the split depends on the size of the batch.
"""

from __future__ import annotations

import torch

from nearfar.losses import AdaptiveScoreContrastiveLoss

QUANTITIES = {
    "as_stated": "share of the batch sizes with the stated margin, within one point",
    "without_loss": "number of batch sizes without any anchor",
    "margin_at_seven": "realised margin of a batch of seven",
}


def run(*, smallest: int = 2, largest: int = 12, margin: float = 0.2) -> dict[str, float]:
    """Every batch size from ``smallest`` to ``largest``, with scores that all differ."""
    loss, records = AdaptiveScoreContrastiveLoss(), {}
    for n in sorted({*range(smallest, largest + 1), 7}):
        loss(torch.eye(n), torch.linspace(0.1, 0.9, n))
        assert loss.record is not None
        records[n] = loss.record.extra
    stated = [records[n] for n in range(smallest, largest + 1)]
    exact = [e for e in stated if e["anchors"] and abs(e["middle_share"] - margin) < 0.01]
    return {
        "as_stated": len(exact) / len(stated),
        "without_loss": float(sum(e["anchors"] == 0 for e in stated)),
        "margin_at_seven": records[7]["middle_share"],
    }
