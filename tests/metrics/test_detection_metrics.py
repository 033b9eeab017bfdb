"""AP and AR against a maintained evaluator, resamples against pictures that are really repeated, intervals, changes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.metrics.detection import (
    Boxes,
    box_overlap,
    detection_change,
    detection_estimates,
    detection_evidence,
)
from nearfar.metrics.detection_evaluator import check_evidence, evaluator_scores

NAMES = ("AP", "AP50", "AP75", "AR")
GROUPS = ("a", "b")


def coarse(rng: np.random.Generator, k: int) -> np.ndarray:
    """Boxes on a grid of 10 pixels, so that overlaps are often equal."""
    corner = rng.integers(0, 6, (k, 2)) * 10.0
    return np.concatenate([corner, corner + rng.integers(1, 6, (k, 2)) * 10.0], axis=1)


def random_case(seed: int, crowds: bool = True) -> tuple[Boxes, Boxes, int]:
    rng = np.random.default_rng(seed)
    n, m, d = int(rng.integers(1, 14)), int(rng.integers(1, 40)), int(rng.integers(1, 250))
    crowd = (rng.random(m) < 0.15) & crowds
    true = Boxes(
        coarse(rng, m),
        rng.integers(0, 3, m),
        rng.integers(0, n, m),
        crowd=crowd,
        group=rng.integers(-1, 2, m),
    )
    scores = rng.integers(0, 8, d) / 8.0 if seed % 2 else rng.random(d)
    return Boxes(coarse(rng, d), rng.integers(0, 4, d), rng.integers(0, n, d), scores=scores), true, n


def one_each(seed: int, n: int, noise: float, group_noise: float = 0.0) -> tuple[Boxes, Boxes]:
    """A true box in each of n pictures, of two groups in turn, and three detections around it."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 100, (n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(30, 90, (n, 2))], axis=1)
    group = np.arange(n) % 2
    spread = noise + group_noise * (group == 0)
    found = boxes[:, None] + rng.normal(0, 1, (n, 3, 4)) * spread[:, None, None]
    found[..., 2:] = np.maximum(found[..., 2:], found[..., :2] + 1)
    zero = np.zeros(n, int)
    detections = Boxes(
        found.reshape(-1, 4), np.zeros(3 * n, int), np.repeat(np.arange(n), 3), scores=rng.random(3 * n)
    )
    return detections, Boxes(boxes, zero, np.arange(n), group=group)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_scores_are_those_of_the_evaluator(seed: int) -> None:
    pytest.importorskip("faster_coco_eval")
    found, true, n = random_case(seed)
    own = {
        name: float(value[0])
        for name, value in detection_evidence(found, true, n, GROUPS).statistics().items()
    }
    assert check_evidence(found, true, n, GROUPS, own, tolerance=1e-12) <= 1e-12
    theirs = evaluator_scores(found, true, n)
    np.testing.assert_allclose([own[name] for name in NAMES], [theirs[name] for name in NAMES], atol=1e-12)


def test_a_difference_from_the_evaluator_is_an_error() -> None:
    pytest.importorskip("faster_coco_eval")
    found, true, n = random_case(3)
    own = {name: float(value[0]) for name, value in detection_evidence(found, true, n).statistics().items()}
    with pytest.raises(NearfarError, match=r"AP75 is .* by faster-coco-eval"):
        check_evidence(found, true, n, (), own | {"AP75": own["AP75"] + 1e-6})


def repeated(boxes: Boxes, times: np.ndarray) -> Boxes:
    """Each picture so many times, as pictures of their own."""
    rows, pictures, number = [], [], 0
    for picture, count in enumerate(times):
        own = np.flatnonzero(boxes.picture == picture)
        for _ in range(int(count)):
            rows.append(own)
            pictures.append(np.full(len(own), number))
            number += 1
    chosen = np.concatenate([*rows, np.zeros(0, int)]).astype(int)
    optional = [None if v is None else v[chosen] for v in (boxes.scores, boxes.crowd, boxes.group)]
    where = np.concatenate([*pictures, np.zeros(0, int)]).astype(int)
    return Boxes(boxes.boxes[chosen], boxes.labels[chosen], where, *optional)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2, 4, 6])  # scores without ties, whose order would be another choice
def test_weights_are_pictures_that_are_really_repeated(seed: int) -> None:
    found, true, n = random_case(seed)
    evidence = detection_evidence(found, true, n, GROUPS)
    weights = np.random.default_rng(seed).integers(0, 4, (6, n))
    weights[:, 0] += weights.sum(axis=1) == 0
    scores = evidence.statistics(weights.astype(float))
    for row, times in enumerate(weights):
        again = detection_evidence(
            repeated(found, times), repeated(true, times), int(times.sum()), GROUPS
        ).statistics()
        for name, value in scores.items():
            np.testing.assert_allclose(value[row], again[name][0], atol=1e-12, err_msg=name)


def test_extremes() -> None:
    found, true = one_each(0, 6, 0.0)
    perfect = detection_evidence(found, true, 6, GROUPS).statistics()
    # Two of three detections of a picture are copies and wrong, whatever their scores.
    assert perfect["AR"][0] == 1.0
    assert perfect["AR/gap"][0] == 0.0
    best = Boxes(true.boxes, true.labels, true.picture, scores=np.ones(6))
    assert detection_evidence(best, true, 6).statistics()["AP"][0] == 1.0
    empty = Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, int), scores=np.zeros(0))
    nothing = detection_evidence(empty, true, 6, GROUPS).statistics()
    assert all(nothing[name][0] == 0.0 for name in NAMES)
    only_a = true.picture[true.group == 0]  # type: ignore[index]
    weights = np.zeros((1, 6))
    weights[0, only_a] = 1
    half = detection_evidence(best, true, 6, GROUPS).statistics(weights)
    assert half["AP/a"][0] == 1.0
    assert np.isnan(half["AP/b"][0])
    assert np.isnan(half["AP/gap"][0])


def test_overlap_is_the_iou() -> None:
    a, b = np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [5, 5, 6, 6], [0, 0, 2, 2], [0, 0, 2, 1]])
    np.testing.assert_allclose(box_overlap(a, b)[0], [1 / 3, 0, 1, 0.5])
    crowd = np.array([True, True, True, True])
    np.testing.assert_allclose(box_overlap(a, b, crowd)[0], [0.5, 0, 1, 0.5])


@pytest.mark.slow
def test_values_of_pictures_have_the_statistic_as_their_mean_and_its_error_as_their_spread() -> None:
    found, true = one_each(1, 120, 8.0, 6.0)
    evidence = detection_evidence(found, true, 120, GROUPS)
    values, scores = evidence.item_values(), evidence.statistics()
    drawn = evidence.statistics(evidence.resamples(600, seed=1))
    for name in ("AP", "AP/a", "AP/gap", "AR/gap"):
        assert values[name].mean() == pytest.approx(scores[name][0], abs=1e-12)
        error = values[name].std(ddof=1) / 120**0.5
        assert error == pytest.approx(drawn[name].std(), rel=0.2), name
    other = values["AP/a"][evidence.strata == 1]
    np.testing.assert_allclose(other, other[0], err_msg="pictures of b have no part in the score of a")


def test_resamples_keep_the_sizes_of_the_groups() -> None:
    found, true = one_each(2, 31, 5.0)
    evidence = detection_evidence(found, true, 31, GROUPS)
    weights = evidence.resamples(50, seed=3)
    assert (weights[:, evidence.strata == 0].sum(axis=1) == 16).all()
    assert (weights[:, evidence.strata == 1].sum(axis=1) == 15).all()
    assert np.array_equal(weights, evidence.resamples(50, seed=3))
    assert not np.array_equal(weights, evidence.resamples(50, seed=4))


@pytest.mark.slow
def test_estimates_state_interval_and_size() -> None:
    found, true = one_each(3, 90, 6.0, 10.0)
    evidence = detection_evidence(found, true, 90, GROUPS)
    estimates, values = detection_estimates(evidence, split="s", chance={"AP": 0.1}, resamples=400)
    assert set(estimates) == set(values) == {*NAMES, *(f"{m}/{g}" for m in NAMES for g in (*GROUPS, "gap"))}
    for name, e in estimates.items():
        assert e.low <= e.value <= e.high, name
    assert (estimates["AP"].chance, estimates["AP/gap"].chance) == (0.1, 0.0)
    assert (estimates["AP"].n, estimates["AP/a"].n, estimates["AP/gap"].n) == (90, 45, 90)
    assert estimates["AP/gap"].low > 0, "b is found better by construction"
    rough, _ = detection_estimates(evidence, split="s", resamples=0)
    width = estimates["AP"].high - estimates["AP"].low
    assert rough["AP"].high - rough["AP"].low == pytest.approx(width, rel=0.25)


@pytest.mark.slow
def test_intervals_cover() -> None:
    """Of 30 samples of 80 pictures, most intervals hold the gap of a large set (of many samples 92 in 100)."""
    found, true = one_each(99, 3000, 6.0, 8.0)
    truth = detection_evidence(found, true, 3000, GROUPS).statistics()["AP/gap"][0]
    held = 0
    for seed in range(30):
        evidence = detection_evidence(*one_each(seed, 80, 6.0, 8.0), 80, GROUPS)
        gap = detection_estimates(evidence, resamples=100, seed=seed)[0]["AP/gap"]
        held += gap.low <= truth <= gap.high
    assert held >= 25, f"{held} of 30"


@pytest.mark.slow
def test_a_change_is_paired_and_falls_into_two_modes() -> None:
    worse, true = one_each(5, 100, 8.0, 8.0)
    better = Boxes(
        worse.boxes * 0.85 + np.repeat(true.boxes, 3, axis=0) * 0.15,
        worse.labels,
        worse.picture,
        worse.scores,
    )
    before, after = (detection_evidence(found, true, 100, GROUPS) for found in (worse, better))
    change = detection_change(before, after, resamples=400)
    first, second = (e.statistics() for e in (before, after))
    for name in ("AP", "AP/a", "AP/b", "AP/gap"):
        assert change[name].value == pytest.approx(second[name][0] - first[name][0])
        assert change[name].low <= change[name].value <= change[name].high
    a, b = change["AP/a"].value, change["AP/b"].value
    assert change["common mode"].value == pytest.approx((a + b) / 2)
    assert change["AP/gap"].value == pytest.approx(b - a)
    assert change["AP"].distinguishable
    # Pairing pays: the interval of the change is much narrower than two intervals of their own would give.
    width = change["AP"].high - change["AP"].low
    alone = [detection_estimates(e, resamples=400)[0]["AP"] for e in (before, after)]
    assert width < 0.7 * sum((e.high - e.low) ** 2 for e in alone) ** 0.5
    same = detection_change(before, before, resamples=200)
    assert all(c.value == c.low == c.high == 0 and not c.distinguishable for c in same.values())
    assert same["AP"].relative == 0


@pytest.mark.slow
def test_gap_size_is_the_change_of_the_absolute_gap() -> None:
    found, true = one_each(6, 80, 5.0, 12.0)
    flipped = Boxes(true.boxes, true.labels, true.picture, group=1 - true.group)  # type: ignore[operator]
    evidence = detection_evidence(found, flipped, 80, GROUPS)
    better = detection_evidence(one_each(6, 80, 2.0)[0], flipped, 80, GROUPS)
    change = detection_change(evidence, better, resamples=200)
    assert change["AP/gap"].before < 0
    assert change["gap size"].value == pytest.approx(
        abs(change["AP/gap"].after) - abs(change["AP/gap"].before)
    )
    assert change["gap size"].value < 0


def test_wrong_input_says_what() -> None:
    found, true = one_each(7, 5, 1.0)
    with pytest.raises(NearfarError, match="detections need scores"):
        detection_evidence(true, true, 5)
    with pytest.raises(NearfarError, match="between 0 and 3"):
        detection_evidence(found, true, 4)
    with pytest.raises(NearfarError, match="two names"):
        detection_evidence(found, true, 5, ("a",))
    with pytest.raises(NearfarError, match="must be finite"):
        Boxes(np.full((1, 4), np.nan), np.zeros(1, int), np.zeros(1, int))
    with pytest.raises(NearfarError, match="one for each of 1 boxes"):
        Boxes(np.zeros((1, 4)), np.zeros(2, int), np.zeros(1, int))
    evidence = detection_evidence(found, true, 5)
    with pytest.raises(NearfarError, match=r"\(rows, 5 pictures\)"):
        evidence.statistics(np.ones((1, 4)))
    with pytest.raises(NearfarError, match="cannot be paired"):
        detection_change(evidence, detection_evidence(found, true, 5, GROUPS))
    with pytest.raises(NearfarError, match="metric=AP60"):
        detection_change(evidence, evidence, "AP60")


@pytest.mark.slow
def test_larger_noise_scores_lower() -> None:
    scores = [
        detection_evidence(*one_each(8, 60, noise), 60).statistics()["AP"][0] for noise in (1.0, 6.0, 20.0)
    ]
    assert all(a > b for a, b in pairwise(scores))
