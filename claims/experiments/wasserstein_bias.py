"""How far from 0 is the one-sided Wasserstein gap of two groups that do not differ?

A few scores of one distribution never have the quantiles of a few others. The mean gap of groups from one normal
distribution, for small and large groups, and for small ones whose earlier scores stay in a queue.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nearfar.losses import WassersteinGapLoss

QUANTITIES = {
    "small": "mean gap of equal groups, small batches",
    "large": "mean gap of equal groups, large batches",
    "queued": "mean gap of equal groups, small batches and a full queue",
    "small_exact": "mean gap of equal groups, small batches, exact form",
    "bias": "small minus large",
    "queue_minus_large": "queued minus large",
    "over_gap": "mean gap of small batches over that of groups that do differ, by one standard deviation",
}


def run(
    seed: int,
    *,
    small: Sequence[int] = (3, 4),
    large: Sequence[int] = (64, 64),
    deviation: float = 0.1,
    draws: int = 1000,
    queue_size: int = 256,
) -> dict[str, float]:
    """Draw pairs of groups; the queue is filled before its values count."""
    g = torch.Generator().manual_seed(seed)

    def mean_gap(loss: WassersteinGapLoss, sizes: Sequence[int], apart: float = 0.0, skip: int = 0) -> float:
        values = []
        for _ in range(draws + skip):
            lower, upper = (0.8 + deviation * torch.randn(n, generator=g) for n in sizes)
            values.append(float(loss(lower, upper + apart)))
        return sum(values[skip:]) / draws

    plain = WassersteinGapLoss("interpolated")
    gaps = {
        "small": mean_gap(plain, small),
        "large": mean_gap(plain, large),
        "queued": mean_gap(
            WassersteinGapLoss("interpolated", queue_size), small, skip=-(-queue_size // min(small))
        ),
        "small_exact": mean_gap(WassersteinGapLoss("exact"), small),
    }
    return gaps | {
        "bias": gaps["small"] - gaps["large"],
        "queue_minus_large": gaps["queued"] - gaps["large"],
        "over_gap": gaps["small"] / mean_gap(plain, small, apart=deviation),
    }
