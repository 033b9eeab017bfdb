"""Scores of many questions about one item: is the aspect mentioned, and with which sentiment?

Answers are codes (n, A): 0 for an aspect that is not mentioned, 1 … P for its polarity. A true code below 0 is not
known: it counts nowhere. Every score here is a function of counts added over items (``nearfar.metrics.count_metrics``),
so that intervals resample items and comparisons pair them. Scores of classes become probabilities by one temperature,
fitted on validation items.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.arguments import choice, numbers, shown, whole_number, whole_numbers
from nearfar.errors import NearfarError
from nearfar.labels import is_missing
from nearfar.metrics.count_metrics import f1_macro, f1_micro

__all__ = [
    "calibration_counts",
    "class_counts",
    "constant_detection",
    "constant_pairs",
    "constant_polarity",
    "detection_counts",
    "exact_counts",
    "expected_calibration_error",
    "fitted_temperature",
    "pair_counts",
    "probabilities",
    "weighted_f1",
]


def detection_counts(truth: Int[ndarray, "n a"], predicted: Int[ndarray, "n a"]) -> Float[ndarray, "n a 3"]:
    """True positives, false positives and false negatives of "this aspect is mentioned", whatever the polarity.

    >>> detection_counts(np.array([[1, 0, -1]]), np.array([[3, 2, 1]])).astype(int).tolist()
    [[[1, 0, 0], [0, 1, 0], [0, 0, 0]]]
    """
    truth, predicted = _checked(truth, predicted)
    return _counts(truth > 0, predicted > 0, truth >= 0)


def pair_counts(
    truth: Int[ndarray, "n a"], predicted: Int[ndarray, "n a"], pairs: Int[ndarray, "k 2"]
) -> Float[ndarray, "n k 3"]:
    """The same of each pair (aspect, polarity): right only where both are. A wrong polarity is a false positive of one
    pair and a false negative of another.

    >>> pairs = np.array([[0, 1], [0, 2]])
    >>> pair_counts(np.array([[1]]), np.array([[2]]), pairs).astype(int).tolist()
    [[[0, 0, 1], [0, 1, 0]]]
    """
    truth, predicted = _checked(truth, predicted)
    aspects, polarities = _pairs(pairs, truth.shape[1]).T
    return _counts(
        truth[:, aspects] == polarities, predicted[:, aspects] == polarities, truth[:, aspects] >= 0
    )


def class_counts(
    truth: Int[ndarray, "n a"], predicted: Int[ndarray, "n a"], classes: int
) -> Float[ndarray, "n a c 3"]:
    """The same of every class of every question, one class against the others; codes 0 … classes − 1.

    >>> class_counts(np.array([[1]]), np.array([[0]]), 2).astype(int).tolist()
    [[[[0, 1, 0], [0, 0, 1]]]]
    """
    truth, predicted = _checked(truth, predicted)
    kinds = np.arange(whole_number("classes", classes, 1))
    for name, codes in (("truth", truth), ("predicted", predicted)):
        if codes.size and codes.max() >= classes:
            raise NearfarError(
                f"{name} holds the code {codes.max()}, but classes={classes} has the codes 0 to {classes - 1}"
            )
    return _counts(truth[..., None] == kinds, predicted[..., None] == kinds, (truth >= 0)[..., None])


def exact_counts(truth: Int[ndarray, "n a"], predicted: Int[ndarray, "n a"]) -> Float[ndarray, "n 2"]:
    """(every known aspect right, 1) for each item, for ``nearfar.metrics.share``."""
    truth, predicted = _checked(truth, predicted)
    right = ((truth == predicted) | (truth < 0)).all(axis=1)
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
    bins = whole_number("bins", bins, 1)
    confidence, right, known = (
        numbers("confidence", confidence),
        _flags("right", right),
        _flags("known", known),
    )
    for name, values in (("confidence", confidence), ("right", right), ("known", known)):
        if values.ndim != 2 or values.shape != confidence.shape:
            raise NearfarError(
                f"{name} has shape {values.shape} and confidence {confidence.shape}; both are (items, questions)"
            )
    if ((confidence < -1e-6) | (confidence > 1 + 1e-6))[known].any():
        raise NearfarError("confidence holds values outside 0 to 1; it is a probability")
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.zeros((len(place), bins, 3))
    item = np.arange(len(place))[:, None]
    for slot, value in enumerate((known, np.where(known, confidence, 0.0), known & right)):
        np.add.at(counts[..., slot], (np.broadcast_to(item, place.shape), place), value)
    return counts


def expected_calibration_error(sums: Float[ndarray, "*rows bins 3"]) -> Float[ndarray, "*rows"]:
    """Σ_bins share of the decisions · |mean confidence − share that is right| (Naeini et al. 2015). 0 is calibrated.

    >>> float(expected_calibration_error(np.array([[10.0, 9.0, 7.0], [10.0, 6.0, 6.0]])))
    0.1
    """
    sums = _sums(sums, 2)
    total = sums[..., 0].sum(axis=-1)
    gaps = np.abs(sums[..., 1] - sums[..., 2]).sum(axis=-1)
    return np.divide(gaps, total, out=np.zeros(np.shape(gaps)), where=total != 0)


def weighted_f1(sums: Float[ndarray, "*rows a c 3"]) -> Float[ndarray, "*rows"]:
    """The mean over questions of F1 weighted by how often each class is true.

    Where one class is nearly always true this is high for whoever always says so: show it beside that constant.

    >>> round(float(weighted_f1(np.array([[[9.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]))), 3)
    0.853
    """
    sums = _sums(sums, 3)
    support = sums[..., 0] + sums[..., 2]
    doubled = 2 * sums[..., 0]
    below = doubled + sums[..., 1] + sums[..., 2]
    f1 = np.divide(doubled, below, out=np.zeros(below.shape), where=below != 0)
    total = support.sum(axis=-1)
    each = (support * f1).sum(axis=-1)
    per_question: NDArray[np.float64] = np.divide(each, total, out=np.zeros(each.shape), where=total != 0)
    return np.asarray(per_question.mean(axis=-1))


# -- the best that can be said without reading --------------------------------------------------------------------
def constant_polarity(truth: Int[ndarray, "n a"], polarities: int) -> Int[ndarray, " a"]:
    """The most frequent polarity of each aspect: what guessing says of an aspect that is mentioned.

    >>> constant_polarity(np.array([[1, 0], [2, 3], [2, 0]]), 3).tolist()
    [2, 3]
    """
    truth, polarities = _codes("truth", truth), whole_number("polarities", polarities, 1)
    polarities = min(
        polarities, max(1, int(truth.max(initial=1)))
    )  # what nobody says is not the most frequent
    counts = np.stack([(truth == kind).sum(axis=0) for kind in range(1, polarities + 1)])
    return 1 + counts.argmax(axis=0)


def constant_detection(truth: Int[ndarray, "n a"], average: str = "micro") -> float:
    """The best detection F1 of an answer that is the same for every item.

    Macro: all aspects are said to be mentioned. Micro: the k most frequent, with the best k.

    >>> truth = np.array([[1, 0], [1, 0], [0, 1], [1, 0]])
    >>> round(constant_detection(truth), 3), round(constant_detection(truth, "macro"), 3)
    (0.75, 0.629)
    """
    truth = _codes("truth", truth)
    return _best_constant(
        truth, np.where(truth > 0, 1, truth), np.ones(truth.shape[1], dtype=int), average, detection_counts
    )


def constant_pairs(
    truth: Int[ndarray, "n a"], pairs: Int[ndarray, "k 2"], polarities: int, average: str = "micro"
) -> float:
    """The best F1 over pairs of an answer that is the same for every item: each aspect has its usual polarity."""
    truth = _codes("truth", truth)
    pairs = _pairs(pairs, truth.shape[1])
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
    choice("average", average, ("micro", "macro"))
    if average == "macro":
        return float(f1_macro(counts(truth, np.broadcast_to(answer, truth.shape)).sum(axis=0)))
    order = np.argsort(-(hits > 0).sum(axis=0), kind="stable")
    best = 0.0
    for k in range(1, len(order) + 1):
        chosen = np.zeros(len(order), dtype=int)
        chosen[order[:k]] = answer[order[:k]]
        best = max(best, float(f1_micro(counts(truth, np.broadcast_to(chosen, truth.shape)).sum(axis=0))))
    return best


def _counts(
    truth: NDArray[np.bool_], predicted: NDArray[np.bool_], known: NDArray[np.bool_]
) -> Float[ndarray, "n ... 3"]:
    parts = (truth & predicted & known, ~truth & predicted & known, truth & ~predicted & known)
    return np.stack(parts, axis=-1).astype(np.float64)


def _checked(truth: object, predicted: object) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    true, seen = _codes("truth", truth), _codes("predicted", predicted)
    if true.shape != seen.shape:
        raise NearfarError(
            f"truth has shape {true.shape} and predicted {seen.shape}; both are (items, aspects)"
        )
    return true, seen


def _codes(name: str, codes: object) -> NDArray[np.int64]:
    """Codes (items, aspects) in int64; NaN and None say, as −1 does, that one is not known."""
    if isinstance(codes, (list, tuple)) or (isinstance(codes, np.ndarray) and codes.dtype.kind == "O"):
        rows = list(codes)
        if any(not isinstance(row, (list, tuple, np.ndarray)) for row in rows):
            raise NearfarError(f"{name} is {shown(codes)}; codes are (items, aspects)")
        codes = [[-1 if is_missing(code) else code for code in row] for row in rows]
    array = numbers(name, codes, finite=False)
    array = np.where(np.isnan(array), -1.0, array)
    if array.ndim != 2 or not (array == np.floor(array)).all() or np.isinf(array).any():
        raise NearfarError(f"{name} has shape {array.shape}; whole numbers (items, aspects) are needed")
    return array.astype(np.int64)


def _pairs(pairs: object, aspects: int) -> NDArray[np.int64]:
    array = whole_numbers("pairs", pairs)
    if array.ndim != 2 or array.shape[1] != 2:
        raise NearfarError(f"pairs have shape {array.shape}; (pairs, 2), aspect and polarity, is needed")
    if array.size and not 0 <= array[:, 0].min() <= array[:, 0].max() < aspects:
        raise NearfarError(
            f"pairs name aspects {array[:, 0].min()} to {array[:, 0].max()}, but there are 0 to {aspects - 1}"
        )
    return array


def _flags(name: str, values: object) -> NDArray[np.bool_]:
    array = numbers(name, values)
    if not ((array == 0) | (array == 1)).all():
        raise NearfarError(f"{name} holds other values than True and False")
    return array.astype(bool)


def _sums(sums: object, least: int) -> NDArray[np.float64]:
    array = numbers("sums", sums)
    if array.ndim < least or array.shape[-1] != 3:
        raise NearfarError(
            f"sums have shape {array.shape}; {least} or more dimensions are needed, the last of 3"
        )
    return array


#: of the temperature: where e^x is sought, and in how many steps
_RANGE, _STEPS = (-4.0, 3.0), 80


def probabilities(scores: Float[ndarray, "n k"], temperature: float) -> Float[ndarray, "n k"]:
    """softmax(scores / temperature); a score of −∞ is a probability of 0.

    >>> probabilities(np.array([[2.0, 0.0, -np.inf]]), 2.0).round(3).tolist()
    [[0.731, 0.269, 0.0]]
    """
    scaled = (scores - scores.max(axis=1, keepdims=True)) / temperature
    share = np.exp(scaled)
    return np.asarray(share / share.sum(axis=1, keepdims=True))


def fitted_temperature(scores: Float[ndarray, "n k"], label: Int[ndarray, " n"]) -> float:
    """The temperature under which the probability of the true classes is highest (Guo et al. 2017), .02 to 20.

    Items of a class that cannot be predicted (a score of −∞) do not count; without any others it is 1. No class changes
    by it: it says how sure a score is.

    >>> scores = np.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> temperature = fitted_temperature(scores, np.array([0, 0, 0, 1]))
    >>> probabilities(scores, temperature)[0].round(2).tolist()
    [0.75, 0.25]
    """
    own = scores[np.arange(len(label)), label] if len(label) else np.zeros(0)
    known = np.isfinite(own)
    if not known.any():
        return 1.0
    beyond = scores[known] - own[known, None]

    def loss(x: float) -> float:
        scaled = beyond * np.exp(-x)
        top = scaled.max(axis=1)
        return float(np.mean(top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))))

    low, high = _RANGE
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(_STEPS):  # golden section: the loss is convex in 1 / temperature, so it has one valley
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if loss(first) <= loss(second) else (first, high)
    return float(np.exp((low + high) / 2))
