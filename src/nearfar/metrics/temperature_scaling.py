"""Probabilities from scores of classes, by one temperature that is fitted on validation items."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

__all__ = ["fitted_temperature", "probabilities"]

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
