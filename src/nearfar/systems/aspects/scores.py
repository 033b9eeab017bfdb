"""From logits to decisions (thresholds chosen on validation) and from decisions to scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.metrics import Estimate, count_estimate, f1_macro, f1_micro, item_values, share
from nearfar.metrics.classification import (
    calibration_counts,
    class_counts,
    constant_detection,
    constant_pairs,
    constant_polarity,
    detection_counts,
    exact_counts,
    expected_calibration_error,
    pair_counts,
    weighted_f1,
)
from nearfar.metrics.count_metrics import Statistic
from nearfar.systems.aspects.labels import ABSENT, NEUTRAL, LabelScheme

__all__ = ["HEADLINE", "KINDS", "Decision", "Scores", "choose_decision", "polarity_weights", "score_split"]


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


#: the mean over aspects of weighted F1 in which an absent aspect counts as neutral: high for whoever says neutral
HEADLINE = "misleading/weighted_F1_absent_as_neutral"


@dataclass
class Scores:
    """Estimates by name, and for those that comparisons pair, the value of every review."""

    estimates: dict[str, Estimate] = field(default_factory=dict)
    per_item: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def score_split(
    truth: Int[ndarray, "n a"],
    found: Int[ndarray, "n a"],
    scheme: LabelScheme,
    probabilities: Float[ndarray, "n a c"] | None = None,
    usual: Float[ndarray, "a c"] | None = None,
    *,
    split: str | None = None,
    protocol: dict[str, Any] | None = None,
    bootstrap: int = 1000,
) -> Scores:
    """Score the answers ``found`` against ``truth``.

    Args:
        truth, found: codes (n, A).
        scheme: aspects and pairs.
        probabilities: (n, A, C), for what needs them: calibration, and polarity where the truth says that an aspect is
            mentioned. None leaves those out.
        usual: (A, C) shares of the classes in training, against which calibration stands.
        split: hash of the rows.
        protocol: what else was fixed, such as where thresholds come from.
        bootstrap: resamples of reviews for the intervals; 0 asks for intervals without.
    """
    pairs, kinds = scheme.pair_array, scheme.classes - 1
    every = Scores()

    def add(
        name: str, counts: NDArray[np.float64], statistic: Statistic, chance: float, paired: bool = True
    ) -> None:
        words = name.replace("/", " ").replace("_", " ")
        every.estimates[name] = count_estimate(
            counts, statistic, words, chance=chance, split=split, protocol=protocol, resamples=bootstrap
        )
        if paired:
            every.per_item[name] = item_values(counts, statistic)

    detected, paired = detection_counts(truth, found), pair_counts(truth, found, pairs)
    for average, statistic in (("micro", f1_micro), ("macro", f1_macro)):
        add(f"aspect/F1_{average}", detected, statistic, constant_detection(truth, average))
    for average, statistic in (("micro", f1_micro), ("macro", f1_macro)):
        add(f"sentiment/F1_{average}", paired, statistic, constant_pairs(truth, pairs, kinds, average))
    add("exact_match", exact_counts(truth, found), share, _most_common(truth))
    if probabilities is not None:
        _of_probabilities(add, truth, probabilities, usual)
    neutral = np.where(truth == ABSENT, NEUTRAL, truth) - 1
    said = np.where(found == ABSENT, NEUTRAL, found) - 1
    constant = class_counts(neutral, np.full_like(neutral, NEUTRAL - 1), kinds)
    add(HEADLINE, class_counts(neutral, said, kinds), weighted_f1, float(weighted_f1(constant.sum(axis=0))))
    for a, aspect in enumerate(scheme.aspects):
        one = truth[:, [a]]
        add(f"aspect/F1/{aspect}", detected[:, [a]], f1_micro, constant_detection(one), paired=False)
        of_aspect = np.flatnonzero(pairs[:, 0] == a)
        own = pairs[of_aspect] - [a, 0]
        add(
            f"sentiment/F1/{aspect}",
            paired[:, of_aspect],
            f1_micro,
            constant_pairs(one, own, kinds),
            paired=False,
        )
    return every


def _of_probabilities(
    add: Callable[..., None],
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    usual: NDArray[np.float64] | None,
) -> None:
    """Polarity of the aspects that are truly mentioned, and calibration of the most probable class."""
    kinds = probabilities.shape[-1] - 1
    mentioned = np.where(truth > 0, truth - 1, -1)
    polarity = probabilities[..., 1:].argmax(axis=-1)
    usually = np.broadcast_to(constant_polarity(truth, kinds) - 1, truth.shape)

    def right(said: NDArray[np.int64]) -> NDArray[np.float64]:
        hits = ((said == mentioned) & (mentioned >= 0)).sum(axis=1)
        return np.stack([hits, (mentioned >= 0).sum(axis=1)], axis=1).astype(np.float64)

    def classes(said: NDArray[np.int64]) -> NDArray[np.float64]:
        counts: NDArray[np.float64] = class_counts(mentioned, said, kinds).sum(axis=1)
        return counts

    add("polarity/accuracy", right(polarity), share, float(share(right(usually).sum(axis=0))))
    add("polarity/F1_macro", classes(polarity), f1_macro, float(f1_macro(classes(usually).sum(axis=0))))
    confidence, said = probabilities.max(axis=-1), probabilities.argmax(axis=-1)
    chance = 0.0
    if usual is not None:
        shape = truth.shape
        level = np.broadcast_to(usual.max(axis=-1), shape)
        guess = np.broadcast_to(usual.argmax(axis=-1), shape)
        constant = calibration_counts(level, guess == truth, truth >= 0)
        chance = float(expected_calibration_error(constant.sum(axis=0)))
    counts = calibration_counts(confidence, said == truth, truth >= 0)
    add("calibration/ECE", counts, expected_calibration_error, chance)


def _most_common(truth: NDArray[np.int64]) -> float:
    """The share of the reviews that have the most frequent combination of labels."""
    return float(np.unique(truth, axis=0, return_counts=True)[1].max() / len(truth))
