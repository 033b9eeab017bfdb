"""Quantiles of Student's t for any degrees of freedom, without SciPy.

Satterthwaite's approximation yields fractional degrees of freedom, and the core of nearfar depends on PyTorch
and NumPy only.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

from nearfar.errors import NearfarError
from nearfar.metrics.arguments import number

__all__ = ["check_confidence", "normal_quantile", "t_quantile"]


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
