"""Expression by retrieval and its correlations, against loops, scipy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge

from nearfar.errors import NearfarError
from nearfar.metrics import paired_difference
from nearfar.systems.tissue.evaluation import (
    correlation_values,
    pearson,
    pearson_estimate,
    retrieved_expression,
    ridge_predictions,
)

RNG = np.random.default_rng(0)


def test_retrieved_expression_against_a_loop() -> None:
    images, genes = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.eye(20)[:, :5]
    genes = genes + 0.3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    expression = RNG.random((20, 3))
    means = retrieved_expression(images, genes, expression, k=4)
    for row, image in zip(means, images.double().numpy(), strict=True):
        vectors = genes.double().numpy()
        cosine = vectors @ image / np.linalg.norm(vectors, axis=1) / np.linalg.norm(image)
        np.testing.assert_allclose(row, expression[np.argsort(-cosine)[:4]].mean(0))
    np.testing.assert_allclose(retrieved_expression(images, genes, expression, k=20)[0], expression.mean(0))
    with pytest.raises(NearfarError, match="retrieve=21: there are 20 training spots"):
        retrieved_expression(images, genes, expression, k=21)


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


def test_ridge_is_scikit_learns() -> None:
    x, y, new = RNG.standard_normal((40, 7)), RNG.standard_normal((40, 3)), RNG.standard_normal((5, 7))
    x[:, 3] = 2.0  # says nothing, and must not divide by 0
    new[:, 3] = 2.0
    mean, sd = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    other = Ridge(alpha=2.0 * 40 / 100).fit((x - mean) / sd, y).predict((new - mean) / sd)
    np.testing.assert_allclose(ridge_predictions(x, y, new, penalty=2.0), other, rtol=1e-8)
