"""Paired differences: the right interval, the right words, and coverage by simulation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.metrics import Estimate, compare, holm, paired_difference
from nearfar.metrics.intervals import t_quantile


def test_one_seed_is_the_paired_t_interval_and_says_so():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 50))
    difference = paired_difference(a, b)
    expected = stats.ttest_rel(a, b).confidence_interval()
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.seeds == 1
    assert "items only" in difference.scope


def test_interval_by_explicit_loops():
    rng = np.random.default_rng(1)
    d = rng.normal(0.1, 0.3, (3, 20)) + rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 0.5, (1, 20))
    base = rng.random((3, 20))
    mean = sum(d[s, i] for s in range(3) for i in range(20)) / 60
    rows = [sum(d[s]) / 20 for s in range(3)]
    columns = [sum(d[:, i]) / 3 for i in range(20)]
    v_seeds = sum((r - mean) ** 2 for r in rows) / 2 / 3
    v_items = sum((c - mean) ** 2 for c in columns) / 19 / 20
    rest = sum((d[s, i] - rows[s] - columns[i] + mean) ** 2 for s in range(3) for i in range(20))
    v_rest = rest / (2 * 19) / 60
    shared = max(v_items - v_rest, 0.0)
    weight = v_seeds**2 / (v_seeds**2 + shared**2)  # (S − 1) / 2 is 1
    t = weight * t_quantile(0.975, 2) + (1 - weight) * t_quantile(0.975, 19)
    half = max(t * math.sqrt(v_seeds + shared), math.sqrt(v_items))
    result = paired_difference(base + d, base, metric="MRR")
    assert (result.value, result.low, result.high) == pytest.approx((mean, mean - half, mean + half))
    assert result.per_seed == pytest.approx(rows)
    assert result.relative == pytest.approx(mean / base.mean())


def test_verdicts_and_their_mirror():
    rng = np.random.default_rng(2)
    base = rng.random((4, 300))
    better = base + 0.1 + 0.01 * rng.standard_normal((4, 300))
    assert paired_difference(better, base).verdict == "better"
    assert paired_difference(base, better).verdict == "worse"
    assert paired_difference(base, better, higher_is_better=False).verdict == "better"
    assert paired_difference(base, base).verdict == "not distinguishable"
    forth, back = paired_difference(better, base), paired_difference(base, better)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))


def test_a_lucky_seed_is_not_a_better_method():
    """Two seeds that disagree: over items the difference is clear, over trainings it is not."""
    rng = np.random.default_rng(3)
    noise = 0.01 * rng.standard_normal((2, 500))
    differences = np.array([[0.08], [0.001]]) + noise
    zero = np.zeros((2, 500))
    assert paired_difference(differences[:1], zero[:1]).verdict == "better"
    assert paired_difference(differences, zero).verdict == "not distinguishable"


def test_few_differing_items_do_not_shrink_the_interval_to_nothing():
    same = np.ones(100)
    none = paired_difference(same, same)
    assert none.verdict == "not distinguishable"
    assert 0.02 < none.high < 0.04  # three in a hundred could differ unseen
    one = same.copy()
    one[0] = 0.0
    assert paired_difference(same, one).verdict == "not distinguishable"
    # Where every item differs nothing is added: the paired t interval.
    d = np.random.default_rng(0).normal(0.1, 0.2, 30)
    half = t_quantile(0.975, 29) * d.std(ddof=1) / math.sqrt(30)
    assert paired_difference(d + 1, np.ones(30)).high == pytest.approx(d.mean() + half)
    # Scores of another range are taken as they are.
    assert paired_difference(100 * same, 100 * one).high == pytest.approx(
        100 * paired_difference(same, one).high
    )


def test_bad_scores():
    with pytest.raises(NearfarError, match="same seeds on the same items"):
        paired_difference(np.ones((2, 5)), np.ones((2, 6)))
    with pytest.raises(NearfarError, match="b holds 1 scores that are not finite"):
        paired_difference(np.ones(3), np.array([1.0, np.nan, 1.0]))
    with pytest.raises(NearfarError, match="at least two"):
        paired_difference(np.ones((2, 1)), np.ones((2, 1)))
    with pytest.raises(NearfarError, match="level between 0 and 1"):
        paired_difference(np.ones(3), np.ones(3), confidence=95)


def estimate(value: float, **protocol: object) -> Estimate:
    common = {"gallery": 500, "split": "a1", "confidence": 0.95}
    return Estimate(value, value - 0.03, value + 0.03, 0.002, 500, False, "R@1", {**common, **protocol})


def test_compare_refuses_with_the_reason():
    with pytest.raises(NearfarError, match="gallery differs: 500 and 3300"):
        compare(estimate(0.5), estimate(0.6, gallery=3300))
    with pytest.raises(NearfarError, match="split differs"):
        compare(estimate(0.5), estimate(0.6, split="b2"))
    with pytest.raises(NearfarError, match="confidence differs"):
        compare(estimate(0.5), estimate(0.6, confidence=0.9))


def test_compare_two_estimates():
    result = compare(estimate(0.5), estimate(0.6))
    assert result.value == pytest.approx(-0.1)
    assert (result.low, result.high) == pytest.approx((-0.1 - 0.03 * 2**0.5, -0.1 + 0.03 * 2**0.5))
    assert result.verdict == "worse"
    assert compare(estimate(0.5), estimate(0.51)).verdict == "not distinguishable"
    json.dumps(compare(estimate(0.5), estimate(0.0)).to_dict(), allow_nan=False)


@pytest.mark.slow
def test_p_is_where_the_interval_begins_to_touch_zero():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(7)
    a, b = rng.random((2, 40))
    assert paired_difference(a + 0.1, b).p == pytest.approx(stats.ttest_rel(a + 0.1, b).pvalue, rel=1e-4)
    base = rng.random((3, 60))
    found = paired_difference(base + 0.03 + 0.1 * rng.standard_normal((3, 60)), base)
    for confidence, covers in ((1 - found.p + 1e-5, True), (1 - found.p - 1e-5, False)):
        assert (abs(found.value) <= found.spread.half_width(0.5 + confidence / 2)) == covers
    assert math.isnan(compare(estimate(0.5), estimate(0.6)).p)


@pytest.mark.slow
def test_holm_by_its_definition():
    rng = np.random.default_rng(8)
    base = rng.random((4, 200))
    gains = {f"arm {k}": 0.004 * k for k in range(5)}
    found = {
        name: paired_difference(base + gain + 0.1 * rng.standard_normal((4, 200)), base)
        for name, gain in gains.items()
    }
    verdicts = holm(found)
    ordered = sorted(found, key=lambda name: found[name].p)
    for k, name in enumerate(ordered):
        rejected = all(found[other].p <= 0.05 / (5 - j) for j, other in enumerate(ordered[: k + 1]))
        assert (verdicts[name] != "not distinguishable") == rejected
    with pytest.raises(NearfarError, match="no p of unpaired"):
        holm({"unpaired": compare(estimate(0.5), estimate(0.6))})


# -- which way is better ---------------------------------------------------------------------------------------
def test_a_growing_gap_is_worse_wherever_it_is_judged() -> None:
    protocol = {"split": "5f0c", "confidence": 0.95}
    wide = Estimate(0.30, 0.28, 0.32, 0.0, 600, False, "AP/gap", protocol)
    narrow = Estimate(0.10, 0.08, 0.12, 0.0, 600, False, "AP/gap", protocol)
    assert compare(wide, narrow).verdict == "worse"
    assert compare(narrow, wide).verdict == "better"
    rng = np.random.default_rng(0)
    scores = rng.random(400)
    assert (
        paired_difference(scores + 0.2, scores + 0.01 * rng.random(400), metric="AP/gap").verdict == "worse"
    )


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("MRR", True), ("effective_rank", True), ("piece", True), ("AP/gap", False), ("val/median_rank", False),
     ("calibration_error", False), ("ECE", False), ("val_loss", False), ("ClipLoss", True)],
)  # fmt: skip
def test_an_estimate_says_which_way_it_is_better(metric: str, higher: bool) -> None:
    estimate = Estimate(0.5, 0.4, 0.6, 0.1, 10, False, metric)
    assert estimate.higher_is_better is higher
    assert Estimate.from_dict(estimate.to_dict()) == estimate
    old = {
        name: value
        for name, value in estimate.to_dict().items()
        if name not in ("higher_is_better", "unit", "control")
    }
    assert Estimate.from_dict(old) == estimate, "records of version 0.1"
    stated = Estimate(0.5, 0.4, 0.6, 0.1, 10, False, metric, {}, not higher, "nats")
    assert Estimate.from_dict(stated.to_dict()).higher_is_better is not higher
