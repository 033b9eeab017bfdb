"""Intervals for means, shares, medians and few seeds; each method where it is valid.

Resampling is honest only where the sample shows its variation: a hundred hits in a hundred queries would give the
interval [1, 1]. Shares therefore have Wilson's score interval throughout, and graded scores have it where they show
little variation, with their own variance in place of a share's (among distributions on [0, 1] with a given mean, the
0/1 one varies most). How often each kind covers the truth: ``benchmarks/interval_coverage.py``.

Quantiles of Student's t are computed without SciPy: Satterthwaite's approximation yields fractional degrees of
freedom, and the core of nearfar depends on PyTorch and NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nearfar.arguments import choice, number, numbers, whole_number
from nearfar.errors import NearfarError

__all__ = [
    "bootstrap_levels",
    "bootstrap_mean",
    "check_confidence",
    "checked_scores",
    "count_differing",
    "few_runs",
    "mean_interval",
    "mean_intervals",
    "median_places",
    "normal_quantile",
    "order_statistics",
    "score_interval",
    "score_variance",
    "t_quantile",
    "wilson",
]


def check_confidence(confidence: float) -> float:
    """``confidence`` as a float if it is a level strictly between 0 and 1, an error otherwise."""
    level = number("confidence", confidence)
    if not 0.0 < level < 1.0:
        raise NearfarError(f"confidence is {confidence!r}, but it is a level between 0 and 1, such as 0.95")
    return level


def normal_quantile(p: float) -> float:
    """The ``p`` quantile of the standard normal distribution.

    >>> round(normal_quantile(0.975), 4)
    1.96
    """
    return NormalDist().inv_cdf(p)


@lru_cache(maxsize=1024)
def t_quantile(p: float, df: float) -> float:
    """The ``p`` quantile of Student's t with ``df`` > 0 degrees of freedom (``math.inf``: the normal).

    >>> round(t_quantile(0.975, 1), 3), round(t_quantile(0.975, 4.5), 3)
    (12.706, 2.659)
    """
    if not 0.0 < p < 1.0 or not df > 0.0:
        raise NearfarError(f"no t quantile for p={p!r} with {df!r} degrees of freedom: 0 < p < 1 and df > 0")
    if math.isinf(df):
        return normal_quantile(p)
    if p == 0.5:
        return 0.0
    tail = 2.0 * min(p, 1.0 - p)
    # I_x(df/2, 1/2) = tail has its root x in (0, 1); t = sqrt(df (1/x - 1)). Bisection on log x keeps the
    # far tails of small df exact, where x is tiny.
    low, high = -745.0, 0.0
    for _ in range(64):  # 745 / 2^64 is below the rounding of log x
        middle = 0.5 * (low + high)
        if _incomplete_beta(df / 2.0, 0.5, middle) < tail:
            low = middle
        else:
            high = middle
    t = math.sqrt(df * math.expm1(-0.5 * (low + high)))
    return t if p > 0.5 else -t


def _incomplete_beta(a: float, b: float, log_x: float) -> float:
    """The regularised incomplete beta function I_x(a, b) at x = exp(log_x)."""
    x, rest = math.exp(log_x), -math.expm1(log_x)
    if rest <= 0.0:
        return 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * log_x + b * math.log(rest),
    )
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, rest) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return fraction


# With fewer expected hits, misses or differing items, the resampled distribution is too coarse to trust: from ten
# on, fifty reciprocal ranks of mean .13 covered 91 %.
_ENOUGH = 30
# Beside the items that differ from the most common score, so many are counted in that vary as hits do: few skewed
# scores do not show their tail. Without them twenty reciprocal ranks of mean .13 covered 86 %, with them 94 %.
_UNSEEN = 4
# The method of intervals that are resampled.
_DRAWN = "bootstrap (BCa)"
# Scores with so few distinct values are resampled by their counts.
_DISTINCT = 32
# By which the expectation of a score may pass 1.
_ROUNDING = 1e-9
# Numbers drawn at once while resampling: 4 MB of indices.
_CHUNK = 1 << 19


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of ``n`` items, within [0, 1] (Wilson 1927).

    >>> low, high = wilson(1.0, 20)
    >>> round(low, 3), high
    (0.839, 1.0)
    """
    check_confidence(confidence)
    n, share = whole_number("n", n, 1), number("share", share, 0.0, 1.0)
    return score_interval(share, normal_quantile(0.5 + confidence / 2) ** 2 / n)


def score_interval(mean: float, width: float) -> tuple[float, float]:
    """All p in [0, 1] with (mean − p)² ≤ ``width`` · p (1 − p): bounded, and skewed towards the middle near the ends.

    With ``width`` z²/n this is Wilson's interval for a share; with h²/(m (1 − m)) it is the interval m ± h bent
    so that it stays within [0, 1].

    >>> score_interval(0.0, 0.04)
    (0.0, 0.03846...)
    """
    middle = (mean + width / 2) / (1 + width)
    half = math.sqrt(width * (mean * (1 - mean) + width / 4)) / (1 + width)
    return (0.0 if mean <= 0.0 else max(middle - half, 0.0)), (
        1.0 if mean >= 1.0 else min(middle + half, 1.0)
    )


def score_variance(values: NDArray[np.float64], differing: int | None = None, graded: bool = False) -> float:
    """The variance of scores in [0, 1] as a share of m (1 − m), which hits and misses have; 0 < result ≤ 1.

    The fewer scores differ from the most common one (``differing``; counted, unless it is given), the nearer the
    result is to 1. ``graded``: scores that sum over several keys, such as nDCG, have no tail of rare hits; what few
    items do not show lies then between hits and what they show (the geometric mean).

    >>> score_variance(np.array([0.0, 1.0, 1.0])), score_variance(np.full(12, 0.25))
    (1.0, 1.0)
    >>> round(score_variance(np.linspace(0, 1, 101)), 2)
    0.37
    """
    mean = float(values.mean())
    most = mean * (1 - mean)
    own = min(float(values.var()) / most, 1.0) if most > 0.0 else 1.0
    if differing is None:
        differing = count_differing(values)
    unseen = math.sqrt(own) if graded and differing else 1.0
    return (differing * own + _UNSEEN * unseen) / (differing + _UNSEEN)


def count_differing(values: NDArray[np.float64]) -> int:
    """How many values are not the most common one."""
    return values.size - int(np.unique(values, return_counts=True)[1].max())


def few_runs(values: Sequence[float] | ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """The t interval for the mean of a few seeds or slides; one value alone gives (-inf, inf).

    >>> low, high = few_runs([0.34, 0.36, 0.35])
    >>> round(low, 3), round(high, 3)
    (0.325, 0.375)
    """
    check_confidence(confidence)
    x = numbers("values", values).ravel()
    if x.size == 0:
        raise NearfarError("values is empty, and gives no interval: pass one number for each seed")
    if x.size == 1:
        return -math.inf, math.inf
    half = t_quantile(0.5 + confidence / 2, x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return float(x.mean()) - half, float(x.mean()) + half


def bootstrap_mean(
    values: ArrayLike,
    confidence: float = 0.95,
    *,
    resamples: int = 1000,
    seed: int = 0,
    method: str = "bca",
) -> tuple[float, float]:
    """The bootstrap interval for a mean, bias-corrected and accelerated ("bca", Efron 1987) or "percentile".

    A mean of skewed scores, such as reciprocal ranks, needs the correction: over 50 queries with a mean of
    .19 the percentile interval lay below the truth 5.1 times in a hundred instead of 2.5, this one 2.9 times.

    Draws come from a generator of their own and in chunks of 4 MB. Where the scores take few distinct values,
    as hits do, the resampled counts are multinomial and are drawn as such; that is the same distribution.

    >>> scores = np.arange(100) / 100
    >>> low, high = bootstrap_mean(scores)
    >>> bool(low < scores.mean() < high)
    True
    """
    check_confidence(confidence)
    x = numbers("values", values).ravel()
    if x.size == 0:
        raise NearfarError("values is empty, and gives no interval: pass one number for each item")
    choice("method", method, ("bca", "percentile"))
    resamples, seed = whole_number("resamples", resamples, 100), whole_number("seed", seed, 0)
    means = _resampled_means(x, resamples, np.random.default_rng(seed))
    levels = (0.5 - confidence / 2, 0.5 + confidence / 2)
    if method == "bca":
        levels = bootstrap_levels(means, float(x.mean()), x - x.mean(), confidence)
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def bootstrap_levels(
    resampled: NDArray[np.float64], value: float, influence: NDArray[np.float64], confidence: float = 0.95
) -> tuple[float, float]:
    """The percentiles of a statistic's ``resampled`` values that bound it, corrected for bias and skewness.

    ``influence``: by how much each item pulls the statistic, with mean 0 (Efron 1987, BCa). Items that all pull alike
    leave the plain percentiles.
    """
    levels = 0.5 - confidence / 2, 0.5 + confidence / 2
    spread = float((influence**2).sum())
    if spread <= 0.0:
        return levels
    below = float(np.mean(resampled < value) + 0.5 * np.mean(resampled == value))
    edge = 1 / len(resampled)
    bias = normal_quantile(min(max(below, edge), 1 - edge))
    acceleration = float((influence**3).sum()) / (6 * spread**1.5)
    low, high = (_accelerated(level, bias, acceleration) for level in levels)
    return low, high


def checked_scores(name: str, values: ArrayLike) -> NDArray[np.float64]:
    """Scores in [0, 1], up to rounding; others and NaN raise ``NearfarError`` with their number."""
    scores = numbers(name, values)
    outside = (scores < -_ROUNDING) | (scores > 1 + _ROUNDING)
    if outside.any():
        raise NearfarError(
            f"{name} holds {int(outside.sum())} of {scores.size} values outside 0 to 1, such as "
            f"{scores[outside].flat[0]:g}, and this interval is for scores within; for a mean of other numbers "
            "take few_runs (few of them) or bootstrap_mean"
        )
    return scores.clip(0.0, 1.0)


def mean_interval(
    values: NDArray[np.float64], confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, str]:
    """The interval of a mean of scores in [0, 1] and the method used.

    Shares (every score 0 or 1) have Wilson's interval. Graded scores are resampled when at least thirty hits and
    thirty misses are expected from the mean and at least thirty items differ from the most common score; else they have
    Wilson's interval for as many items as have the same variance. ``resamples=0`` asks for that throughout.
    """
    check_confidence(confidence)
    values = checked_scores("values", values).ravel()
    if not values.size:
        raise NearfarError("values is empty, and gives no interval: pass one score for each item")
    resamples, seed = whole_number("resamples", resamples, 0), whole_number("seed", seed, 0)
    low, high, method = _score_interval(values, confidence, resamples)
    if method == _DRAWN:
        low, high = bootstrap_mean(values, confidence, resamples=resamples, seed=seed)
    return low, high, method


def mean_intervals(
    columns: Sequence[NDArray[np.float64]],
    confidence: float = 0.95,
    *,
    resamples: int = 1000,
    seed: int = 0,
    graded: Sequence[bool] | None = None,
) -> list[tuple[float, float, str]]:
    """``mean_interval`` of several scores of the same items, all from the same resampled items.

    ``graded`` says of each whether it sums over several keys (``score_variance``).

    >>> x = np.linspace(0, 1, 200)
    >>> np.allclose(mean_intervals([x, x**2])[1][:2], mean_interval(x**2)[:2])
    True
    """
    columns = [checked_scores("values", values).ravel() for values in columns]
    kinds = [False] * len(columns) if graded is None else graded
    intervals = [
        _score_interval(values, confidence, resamples, kind)
        for values, kind in zip(columns, kinds, strict=True)
    ]
    drawn = [i for i, interval in enumerate(intervals) if interval[2] == _DRAWN]
    # Few distinct scores are resampled by their counts, which is faster.
    many = [i for i in drawn if len(np.unique(columns[i])) > _DISTINCT]
    if len(many) > 1:
        means = _resampled_columns(np.stack([columns[i] for i in many], axis=1), resamples, seed)
        for i, of_column in zip(many, means.T, strict=True):
            x = columns[i]
            levels = bootstrap_levels(of_column, float(x.mean()), x - x.mean(), confidence)
            low, high = np.quantile(of_column, levels)
            intervals[i] = float(low), float(high), _DRAWN
    for i in drawn:
        if i not in many or len(many) == 1:
            low, high = bootstrap_mean(columns[i], confidence, resamples=resamples, seed=seed)
            intervals[i] = low, high, _DRAWN
    return intervals


def _score_interval(
    values: NDArray[np.float64], confidence: float, resamples: int, graded: bool = False
) -> tuple[float, float, str]:
    """The interval of ``mean_interval`` but for resampling, of which it says that it is due."""
    mean, n = float(values.mean()), values.size
    if bool(((values == 0.0) | (values == 1.0)).all()):
        return (*wilson(mean, n, confidence), "Wilson")
    shown = min(n * mean, n * (1 - mean), count_differing(values))
    if resamples and shown >= _ENOUGH:
        return 0.0, 1.0, _DRAWN
    if n == 1:
        return 0.0, 1.0, "none: one item"
    width = t_quantile(0.5 + confidence / 2, n - 1) ** 2 * score_variance(values, graded=graded) / n
    ends = score_interval(min(max(mean, 0.0), 1.0), width)
    return (*ends, "Wilson, effective n")


def order_statistics(n: int, confidence: float = 0.95) -> tuple[int, int]:
    """Which of ``n`` sorted values (the smallest is 1) bound the median with at least this confidence.

    The binomial argument needs no resampling and holds for every distribution. Without enough items the
    bounds are 0 and n + 1: no value of the sample bounds the median.

    >>> order_statistics(5), order_statistics(100)
    ((0, 6), (40, 61))
    """
    check_confidence(confidence)
    n = whole_number("n", n, 0)
    low = int((_half_binomial(n) <= 0.5 - confidence / 2).sum())
    return low, n + 1 - low


def median_places(n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Places (1 … n, fractions between) whose values bound the median of ``n`` items.

    After Hettmansperger and Sheather (1986): ``order_statistics`` covers too often, 98.8 % with eleven items, since
    places are whole; between two places the interval reaches its level for continuous values. 0 and n + 1 where
    no value of the sample bounds it.

    >>> median_places(5), [round(place, 2) for place in median_places(11)]
    ((0.0, 6.0), [2.92, 9.08])
    """
    first, last = order_statistics(n, confidence)
    if first < 1 or last - first < 2:
        return float(first), float(last)
    outside = 2 * _half_binomial(n)
    wide, narrow = 1 - float(outside[first - 1]), 1 - float(outside[first])
    share = (wide - confidence) / (wide - narrow)
    inward = (n - first) * share / (first + (n - 2 * first) * share)
    return first + inward, last - inward


def _half_binomial(n: int) -> NDArray[np.float64]:
    """The distribution function of ``n`` fair coins at 0 … n."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.cumsum(np.exp(log_factorial[n] - log_factorial - log_factorial[::-1] - n * math.log(2.0)))


def _resampled_means(x: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    n = x.size
    distinct, counts = np.unique(x, return_counts=True)
    if distinct.size <= _DISTINCT:
        return rng.multinomial(n, counts / n, size=resamples) @ distinct / n
    means = np.empty(resamples)
    scores = x.astype(np.float32) if n > 10_000 else x  # half the traffic; the sum is still taken in float64
    rows = max(_CHUNK // n, 1)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, n, size=(stop - start, n), dtype=np.int32)
        means[start:stop] = scores[drawn].mean(axis=1, dtype=np.float64)
    return means


def _resampled_columns(x: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """The means (resamples, columns) of several scores of each item; the items drawn are those of one column."""
    from nearfar.metrics._place_kernels import sum_resamples

    n, rng = len(x), np.random.default_rng(seed)
    sums = np.zeros((resamples, x.shape[1]))
    rows = max(_CHUNK // n, 1)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, n, size=(stop - start, n), dtype=np.int32)
        sum_resamples(drawn, x, sums[start:stop])
    return sums / n


def _accelerated(level: float, bias: float, acceleration: float) -> float:
    """The percentile that BCa reads instead of ``level``."""
    z = bias + normal_quantile(level)
    # Beyond 1 / acceleration the correction has no meaning; such skewness is cut off at the last percentile.
    denominator = max(1 - acceleration * z, 1e-6)
    return NormalDist().cdf(bias + z / denominator)
