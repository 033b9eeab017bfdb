"""Scores of several trainings on the same items: how far their mean may lie from the truth.

Two sources of chance are at work, the seed of a training and the sample of items, and there are few seeds. With
the variance of the mean split into what the seeds show (A, with S − 1 degrees of freedom) and the rest (B, many
degrees), no single t quantile is right: Satterthwaite's covers as little as 87 % with two seeds and 92 % with three,
and adding the two squares up to 98.7 %. Here the half-width is

    h = (w t_{S−1} + (1 − w) t_{n−1}) √(A + B),   w = A² / (A² + ((S − 1) B / 2)²),

which has the right quantile where one source rules and turns from one to the other fast enough: 93.8 to 97.2 % over
two to ten seeds and every ratio of A to B (``benchmarks/interval_coverage.py``). The form is that of Cochran and Cox
(1950), whose w = A / (A + B) covers up to 97.8 %; the squares and the factor were found by search
(``benchmarks/interval_methods.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from numpy import ndarray

from nearfar.arguments import numbers
from nearfar.errors import NearfarError
from nearfar.metrics.intervals import (
    check_confidence,
    mean_interval,
    score_interval,
    score_variance,
    t_quantile,
)

__all__ = ["Spread", "seeds_interval", "spread_of_difference"]


@dataclass(frozen=True)
class Spread:
    """What is known of the error of a mean over ``seeds`` × ``n`` scores.

    ``of_seeds`` is A and ``beside`` is B of the module's text; ``of_items`` is the variance of the mean over items.
    """

    seeds: int
    n: int
    of_items: float
    of_seeds: float = 0.0
    beside: float = 0.0

    def half_width(self, level: float) -> float:
        """h, for an interval whose upper end has this ``level`` (.975 for 95 %)."""
        of_many = t_quantile(level, self.n - 1)
        a, b = self.of_seeds, self.beside
        if self.seeds == 1 or a == 0.0:
            return of_many * math.sqrt(self.of_items)
        weight = a**2 / (a**2 + ((self.seeds - 1) / 2 * b) ** 2)
        half = (weight * t_quantile(level, self.seeds - 1) + (1 - weight) * of_many) * math.sqrt(a + b)
        # Two seeds may agree by luck: the interval is never narrower than one standard error of the items.
        return max(half, math.sqrt(self.of_items))

    def p_value(self, value: float) -> float:
        """One minus the confidence at which the interval around ``value`` begins to touch 0.

        >>> round(Spread(seeds=1, n=1000, of_items=0.01).p_value(0.1962), 3)
        0.05
        """
        low, high = 0.0, 1.0  # of log10 p: from 1 down to 1e-12
        if abs(value) <= self.half_width(0.5):
            return 1.0
        for _ in range(25):
            middle = 0.5 * (low + high)
            if self.half_width(1 - 0.5 * 10 ** (-12 * middle)) < abs(value):
                low = middle
            else:
                high = middle
        return float(10 ** (-12 * low))


def seeds_interval(scores: Float[ndarray, "seeds n"], confidence: float = 0.95) -> tuple[float, float, str]:
    """The interval of the mean of scores (S, n) over seeds and items, and the method used.

    Scores within [0, 1] have an interval within [0, 1], bent as Wilson's is, so that it also covers where nearly
    all are hits; for one seed it is that of ``mean_interval``. Other scores have mean ± h.

    >>> import numpy as np
    >>> hits = np.ones((5, 40))
    >>> hits[0, 0] = hits[3, 7] = 0.0
    >>> low, high, method = seeds_interval(hits)
    >>> round(low, 2), round(high, 3), method
    (0.95, 0.998, 'seeds and items')
    """
    check_confidence(confidence)
    scores = numbers("scores", scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise NearfarError(f"scores have shape {scores.shape}; they are (seeds, items)")
    seeds, n = scores.shape
    if n < 2:
        raise NearfarError(f"scores are of {n} item, which gives no interval; score at least two")
    level = 0.5 + confidence / 2
    bounded = bool(((scores >= 0.0) & (scores <= 1.0)).all())
    if seeds == 1 and bounded:
        return mean_interval(scores[0], confidence)
    mean = float(scores.mean())
    of_items = scores.mean(axis=0)
    most = mean * (1 - mean)
    if bounded and most <= 0.0:  # all hits, or all misses: nothing says how the items would vary
        return (*score_interval(mean, t_quantile(level, n - 1) ** 2 / n), "seeds and items")
    # Several seeds show of every item how it varies: the number of items counts, not that of the differing ones.
    items = score_variance(of_items, n) * most / n if bounded else float(of_items.var(ddof=1)) / n
    half = _spread(scores, items).half_width(level)
    ends = score_interval(mean, half**2 / most) if bounded else (mean - half, mean + half)
    return (*ends, "seeds and items" if seeds > 1 else "items")


def spread_of_difference(differences: Float[ndarray, "seeds n"], scale: float) -> Spread:
    """The error of the mean of differences (S, n) between two arms.

    Where most items do not differ, the few that do show too little of the variance: with two items in a hundred that
    differ, 13 % of samples show none, and the interval would be [0, 0]. Two further items are counted in, in
    proportion to the share that does not differ, of the size of the differences seen, or of ``scale`` if there
    are none (after Bonett and Price 2012, whose items also move the middle).
    """
    of_items = differences.mean(axis=0)
    n = of_items.size
    differing = of_items[of_items != 0.0]
    unseen = 2.0 * (1.0 - differing.size / n)
    size = float((differing**2).mean()) if differing.size else scale**2
    total = float(((of_items - of_items.mean()) ** 2).sum()) + unseen * size
    return _spread(differences, total / (n + unseen - 1) / (n + unseen))


def _spread(scores: Float[ndarray, "seeds n"], of_items: float) -> Spread:
    """The parts of the error, of which that over items is given."""
    seeds, n = scores.shape
    if seeds == 1:
        return Spread(seeds, n, of_items)
    rows, columns = scores.mean(axis=1), scores.mean(axis=0)
    rest = scores - rows[:, None] - columns[None, :] + scores.mean()
    shared = float((rest**2).sum()) / ((seeds - 1) * (n - 1)) / (seeds * n)
    return Spread(seeds, n, of_items, float(rows.var(ddof=1)) / seeds, max(of_items - shared, 0.0))
