"""Correlations of predicted with measured numbers, against scipy and by leaving out items."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr

from nearfar.errors import NearfarError
from nearfar.metrics import paired_difference
from nearfar.metrics.correlation import correlation_values, pearson, pearson_estimate

RNG = np.random.default_rng(0)


def test_pearson_is_scipys_and_constants_are_told_apart() -> None:
    a, b = RNG.random((30, 4)), RNG.random((30, 4))
    np.testing.assert_allclose(pearson(a, b), [pearsonr(a[:, g], b[:, g])[0] for g in range(4)])
    a[:, 1], b[:, 2] = 5.0, 0.1
    correlations = pearson(a, b)
    assert correlations[1] == 0
    assert np.isnan(correlations[2])
    assert np.isfinite(correlations[[0, 3]]).all()


def test_values_of_spots_average_to_the_correlation_and_say_how_they_pull() -> None:
    measured = RNG.standard_normal((50, 6))
    predicted = measured + RNG.standard_normal((50, 6))
    slides = np.repeat([0, 1], [20, 30])
    values, by_slide = correlation_values(predicted, measured, slides)
    wanted = [
        np.mean([pearsonr(predicted[slides == s, g], measured[slides == s, g])[0] for g in range(6)])
        for s in (0, 1)
    ]
    np.testing.assert_allclose([by_slide[0], by_slide[1]], wanted)
    assert values.mean() == pytest.approx(np.mean(wanted))
    # Leaving one spot out moves the correlation as its value says, to first order.
    one = np.zeros(50, int)
    values, by_slide = correlation_values(predicted, measured, one)
    moved = []
    for spot in range(50):
        rest = np.arange(50) != spot
        moved.append(by_slide[0] - pearson(predicted[rest], measured[rest]).mean())
    assert np.corrcoef(moved, values)[0, 1] > 0.99
    assert np.polyfit(values - values.mean(), moved, 1)[0] * 49 == pytest.approx(1, abs=0.2)
    with pytest.raises(NearfarError, match="no gene varies"):
        correlation_values(predicted, np.zeros((50, 6)), one)


@pytest.mark.slow
def test_the_interval_of_one_slide_covers_what_it_should() -> None:
    """Correlations of known truth: intervals over spots hold it about as often as they say."""
    rng, truth, hits = np.random.default_rng(1), 0.6, 0
    for _ in range(120):
        x = rng.standard_normal((60, 5))
        y = truth * x + np.sqrt(1 - truth**2) * rng.standard_normal((60, 5))
        estimate, values, _ = pearson_estimate(
            x, y, np.zeros(60, int), "r", split="s", protocol={}, resamples=200
        )
        hits += estimate.low <= truth <= estimate.high
        assert estimate.value == pytest.approx(values.mean())
    assert 0.88 <= hits / 120 <= 0.99


def test_several_slides_have_an_interval_over_slides() -> None:
    x = RNG.standard_normal((60, 4))
    y = x + RNG.standard_normal((60, 4))
    slides = np.repeat(np.arange(3), 20)
    estimate, _, by_slide = pearson_estimate(x, y, slides, "r", split="s", protocol={})
    mean, sd = np.mean(list(by_slide.values())), np.std(list(by_slide.values()), ddof=1)
    assert estimate.high - mean == pytest.approx(4.302653 * sd / np.sqrt(3), rel=1e-5)
    assert estimate.protocol["interval"] == "t over slides"
    better = paired_difference(*(correlation_values(p, y, slides)[0] for p in (y + 0.1 * x, x)))
    assert better.verdict == "better"
