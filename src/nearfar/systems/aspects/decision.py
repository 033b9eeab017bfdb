"""From probabilities to answers: when an aspect counts as mentioned, and how that limit is chosen.

An aspect is mentioned where the probability of all its polarities together reaches the aspect's threshold; its polarity
is then the most probable one. Thresholds are chosen for F1 of detection, on rows that are reported nowhere.
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

__all__ = ["KINDS", "Decision", "choose_decision"]

KINDS = ("aspect", "one", "none")
#: where thresholds are looked for, and how many neighbours of a value are averaged before the best is taken
_GRID = np.round(np.arange(0.1, 0.9001, 0.01), 2)
_SMOOTH = 9
#: an aspect that fewer rows mention takes the threshold that is best for all together
_ENOUGH = 30


@dataclass(frozen=True)
class Decision:
    """One threshold for each aspect; ``kind`` is one of `KINDS`, ``chosen_on`` the split, or "" where none was chosen.

    >>> probabilities = np.array([[[0.55, 0.3, 0.05, 0.1]]])
    >>> Decision("none", (0.5,)).codes(probabilities), Decision("one", (0.4,), "val").codes(probabilities)
    (array([[0]]), array([[1]]))
    """

    kind: str
    thresholds: tuple[float, ...]
    chosen_on: str = ""

    @classmethod
    def plain(cls, aspects: int) -> Decision:
        """One half throughout."""
        return cls("none", (0.5,) * aspects)

    def codes(self, probabilities: Float[ndarray, "n a c"]) -> Int[ndarray, "n a"]:
        """The answers (n, A)."""
        mentioned = 1.0 - probabilities[..., 0] >= np.asarray(self.thresholds)
        return np.where(mentioned, 1 + probabilities[..., 1:].argmax(axis=-1), 0)

    def to_dict(self, aspects: Sequence[str]) -> dict[str, Any]:
        """As ``metrics.json`` holds it."""
        values = dict(zip(aspects, self.thresholds, strict=True))
        return {"kind": self.kind, "chosen_on": self.chosen_on or None, "thresholds": values}


def choose_decision(
    kind: str, truth: Int[ndarray, "n a"], probabilities: Float[ndarray, "n a c"], split: str
) -> Decision:
    """The thresholds that are best on these rows: "one" for micro F1 of detection, "aspect" for each aspect's F1.

    The curve over thresholds is smoothed before its top is taken: the top of a few hundred rows is partly chance.
    """
    aspects = truth.shape[1]
    if kind == "none":
        return Decision.plain(aspects)
    mentioned = 1.0 - probabilities[..., 0]
    counts = np.stack(
        [detection_counts(truth, (mentioned >= limit).astype(int)).sum(axis=0) for limit in _GRID]
    )
    together = _top(counts.sum(axis=1))
    if kind == "one":
        return Decision(kind, (together,) * aspects, split)
    often = (truth > 0).sum(axis=0) >= _ENOUGH
    chosen = tuple(_top(counts[:, a]) if often[a] else together for a in range(aspects))
    return Decision(kind, chosen, split)


def _top(sums: NDArray[np.float64]) -> float:
    """The threshold at the top of the smoothed F1 curve; the nearest to one half of several."""
    true, false, missed = sums[:, 0], sums[:, 1], sums[:, 2]
    f1 = 2 * true / np.maximum(2 * true + false + missed, 1.0)
    half = _SMOOTH // 2
    smooth = np.convolve(np.pad(f1, half, mode="edge"), np.ones(_SMOOTH) / _SMOOTH, mode="valid")
    best = np.flatnonzero(smooth >= smooth.max() - 1e-9)
    return float(_GRID[best[np.abs(_GRID[best] - 0.5).argmin()]])
