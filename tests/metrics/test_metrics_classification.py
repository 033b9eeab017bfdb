"""Aspect metrics against explicit loops and scikit-learn, at their extremes, and their constants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.metrics import count_estimate, f1_macro, f1_micro, item_values, share
from nearfar.metrics.classification import (
    calibration_counts,
    class_counts,
    constant_detection,
    constant_pairs,
    constant_polarity,
    detection_counts,
    exact_counts,
    expected_calibration_error,
    pair_counts,
    weighted_f1,
)

sklearn_metrics = pytest.importorskip("sklearn.metrics")
PAIRS = np.array(list(itertools.product(range(4), (1, 2, 3))))


def answers(seed: int, n: int = 80, wrong: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.choice(4, size=(n, 4), p=[0.6, 0.2, 0.05, 0.15])
    found = np.where(rng.random(truth.shape) < wrong, rng.choice(4, size=truth.shape), truth)
    return truth, found


@pytest.mark.parametrize("seed", range(3))
def test_detection_and_pairs_against_sklearn(seed: int) -> None:
    truth, found = answers(seed)
    for average, statistic in (("micro", f1_micro), ("macro", f1_macro)):
        wanted = sklearn_metrics.f1_score(truth > 0, found > 0, average=average, zero_division=0)
        assert float(statistic(detection_counts(truth, found).sum(0))) == pytest.approx(wanted, abs=1e-12)
        hot = [np.stack([x[:, a] == k for a, k in PAIRS], 1) for x in (truth, found)]
        wanted = sklearn_metrics.f1_score(*hot, average=average, zero_division=0)
        assert float(statistic(pair_counts(truth, found, PAIRS).sum(0))) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_headline_against_sklearn(seed: int) -> None:
    truth, found = answers(seed)
    absent_is_neutral = [np.where(x == 0, 2, x) - 1 for x in (truth, found)]
    wanted = np.mean(
        [
            sklearn_metrics.f1_score(t, f, average="weighted", zero_division=0)
            for t, f in zip(absent_is_neutral[0].T, absent_is_neutral[1].T, strict=True)
        ]
    )
    assert float(weighted_f1(class_counts(*absent_is_neutral, 3).sum(0))) == pytest.approx(wanted, abs=1e-12)


def loop_f1(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Pairs by explicit loops over reviews, aspects and polarities; unknown labels left out."""
    true: dict[tuple[int, int], int] = {}
    said: dict[tuple[int, int], int] = {}
    both: dict[tuple[int, int], int] = {}
    for i in range(len(truth)):
        for a in range(truth.shape[1]):
            if truth[i, a] < 0:
                continue
            t, f = (a, int(truth[i, a])), (a, int(found[i, a]))
            if t[1]:
                true[t] = true.get(t, 0) + 1
            if f[1]:
                said[f] = said.get(f, 0) + 1
            if t[1] and t == f:
                both[t] = both.get(t, 0) + 1
    each = []
    for a, k in PAIRS:
        total = true.get((a, k), 0) + said.get((a, k), 0)
        each.append(2 * both.get((a, k), 0) / total if total else 0.0)
    total = sum(true.values()) + sum(said.values())
    return {"micro": 2 * sum(both.values()) / total if total else 0.0, "macro": float(np.mean(each))}


def test_unknown_labels_count_nowhere() -> None:
    truth, found = answers(7)
    truth[np.random.default_rng(0).random(truth.shape) < 0.3] = -1
    wanted = loop_f1(truth, found)
    sums = pair_counts(truth, found, PAIRS).sum(0)
    assert float(f1_micro(sums)) == pytest.approx(wanted["micro"], abs=1e-12)
    assert float(f1_macro(sums)) == pytest.approx(wanted["macro"], abs=1e-12)
    exact = [all(t in (-1, f) for t, f in zip(*rows, strict=True)) for rows in zip(truth, found, strict=True)]
    assert float(share(exact_counts(truth, found).sum(0))) == pytest.approx(np.mean(exact))


def test_calibration_against_a_loop() -> None:
    rng = np.random.default_rng(1)
    confidence, known = rng.random((60, 3)), rng.random((60, 3)) < 0.8
    right = rng.random((60, 3)) < confidence**2
    confidence[0, 0], confidence[0, 1] = 1.0, 0.0
    total, gap = int(known.sum()), 0.0
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        inside = known & (confidence <= high) & ((confidence > low) | (b == 0))
        if inside.any():
            gap += inside.sum() / total * abs(confidence[inside].mean() - right[inside].mean())
    found = expected_calibration_error(calibration_counts(confidence, right, known).sum(0))
    assert float(found) == pytest.approx(gap, abs=1e-12)


def test_perfect_and_empty_answers() -> None:
    truth, _ = answers(3)
    for counts, statistic in (
        (detection_counts(truth, truth), f1_macro),
        (pair_counts(truth, truth, PAIRS), f1_micro),
        (exact_counts(truth, truth), share),
        (class_counts(truth, truth, 4), weighted_f1),
    ):
        assert float(statistic(counts.sum(0))) == 1.0
    nothing = np.zeros_like(truth)
    assert float(f1_micro(pair_counts(truth, nothing, PAIRS).sum(0))) == 0.0
    unknown = np.full_like(truth, -1)
    assert not detection_counts(unknown, truth).any()


@pytest.mark.slow
def test_constants_are_the_best_there_is() -> None:
    """Every answer that is the same for all reviews, tried one by one."""
    truth, _ = answers(5, n=30)
    best = {"micro": 0.0, "macro": 0.0}
    detected = {"micro": 0.0, "macro": 0.0}
    for row in itertools.product(range(4), repeat=4):
        said = np.broadcast_to(np.array(row), truth.shape)
        for average, statistic in (("micro", f1_micro), ("macro", f1_macro)):
            found = float(statistic(pair_counts(truth, said, PAIRS).sum(0)))
            best[average] = max(best[average], found)
            found = float(statistic(detection_counts(truth, said).sum(0)))
            detected[average] = max(detected[average], found)
    for average in ("micro", "macro"):
        assert constant_pairs(truth, PAIRS, 3, average) == pytest.approx(best[average], abs=1e-12)
        assert constant_detection(truth, average) == pytest.approx(detected[average], abs=1e-12)
    assert constant_polarity(truth, 3).tolist() == [
        max((1, 2, 3), key=lambda k: ((column == k).sum(), -k)) for column in truth.T
    ]


@pytest.mark.slow
def test_intervals_resample_reviews_and_shares_average_to_the_metric() -> None:
    truth, found = answers(11, n=400)
    counts = pair_counts(truth, found, PAIRS)
    estimate = count_estimate(counts, f1_macro, "F1", chance=0.1, split="x")
    rng = np.random.default_rng(0)
    drawn = [float(f1_macro(counts[rng.integers(400, size=400)].sum(0))) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    # BCa corrects the bias of a resampled macro F1, so that it is not the percentiles themselves.
    assert math.isclose(estimate.high - estimate.low, high - low, rel_tol=0.2)
    assert estimate.low < estimate.value < estimate.high
    values = item_values(counts, f1_macro)
    assert values.mean() == pytest.approx(estimate.value, abs=1e-9)
    assert values.std() / 20 == pytest.approx(np.std(drawn), rel=0.15)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(NearfarError, match=r"\(3, 2\).*\(3, 1\)"):
        detection_counts(np.zeros((3, 2), int), np.zeros((3, 1), int))
    with pytest.raises(NearfarError, match="bins is 0"):
        calibration_counts(np.ones((1, 1)), np.ones((1, 1), bool), np.ones((1, 1), bool), bins=0)
    with pytest.raises(NearfarError, match="micro"):
        constant_detection(np.ones((2, 2), int), "weighted")
