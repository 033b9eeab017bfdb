"""Why the intervals are those they are: coverage of each method beside its alternatives, computed, not drawn.

    python benchmarks/interval_methods.py

First the mean over few seeds and many items. A, the variance that the seeds show, has S − 1 degrees of freedom, B is
known; the columns are coverages over the ratio of the true A to B. Then shares: the mean, the least and the most over
a band of p.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import stats
from scipy.optimize import brentq

Z = float(stats.norm.ppf(0.975))
Ends = tuple[np.ndarray, np.ndarray]


def over_ratios(half: Callable[[np.ndarray], np.ndarray], free: int) -> list[float]:
    """Coverage of 0 ± half(A) where B is 1 and A is ratio · chi² / free."""
    u = (np.arange(20_000) + 0.5) / 20_000
    draws = stats.chi2.ppf(u, free) / free
    ratios = np.logspace(-3, 3, 49)
    return [float((2 * stats.norm.cdf(half(r * draws) / np.sqrt(1 + r)) - 1).mean()) for r in ratios]


def seeds_and_items() -> None:
    print(f"{'seeds':>5}  {'method':24} {'least':>6} {'most':>6}")
    for seeds in (2, 3, 5, 10):
        free = seeds - 1
        t = float(stats.t.ppf(0.975, free))

        def weighted(w: np.ndarray, a: np.ndarray, t: float = t) -> np.ndarray:
            return (w * t + (1 - w) * Z) * np.sqrt(a + 1)

        methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "nearfar": lambda a, f=free: weighted(a**2 / (a**2 + (f / 2) ** 2), a),  # type: ignore[misc]
            "Cochran and Cox": lambda a: weighted(a / (a + 1), a),
            "t² A + z² B": lambda a, t=t: np.sqrt(t**2 * a + Z**2),  # type: ignore[misc]
            "Satterthwaite": lambda a, f=free: (
                stats.t.ppf(0.975, np.minimum(f * (a + 1) ** 2 / a**2, 1e7))  # type: ignore[misc]
                * np.sqrt(a + 1)
            ),
        }
        for name, half in methods.items():
            found = over_ratios(half, free)
            print(f"{seeds:5d}  {name:24} {min(found):6.3f} {max(found):6.3f}")


def shares() -> None:
    print(f"\n{'n':>5} {'p':>12}  {'method':18} {'mean':>6} {'least':>6} {'most':>6}")
    for n in (20, 50, 125):
        for low, high in ((0.3, 0.7), (0.85, 0.95), (0.97, 0.995)):
            for method in (wilson, jeffreys, agresti_coull, mid_p):
                lower, upper = method(n)
                p = np.linspace(low, high, 201)[:, None]
                mass = stats.binom.pmf(np.arange(n + 1), n, p)
                found = (mass * ((lower <= p) & (p <= upper))).sum(1)
                numbers = f"{found.mean():6.3f} {found.min():6.3f} {found.max():6.3f}"
                print(f"{n:5d} {low:5}…{high:<6}  {method.__name__:18} {numbers}")


def wilson(n: int) -> Ends:
    share = np.arange(n + 1) / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return middle - half, middle + half


def jeffreys(n: int) -> Ends:
    hits = np.arange(n + 1)
    lower, upper = (stats.beta.ppf(level, hits + 0.5, n - hits + 0.5) for level in (0.025, 0.975))
    return np.where(hits == 0, 0.0, lower), np.where(hits == n, 1.0, upper)


def agresti_coull(n: int) -> Ends:
    more = n + Z**2
    share = (np.arange(n + 1) + Z**2 / 2) / more
    half = Z * np.sqrt(share * (1 - share) / more)
    return share - half, share + half


def mid_p(n: int) -> Ends:
    def below(p: float, hits: int) -> float:
        return float(stats.binom.cdf(hits - 1, n, p) + 0.5 * stats.binom.pmf(hits, n, p))

    lower = [0.0] + [brentq(lambda p, k=k: 1 - below(p, k) - 0.025, 0, 1) for k in range(1, n + 1)]
    upper = [brentq(lambda p, k=k: below(p, k) - 0.025, 0, 1) for k in range(n)] + [1.0]
    return np.array(lower), np.array(upper)


if __name__ == "__main__":
    seeds_and_items()
    shares()
