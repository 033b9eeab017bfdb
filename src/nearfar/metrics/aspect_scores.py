"""From logits to decisions (thresholds chosen on validation) and from decisions to scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.data.reviews.labels import ABSENT, NEUTRAL, LabelScheme
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

__all__ = ["HEADLINE", "KINDS", "Decision", "Scores", "choose_decision", "polarity_weights", "score_split"]


KINDS = ("aspect", "one", "none")
#: candidate thresholds, and the width of the moving average over them before the best is chosen
_GRID = np.round(np.arange(0.1, 0.9001, 0.01), 2)
_SMOOTH = 9
#: an aspect with fewer mentions gets the threshold that is best over all aspects
_ENOUGH = 30


@dataclass(frozen=True)
class Decision:
    """One threshold for each aspect; ``kind`` is one of `KINDS`, ``chosen_on`` the split, or "" where none was chosen.

    ``weights``: factors of the polarities' probabilities before the largest is taken, see `polarity_weights`; None:
    no factors.

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
        """The threshold one half for every aspect."""
        return cls("none", (0.5,) * aspects, weights=_rows(weights))

    def codes(self, probabilities: Float[ndarray, "n a c"]) -> Int[ndarray, "n a"]:
        """The predicted codes (n, A)."""
        mentioned = 1.0 - probabilities[..., 0] >= np.asarray(self.thresholds)
        polarities = probabilities[..., 1:]
        if self.weights is not None:
            polarities = polarities * np.asarray(self.weights)
        return np.where(mentioned, 1 + polarities.argmax(axis=-1), 0)

    def to_dict(self, aspects: Sequence[str]) -> dict[str, object]:
        """The entry in ``metrics.json``."""
        values = dict(zip(aspects, self.thresholds, strict=True))
        decision: dict[str, object] = {
            "kind": self.kind,
            "chosen_on": self.chosen_on or None,
            "thresholds": values,
        }
        if self.weights is not None:
            decision["polarity_weights"] = dict(zip(aspects, self.weights, strict=True))
        return decision


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

    The curve over thresholds is smoothed before its maximum is taken, which is noisy for a few hundred rows.
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
    """The threshold at the maximum of the smoothed F1 curve; of several the nearest to one half."""
    true, false, missed = sums[:, 0], sums[:, 1], sums[:, 2]
    f1 = 2 * true / np.maximum(2 * true + false + missed, 1.0)
    half = _SMOOTH // 2
    smooth = np.convolve(np.pad(f1, half, mode="edge"), np.ones(_SMOOTH) / _SMOOTH, mode="valid")
    best = np.flatnonzero(smooth >= smooth.max() - 1e-9)
    return float(_GRID[best[np.abs(_GRID[best] - 0.5).argmin()]])


#: mean over aspects of weighted F1 where absent counts as neutral: high for a model that always answers neutral
HEADLINE = "misleading/weighted_F1_absent_as_neutral"


@dataclass
class Scores:
    """Estimates by name, and the value of every review for metrics that comparisons pair."""

    estimates: dict[str, Estimate] = field(default_factory=dict)
    per_item: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def score_split(
    truth: Int[ndarray, "n a"],
    answers: Int[ndarray, "n a"],
    scheme: LabelScheme,
    probabilities: Float[ndarray, "n a c"] | None = None,
    usual: Float[ndarray, "a c"] | None = None,
    *,
    split: str | None = None,
    protocol: dict[str, object] | None = None,
    bootstrap: int = 1000,
) -> Scores:
    """Score ``answers`` against ``truth``.

    Args:
        truth, answers: codes (n, A).
        scheme: aspects and pairs.
        probabilities: (n, A, C), for what needs them: calibration, and polarity of the aspects that are truly
            mentioned. None leaves those out.
        usual: (A, C) shares of the classes in training, the chance level of calibration.
        split: hash of the rows.
        protocol: further fixed choices, such as the origin of thresholds.
        bootstrap: resamples of reviews for the intervals; 0 asks for intervals without.
    """
    pairs, kinds = scheme.pair_array, scheme.classes - 1
    scores = Scores()

    def add(
        name: str, counts: NDArray[np.float64], statistic: Statistic, chance: float, paired: bool = True
    ) -> None:
        words = name.replace("/", " ").replace("_", " ")
        scores.estimates[name] = count_estimate(
            counts, statistic, words, chance=chance, split=split, protocol=protocol, resamples=bootstrap
        )
        if paired:
            scores.per_item[name] = item_values(counts, statistic)

    detected, paired = detection_counts(truth, answers), pair_counts(truth, answers, pairs)
    for average, statistic in (("micro", f1_micro), ("macro", f1_macro)):
        add(f"aspect/F1_{average}", detected, statistic, constant_detection(truth, average))
    for average, statistic in (("micro", f1_micro), ("macro", f1_macro)):
        add(f"sentiment/F1_{average}", paired, statistic, constant_pairs(truth, pairs, kinds, average))
    add("exact_match", exact_counts(truth, answers), share, _most_common(truth))
    if probabilities is not None:
        _of_probabilities(add, truth, probabilities, usual)
    neutral = np.where(truth == ABSENT, NEUTRAL, truth) - 1
    answered = np.where(answers == ABSENT, NEUTRAL, answers) - 1
    constant = class_counts(neutral, np.full_like(neutral, NEUTRAL - 1), kinds)
    add(
        HEADLINE,
        class_counts(neutral, answered, kinds),
        weighted_f1,
        float(weighted_f1(constant.sum(axis=0))),
    )
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
    return scores


class _Add(Protocol):
    """Adds an estimate by name: its counts, their statistic, and the chance level."""

    def __call__(
        self, name: str, counts: NDArray[np.float64], statistic: Statistic, chance: float, paired: bool = True
    ) -> None: ...


def _of_probabilities(
    add: _Add,
    truth: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    usual: NDArray[np.float64] | None,
) -> None:
    """Polarity of the aspects that are truly mentioned, and calibration of the most probable class."""
    kinds = probabilities.shape[-1] - 1
    mentioned = np.where(truth > 0, truth - 1, -1)
    polarity = probabilities[..., 1:].argmax(axis=-1)
    usually = np.broadcast_to(constant_polarity(truth, kinds) - 1, truth.shape)

    def right(answers: NDArray[np.int64]) -> NDArray[np.float64]:
        hits = ((answers == mentioned) & (mentioned >= 0)).sum(axis=1)
        return np.stack([hits, (mentioned >= 0).sum(axis=1)], axis=1).astype(np.float64)

    def classes(answers: NDArray[np.int64]) -> NDArray[np.float64]:
        counts: NDArray[np.float64] = class_counts(mentioned, answers, kinds).sum(axis=1)
        return counts

    add("polarity/accuracy", right(polarity), share, float(share(right(usually).sum(axis=0))))
    add("polarity/F1_macro", classes(polarity), f1_macro, float(f1_macro(classes(usually).sum(axis=0))))
    confidence, answers = probabilities.max(axis=-1), probabilities.argmax(axis=-1)
    chance = 0.0
    if usual is not None:
        shape = truth.shape
        level = np.broadcast_to(usual.max(axis=-1), shape)
        guess = np.broadcast_to(usual.argmax(axis=-1), shape)
        constant = calibration_counts(level, guess == truth, truth >= 0)
        chance = float(expected_calibration_error(constant.sum(axis=0)))
    counts = calibration_counts(confidence, answers == truth, truth >= 0)
    add("calibration/ECE", counts, expected_calibration_error, chance)


def _most_common(truth: NDArray[np.int64]) -> float:
    """The share of the reviews that have the most frequent combination of labels."""
    return float(np.unique(truth, axis=0, return_counts=True)[1].max() / len(truth))
