"""From probabilities to answers: when an aspect counts as mentioned, and how that limit is chosen.

An aspect is mentioned where the probability of all its polarities together reaches the aspect's threshold. Its polarity
is then the one with the largest p / (share in training)^τ: τ = 0 takes the most probable, and a little of it gives rare
polarities their due (logit adjustment, Menon et al. 2021). Thresholds are chosen for F1 of detection, on rows that are
reported nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.metrics.classification import detection_counts

__all__ = ["KINDS", "Decision", "choose_decision", "polarity_weights"]

KINDS = ("aspect", "one", "none")
#: where thresholds are looked for, and how many neighbours of a value are averaged before the best is taken
_GRID = np.round(np.arange(0.1, 0.9001, 0.01), 2)
_SMOOTH = 9
#: an aspect that fewer rows mention takes the threshold that is best for all together
_ENOUGH = 30


@dataclass(frozen=True)
class Decision:
    """One threshold for each aspect; ``kind`` is one of `KINDS`, ``chosen_on`` the split, or "" where none was chosen.

    ``weights``: what the probabilities of the polarities are multiplied with before the largest is taken, see
    `polarity_weights`; None: nothing.

    >>> probabilities = np.array([[[0.55, 0.3, 0.05, 0.1]]])
    >>> Decision("none", (0.5,)).codes(probabilities), Decision("one", (0.4,), "val").codes(probabilities)
    (array([[0]]), array([[1]]))
    """

    kind: str
    thresholds: tuple[float, ...]
    chosen_on: str = ""
    weights: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def plain(cls, aspects: int, weights: Float[ndarray, "a p"] | None = None) -> Decision:
        """One half throughout."""
        return cls("none", (0.5,) * aspects, weights=_rows(weights))

    def codes(self, probabilities: Float[ndarray, "n a c"]) -> Int[ndarray, "n a"]:
        """The answers (n, A)."""
        mentioned = 1.0 - probabilities[..., 0] >= np.asarray(self.thresholds)
        polarities = probabilities[..., 1:]
        if self.weights is not None:
            polarities = polarities * np.asarray(self.weights)
        return np.where(mentioned, 1 + polarities.argmax(axis=-1), 0)

    def to_dict(self, aspects: Sequence[str]) -> dict[str, Any]:
        """As ``metrics.json`` holds it."""
        values = dict(zip(aspects, self.thresholds, strict=True))
        found: dict[str, Any] = {"kind": self.kind, "chosen_on": self.chosen_on or None, "thresholds": values}
        if self.weights is not None:
            found["polarity_weights"] = dict(zip(aspects, self.weights, strict=True))
        return found


def polarity_weights(counts: Int[ndarray, "a p"], tau: float) -> Float[ndarray, "a p"] | None:
    """(share of the polarity among the aspect's mentions)^−τ, shares below 1 % as 1 %; None for τ = 0.

    >>> polarity_weights(np.array([[81, 0, 19]]), 0.5).round(2)
    array([[ 1.11, 10.  ,  2.29]])
    """
    if tau == 0:
        return None
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return np.maximum(shares, 0.01) ** -tau


def _rows(weights: NDArray[np.float64] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if weights is None else tuple(tuple(row) for row in weights.tolist())


def choose_decision(
    kind: str,
    truth: Int[ndarray, "n a"],
    probabilities: Float[ndarray, "n a c"],
    split: str,
    weights: Float[ndarray, "a p"] | None = None,
) -> Decision:
    """The thresholds that are best on these rows: "one" for micro F1 of detection, "aspect" for each aspect's F1.

    The curve over thresholds is smoothed before its top is taken: the top of a few hundred rows is partly chance.
    """
    aspects = truth.shape[1]
    if kind == "none":
        return Decision.plain(aspects, weights)
    mentioned = 1.0 - probabilities[..., 0]
    counts = np.stack(
        [detection_counts(truth, (mentioned >= limit).astype(int)).sum(axis=0) for limit in _GRID]
    )
    together = _top(counts.sum(axis=1))
    if kind == "one":
        return Decision(kind, (together,) * aspects, split, _rows(weights))
    often = (truth > 0).sum(axis=0) >= _ENOUGH
    chosen = tuple(_top(counts[:, a]) if often[a] else together for a in range(aspects))
    return Decision(kind, chosen, split, _rows(weights))


def _top(sums: NDArray[np.float64]) -> float:
    """The threshold at the top of the smoothed F1 curve; the nearest to one half of several."""
    true, false, missed = sums[:, 0], sums[:, 1], sums[:, 2]
    f1 = 2 * true / np.maximum(2 * true + false + missed, 1.0)
    half = _SMOOTH // 2
    smooth = np.convolve(np.pad(f1, half, mode="edge"), np.ones(_SMOOTH) / _SMOOTH, mode="valid")
    best = np.flatnonzero(smooth >= smooth.max() - 1e-9)
    return float(_GRID[best[np.abs(_GRID[best] - 0.5).argmin()]])
