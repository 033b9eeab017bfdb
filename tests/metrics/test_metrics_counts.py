"""Metrics of sums against loops, scikit-learn, and how often their intervals cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from nearfar.errors import NearfarError
from nearfar.metrics import (
    by_group,
    count_estimate,
    f1_macro,
    f1_micro,
    item_values,
    mean_interval,
    paired_difference,
    share,
)


def confusion(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(n, classes, 3): true positives, false positives, false negatives of multi-hot rows."""
    return np.stack([truth & found, ~truth & found, truth & ~found], axis=-1).astype(float)


def drawn(seed: int, n: int = 400, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.random((n, classes)) < 0.3
    return truth, truth ^ (rng.random((n, classes)) < 0.15)


@pytest.mark.parametrize(("statistic", "average"), [(f1_micro, "micro"), (f1_macro, "macro")])
def test_f1_is_that_of_scikit_learn(statistic, average) -> None:
    truth, found = drawn(0)
    wanted = f1_score(truth, found, average=average, zero_division=0)
    assert float(statistic(confusion(truth, found).sum(axis=0))) == pytest.approx(wanted, abs=1e-12)


def test_a_class_that_nobody_has_or_finds_scores_0() -> None:
    truth, found = drawn(1)
    truth[:, 2] = found[:, 2] = False
    wanted = f1_score(truth, found, average="macro", zero_division=0)
    counts = confusion(truth, found)
    assert float(f1_macro(counts.sum(axis=0))) == pytest.approx(wanted)
    assert np.isfinite(item_values(counts, f1_macro)).all()


@pytest.mark.parametrize("statistic", [f1_micro, f1_macro])
def test_item_values_have_the_statistic_as_mean_and_are_what_leaving_an_item_out_shows(statistic) -> None:
    counts = confusion(*drawn(2, n=2000))
    total = counts.sum(axis=0)
    values = item_values(counts, statistic)
    assert values.mean() == pytest.approx(float(statistic(total)), abs=1e-12)
    left_out = np.array([len(counts) * (statistic(total) - statistic(total - c)) for c in counts[:200]])
    found = values[:200] - values.mean()
    assert np.abs(found - left_out).max() < 0.01 * np.abs(left_out).max()


def test_values_of_a_share_are_the_hits() -> None:
    hits = np.random.default_rng(0).random(50) < 0.8
    counts = np.stack([hits, np.ones(50)], axis=1)
    np.testing.assert_allclose(item_values(counts, share), hits, atol=1e-6)


def test_groups_are_the_items() -> None:
    """Pairs of a picture that fall alike: an interval over pairs would be far too narrow."""
    pictures = np.repeat(np.arange(40), 10)
    right = np.repeat(np.random.default_rng(3).random(40) < 0.6, 10)
    pairs = np.stack([right, np.ones(400)], axis=1).astype(float)
    ids, counts = by_group(pairs, pictures.tolist())
    assert ids == list(range(40))
    assert counts.sum() == pairs.sum()
    narrow, wide = (count_estimate(c, share, "accuracy", chance=0.5) for c in (pairs, counts))
    assert narrow.value == wide.value
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)
    with pytest.raises(NearfarError, match="one group for each row"):
        by_group(pairs, [1, 2])


def test_intervals_agree_with_those_of_means_where_the_statistic_is_one() -> None:
    hits = (np.random.default_rng(5).random(500) < 0.7).astype(float)
    estimate = count_estimate(np.stack([hits, np.ones(500)], axis=1), share, "accuracy", chance=0.5)
    low, high, _ = mean_interval(hits)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    truth, found = drawn(6, n=20_000)
    population = confusion(truth, found)
    aim = float(f1_macro(population.sum(axis=0)))
    rng = np.random.default_rng(0)
    covered = dict.fromkeys((0, 300), 0)
    for _ in range(300):
        counts = population[rng.integers(0, len(population), 150)]
        for resamples in covered:
            e = count_estimate(counts, f1_macro, "F1", chance=0.0, resamples=resamples)
            covered[resamples] += e.low <= aim <= e.high
    assert all(0.91 < hits / 300 < 0.985 for hits in covered.values()), covered


def test_ends_and_little_data_have_an_interval_with_width() -> None:
    perfect = np.tile([[1.0, 0.0, 0.0]], (12, 1, 1))
    e = count_estimate(perfect, f1_micro, "F1", chance=0.0)
    assert e.value == 1.0
    assert 0.7 < e.low < 0.8
    rare = np.zeros((1000, 1, 3))
    rare[:4, 0, 0] = rare[4:6, 0, 1] = 1.0
    e = count_estimate(rare, f1_micro, "F1", chance=0.0)
    assert e.low < 0.5
    assert e.high > 0.92
    assert e.protocol["interval"] == "bent normal"
    nothing = count_estimate(np.zeros((5, 2, 3)), f1_micro, "F1", chance=0.0)
    assert (nothing.low, nothing.high) == (0.0, 1.0)


def test_differences_of_f1_are_paired() -> None:
    truth, found = drawn(7, n=800)
    better = found.copy()
    better[:, 0] = truth[:, 0]
    a, b = (item_values(confusion(truth, f), f1_micro) for f in (better, found))
    assert paired_difference(a, b).verdict == "better"
    other = found[::-1][np.argsort(np.arange(800))[::-1]]
    assert paired_difference(b, item_values(confusion(truth, other), f1_micro)).value == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (np.zeros(3), "one row of counts"),
        (np.full((2, 2), np.nan), "not finite"),
        (np.zeros((0, 2)), "one row"),
    ],
)
def test_what_is_no_table_of_counts_is_refused(counts, words) -> None:
    with pytest.raises(NearfarError, match=words):
        item_values(counts, share)


def test_a_statistic_beyond_1_is_refused() -> None:
    with pytest.raises(NearfarError, match="between 0 and 1"):
        count_estimate(np.ones((3, 2)), lambda sums: sums[..., 0], "sum", chance=0.0)
