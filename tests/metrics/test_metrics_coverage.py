"""Do the intervals cover the truth? A few settings of ``benchmarks/interval_coverage.py``, with fixed seeds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from combinations import combined
from nearfar.metrics import few_runs, mean_interval, paired_difference, wilson
from nearfar.metrics.comparison import seeds_interval

pytestmark = pytest.mark.slow  # reads and draws much

DRAWS = 1000
Interval = tuple[float, float]


def covered(truth: float, interval: Callable[[], Interval], draws: int = DRAWS) -> float:
    ends = np.array([interval() for _ in range(draws)])
    return float(np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1])))


def check(share: float, low: float = 0.93, high: float = 0.97, draws: int = DRAWS) -> None:
    """Within the bounds, up to two and a half standard errors of the simulation."""
    error = 2.5 * math.sqrt(0.95 * 0.05 / draws)
    assert low - error < share < high + error, share


@pytest.mark.parametrize("n", [20, 50, 125])
def test_shares_exactly(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    ends = np.array([mean_interval(np.r_[np.ones(k), np.zeros(n - k)])[:2] for k in range(n + 1)])
    for low, high in ((0.3, 0.7), (0.85, 0.95), (0.97, 0.995)):
        p = np.linspace(low, high, 101)[:, None]
        inside = (ends[:, 0] <= p) & (p <= ends[:, 1])
        check(float((stats.binom.pmf(np.arange(n + 1), n, p) * inside).sum(1).mean()), draws=10**6)
    assert tuple(ends[0]) == wilson(0.0, n)


@pytest.mark.parametrize(("middle", "n"), [(3.5, 50), (2.2, 20), (0.7, 125), (-2.2, 125)])
def test_reciprocal_ranks(middle: float, n: int) -> None:
    rng = np.random.default_rng(1)

    def scores(size: int) -> np.ndarray:
        return 1 / np.floor(np.exp(middle + 1.8 * rng.standard_normal(size))).clip(1, 3000)

    check(
        covered(float(scores(1_000_000).mean()), lambda: mean_interval(scores(n), resamples=400)[:2], 800),
        draws=800,
    )


@combined(2, seeds=[2, 3, 5, 10], times=[0.0, 0.5, 1.0, 3.0], deviations=[(0.5, 0.8), (0.8, 0.1)])
def test_paired_differences(seeds: int, times: float, deviations: tuple[float, float]) -> None:
    """The seed effect is 0 to 3 times the standard error of the items."""
    of_item, rest = deviations
    rng, n = np.random.default_rng(seeds), 60
    effect = times * math.sqrt((of_item**2 + rest**2 / seeds) / n)

    def interval() -> Interval:
        d = effect * rng.standard_normal((seeds, 1)) + of_item * rng.standard_normal((1, n))
        d = d + rest * rng.standard_normal((seeds, n))
        found = paired_difference(d, np.zeros_like(d))
        return found.low, found.high

    check(covered(0.0, interval))


@pytest.mark.parametrize(("up", "down", "n"), [(0.1, 0.05, 125), (0.1, 0.0, 125), (0.02, 0.0, 1000)])
def test_hits_that_seldom_differ(up: float, down: float, n: int) -> None:
    rng = np.random.default_rng(2)

    def interval() -> Interval:
        u = rng.random(n)
        found = paired_difference((u < up) * 1.0, (u > 1 - down) * 1.0)
        return found.low, found.high

    check(covered(up - down, interval))


@pytest.mark.parametrize(("middle", "seeds"), [(0.0, 3), (2.2, 5), (4.6, 5)])
def test_means_over_seeds(middle: float, seeds: int) -> None:
    rng, n = np.random.default_rng(3), 300
    normal = np.random.default_rng(4).standard_normal(1_000_000)
    truth = float((1 / (1 + np.exp(-middle - math.hypot(0.3, 1.5) * normal))).mean())

    def interval() -> Interval:
        logit = middle + 0.3 * rng.standard_normal((seeds, 1)) + 1.5 * rng.standard_normal((1, n))
        return seeds_interval((rng.random((seeds, n)) < 1 / (1 + np.exp(-logit))) * 1.0)[:2]

    check(covered(truth, interval))


def test_few_runs() -> None:
    rng = np.random.default_rng(5)
    for runs in (2, 3, 5):
        check(covered(0.4, lambda: few_runs(0.4 + 0.02 * rng.standard_normal(runs))))  # noqa: B023


def test_the_check_can_fail() -> None:
    """A normal interval for three runs, the one error that is made most often, is found out."""
    rng = np.random.default_rng(6)

    def interval() -> Interval:
        x = rng.standard_normal(3)
        half = 1.96 * x.std(ddof=1) / math.sqrt(3)
        return x.mean() - half, x.mean() + half

    with pytest.raises(AssertionError):
        check(covered(0.0, interval))
