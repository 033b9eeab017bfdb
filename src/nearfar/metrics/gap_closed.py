"""How much of a detector's gap between two groups a change of the pictures closes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nearfar.metrics.detection import DetectionEvidence
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import bootstrap_levels, normal_quantile

__all__ = ["gap_closed"]


def gap_closed(
    clean: DetectionEvidence,
    perturbed: DetectionEvidence,
    metric: str = "AP",
    resamples: int = 0,
    split: str | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[Estimate, NDArray[np.float64]]:
    """By how much the gap became smaller, less what either group lost for it; and a value of every picture.

        |gap on clean pictures| − |gap on perturbed ones| − Σ_group max(0, its score on clean ones − on perturbed ones)

    Raising the group behind by x gives x, lowering the group ahead gives 0, and so does raising both alike. No
    perturbation gives 0, which is the chance level. The epoch is chosen by this number.
    """
    lower, upper = clean.groups

    def parts(weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        a, b = clean.statistics(weights), perturbed.statistics(weights)
        gain = np.abs(a[f"{metric}/gap"]) - np.abs(b[f"{metric}/gap"])
        for group in (lower, upper):
            gain = gain - np.maximum(0.0, a[f"{metric}/{group}"] - b[f"{metric}/{group}"])
        return gain

    value = float(parts(None)[0])
    without = parts(1.0 - np.eye(clean.n))
    pull = np.where(np.isfinite(without), (clean.n - 1) * (value - without), 0.0)
    items = value + pull - pull.mean()
    if resamples:
        drawn = parts(clean.resamples(resamples, seed))
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, bootstrap_levels(drawn, value, items - value, confidence))
        method = "bootstrap over pictures (BCa), paired"
    else:
        spread = normal_quantile(0.5 + confidence / 2) * float(items.std(ddof=1)) / clean.n**0.5
        low, high, method = value - spread, value + spread, "normal, jackknife over pictures"
    protocol = {"split": split, "interval": method, "confidence": confidence, "detections": 100}
    name = f"{metric}/gap_closed"
    return Estimate(value, float(low), float(high), 0.0, clean.n, False, name, protocol), items
