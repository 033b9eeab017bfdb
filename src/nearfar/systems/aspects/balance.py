"""How often a review comes in an epoch: rare labels are repeated.

A label on a share f of the reviews asks for max(1, √(t / f)) copies of them, and a review has as many as its rarest
label asks for (repeat factor sampling, Gupta et al. 2019, LVIS). Fractions are rounded by a draw that the seed fixes,
so that an epoch has the same length throughout.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy import ndarray

__all__ = ["repeats"]


def repeats(
    codes: Int[ndarray, "n a"], pairs: Int[ndarray, "k 2"], frequency: float, most: int, seed: int = 0
) -> Int[ndarray, " n"]:
    """Copies of each review: at least 1, at most ``most``; ``frequency`` is t, from which on a label is not rare.

    >>> codes = np.array([[3]] * 99 + [[2]])
    >>> repeats(codes, np.array([[0, 3], [0, 2]]), frequency=0.16, most=10)[-2:].tolist()
    [1, 4]
    """
    wanted = np.ones(len(codes))
    for aspect, polarity in pairs:
        there = codes[:, aspect] == polarity
        share = there.mean()
        if share > 0:
            wanted[there] = np.maximum(wanted[there], np.sqrt(frequency / share))
    rounded = np.floor(wanted + np.random.default_rng(seed).random(len(codes))).astype(np.int64)
    return np.clip(rounded, 1, most)
