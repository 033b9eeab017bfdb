"""Scores of many questions about one item: is the aspect mentioned, and with which sentiment?

Answers are codes (n, A): 0 for an aspect that is not mentioned, 1 … P for its polarity. A true code below 0 is not
known: it counts nowhere. Every score here is a function of counts added over items (``nearfar.metrics.counts``), so
that intervals resample items and comparisons pair them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.errors import NearfarError
from nearfar.metrics.counts import f1_macro, f1_micro

__all__ = [
    "calibration_counts",
    "class_counts",
    "constant_detection",
    "constant_pairs",
    "constant_polarity",
    "detection_counts",
    "exact_counts",
    "expected_calibration_error",
    "pair_counts",
    "weighted_f1",
]


def detection_counts(truth: Int[ndarray, "n a"], found: Int[ndarray, "n a"]) -> Float[ndarray, "n a 3"]:
    """True positives, false positives and false negatives of "this aspect is mentioned", whatever the polarity.

    >>> detection_counts(np.array([[1, 0, -1]]), np.array([[3, 2, 1]])).astype(int).tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 0, 0]]]
    """
    _check(truth, found)
    return _counts(truth > 0, found > 0, truth >= 0)


def pair_counts(
    truth: Int[ndarray, "n a"], found: Int[ndarray, "n a"], pairs: Int[ndarray, "k 2"]
) -> Float[ndarray, "n k 3"]:
    """The same of each pair (aspect, polarity): right only where both are. A wrong polarity is a false positive of one
    pair and a false negative of another.

    >>> pairs = np.array([[0, 1], [0, 2]])
    >>> pair_counts(np.array([[1]]), np.array([[2]]), pairs).astype(int).tolist()
    [[[0, 0, 1], [0, 1, 0]]]
    """
    _check(truth, found)
    aspects, polarities = pairs[:, 0], pairs[:, 1]
    return _counts(truth[:, aspects] == polarities, found[:, aspects] == polarities, truth[:, aspects] >= 0)


def class_counts(
    truth: Int[ndarray, "n a"], found: Int[ndarray, "n a"], classes: int
) -> Float[ndarray, "n a c 3"]:
    """The same of every class of every question, one class against the others; codes 0 … classes − 1.

    >>> class_counts(np.array([[1]]), np.array([[0]]), 2).astype(int).tolist()
    [[[[0, 1, 0], [0, 0, 1]]]]
    """
    _check(truth, found)
    kinds = np.arange(classes)
    return _counts(truth[..., None] == kinds, found[..., None] == kinds, (truth >= 0)[..., None])


def exact_counts(truth: Int[ndarray, "n a"], found: Int[ndarray, "n a"]) -> Float[ndarray, "n 2"]:
    """(every known aspect right, 1) for each item, for ``nearfar.metrics.share``."""
    _check(truth, found)
    right = ((truth == found) | (truth < 0)).all(axis=1)
    return np.stack([right, np.ones(len(right))], axis=1).astype(np.float64)


def calibration_counts(
    confidence: Float[ndarray, "n a"],
    right: Bool[ndarray, "n a"],
    known: Bool[ndarray, "n a"],
    bins: int = 15,
) -> Float[ndarray, "n bins 3"]:
    """For each item and bin of confidence: decisions, the sum of their confidences, how many were right.

    Bins of equal width over (0, 1], as in Guo et al. 2017.
    """
    if bins < 1:
        raise NearfarError(f"bins is {bins}; at least one is needed")
    place = np.clip(np.ceil(np.asarray(confidence, dtype=np.float64) * bins).astype(int) - 1, 0, bins - 1)
    found = np.zeros((len(place), bins, 3))
    item = np.arange(len(place))[:, None]
    for slot, value in enumerate((known, np.where(known, confidence, 0.0), known & right)):
        np.add.at(found[..., slot], (np.broadcast_to(item, place.shape), place), value)
    return found


def expected_calibration_error(sums: Float[ndarray, "*rows bins 3"]) -> Float[ndarray, "*rows"]:
    """Σ_bins share of the decisions · |mean confidence − share that is right| (Naeini et al. 2015). 0 is calibrated.

    >>> float(expected_calibration_error(np.array([[10.0, 9.0, 7.0], [10.0, 6.0, 6.0]])))
    0.1
    """
    total = sums[..., 0].sum(axis=-1)
    gaps = np.abs(sums[..., 1] - sums[..., 2]).sum(axis=-1)
    return np.divide(gaps, total, out=np.zeros(np.shape(gaps)), where=total != 0)


def weighted_f1(sums: Float[ndarray, "*rows a c 3"]) -> Float[ndarray, "*rows"]:
    """The mean over questions of F1 weighted by how often each class is true.

    Where one class is nearly always true this is high for whoever always says so: show it beside that constant.

    >>> round(float(weighted_f1(np.array([[[9.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]))), 3)
    0.853
    """
    support = sums[..., 0] + sums[..., 2]
    doubled = 2 * sums[..., 0]
    below = doubled + sums[..., 1] + sums[..., 2]
    f1 = np.divide(doubled, below, out=np.zeros(below.shape), where=below != 0)
    total = support.sum(axis=-1)
    each = (support * f1).sum(axis=-1)
    per_question: NDArray[np.float64] = np.divide(each, total, out=np.zeros(each.shape), where=total != 0)
    return per_question.mean(axis=-1)


# -- the best that can be said without reading --------------------------------------------------------------------
def constant_polarity(truth: Int[ndarray, "n a"], polarities: int) -> Int[ndarray, " a"]:
    """The most frequent polarity of each aspect: what guessing says of an aspect that is mentioned.

    >>> constant_polarity(np.array([[1, 0], [2, 3], [2, 0]]), 3).tolist()
    [2, 3]
    """
    counts = np.stack([(truth == kind).sum(axis=0) for kind in range(1, polarities + 1)])
    return 1 + counts.argmax(axis=0)


def constant_detection(truth: Int[ndarray, "n a"], average: str = "micro") -> float:
    """The best detection F1 of an answer that is the same for every item.

    Macro: all aspects are said to be mentioned. Micro: the k most frequent, with the best k.

    >>> truth = np.array([[1, 0], [1, 0], [0, 1], [1, 0]])
    >>> round(constant_detection(truth), 3), round(constant_detection(truth, "macro"), 3)
    (0.75, 0.629)
    """
    return _best_constant(
        truth, np.where(truth > 0, 1, truth), np.ones(truth.shape[1], dtype=int), average, detection_counts
    )


def constant_pairs(
    truth: Int[ndarray, "n a"], pairs: Int[ndarray, "k 2"], polarities: int, average: str = "micro"
) -> float:
    """The best F1 over pairs of an answer that is the same for every item: each aspect has its usual polarity."""
    usual = constant_polarity(truth, polarities)
    hits = np.where(truth == usual, 1, 0)
    return _best_constant(truth, hits, usual, average, lambda a, b: pair_counts(a, b, pairs))


def _best_constant(
    truth: NDArray[np.int64],
    hits: NDArray[np.int64],
    answer: NDArray[np.int64],
    average: str,
    counts: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]],
) -> float:
    if average == "macro":
        return float(f1_macro(counts(truth, np.broadcast_to(answer, truth.shape)).sum(axis=0)))
    if average != "micro":
        raise NearfarError(f"average is {average!r}; it is 'micro' or 'macro'")
    order = np.argsort(-(hits > 0).sum(axis=0), kind="stable")
    best = 0.0
    for k in range(1, len(order) + 1):
        said = np.zeros(len(order), dtype=int)
        said[order[:k]] = answer[order[:k]]
        best = max(best, float(f1_micro(counts(truth, np.broadcast_to(said, truth.shape)).sum(axis=0))))
    return best


def _counts(
    there: NDArray[np.bool_], said: NDArray[np.bool_], known: NDArray[np.bool_]
) -> Float[ndarray, "n ... 3"]:
    parts = (there & said & known, ~there & said & known, there & ~said & known)
    return np.stack(parts, axis=-1).astype(np.float64)


def _check(truth: NDArray[np.int64], found: NDArray[np.int64]) -> None:
    if truth.ndim != 2 or truth.shape != found.shape:
        raise NearfarError(
            f"true codes are {truth.shape} and found ones {found.shape}; both are (items, aspects)"
        )
