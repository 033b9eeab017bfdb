"""The geometry of two boxes against loops, and the tower over it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.towers import build_tower, guess_tower, load_tower
from nearfar.towers.boxes import SPATIAL, BoxTower, names_of, spatial_numbers


def by_hand(s: Any, o: Any, w: float, h: float) -> list[float]:
    """The eight numbers, one pair at a time."""
    dx = ((o[0] + o[2]) / 2 - (s[0] + s[2]) / 2) / w
    dy = ((o[1] + o[3]) / 2 - (s[1] + s[3]) / 2) / h
    theta = math.atan2(dy, dx)
    area_s, area_o = ((b[2] - b[0]) * (b[3] - b[1]) / (w * h) for b in (s, o))
    return [dx, dy, dx**2 + dy**2, math.sin(theta), math.cos(theta), area_s, area_o, area_s / area_o]


def test_spatial_numbers_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 200, (2, 50, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 150, (2, 50, 2))], axis=2)
    size = rng.uniform(350, 900, (50, 2))
    raw = spatial_numbers(boxes[0], boxes[1], size)
    expected = [by_hand(s, o, w, h) for s, o, (w, h) in zip(boxes[0], boxes[1], size, strict=True)]
    np.testing.assert_allclose(raw, expected, rtol=1e-9, atol=1e-12)
    log = spatial_numbers(boxes[0], boxes[1], size, "log")
    np.testing.assert_allclose(log[:, :5], raw[:, :5])
    np.testing.assert_allclose(log[:, 5:], np.log(raw[:, 5:]))
    iou = spatial_numbers(boxes[0], boxes[1], size, "iou")[:, 8]
    for i in range(50):
        s, o = boxes[0, i], boxes[1, i]
        shared = max(0, min(s[2], o[2]) - max(s[0], o[0])) * max(0, min(s[3], o[3]) - max(s[1], o[1]))
        union = np.prod(s[2:] - s[:2]) + np.prod(o[2:] - o[:2]) - shared
        assert iou[i] == pytest.approx(shared / union)
    for variant in SPATIAL:
        assert spatial_numbers(boxes[0], boxes[1], size, variant).shape == (50, len(names_of(variant)))


def test_numbers_relative_to_the_boxes_do_not_change_with_scale() -> None:
    s, o = np.array([[10.0, 20, 60, 90]]), np.array([[40.0, 50, 140, 100]])
    a = spatial_numbers(s, o, np.array([[200.0, 200]]), "relative")
    b = spatial_numbers(3 * s, 3 * o, np.array([[600.0, 600]]), "relative")
    np.testing.assert_allclose(a, b)
    # In a picture that is larger alone, the numbers in units of the boxes stay, the others do not.
    c = spatial_numbers(s, o, np.array([[600.0, 600]]), "relative")
    np.testing.assert_allclose(a[:, 8:-2], c[:, 8:-2])
    assert abs(a[0, 0] - c[0, 0]) > 0.1


def test_extreme_boxes_stay_finite() -> None:
    s = np.array([[0.0, 0, 1e-3, 1e-3], [5, 5, 6, 6], [0, 0, 1e5, 1e5]])
    o = np.array([[0.0, 0, 1e5, 1e5], [5, 5, 6, 6], [0, 0, 1e-3, 1e-3]])
    for variant in SPATIAL:
        assert np.isfinite(spatial_numbers(s, o, np.full((3, 2), 1e5), variant)).all()
    # Equal centres have no direction.
    assert spatial_numbers(s[1:2], o[1:2], np.full((1, 2), 9.0))[0, :5].tolist() == [0, 0, 0, 0, 0]


def values(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 200, (2, n, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 150, (2, n, 2))], axis=2)
    return np.concatenate([boxes[0], boxes[1], rng.uniform(350, 900, (n, 2))], axis=1)


@pytest.mark.parametrize("variant", SPATIAL)
def test_training_rows_have_mean_0_and_variance_1(tmp_path: Path, variant: str) -> None:
    train, later = values(60), values(5, 1)
    tower = build_tower("boxes", variant=variant).fit(train)
    rows = tower.read(train).batch(torch.arange(60)).numpy()
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(0), 1, atol=1e-5)
    raw = spatial_numbers(later[:, :4], later[:, 4:8], later[:, 8:], variant)
    known = spatial_numbers(train[:, :4], train[:, 4:8], train[:, 8:], variant)
    expected = (raw - known.mean(0)) / known.std(0)
    np.testing.assert_allclose(tower.reference(later), expected, rtol=1e-4, atol=1e-5)
    tower.save(tmp_path)
    again = load_tower(tmp_path)
    assert isinstance(again, BoxTower)
    assert np.array_equal(again.reference(later), tower.reference(later))
    assert again.build().width == rows.shape[1] == len(names_of(variant))


def test_a_number_that_never_changes_is_0_and_survives_saving(tmp_path: Path) -> None:
    train = values(1).repeat(3, axis=0)
    tower = BoxTower("raw").fit(train)
    tower.save(tmp_path)
    assert not load_tower(tmp_path).reference(values(2, 5)).any()


def test_boxes_that_are_none_are_named() -> None:
    good = values(1)[0]
    flat, endless, small = good.copy(), good.copy(), good.copy()
    flat[6], endless[3], small[8] = flat[4], math.inf, 0
    reasons = BoxTower().check([good, flat, endless, small, good[:8], ["left"] * 10])
    assert reasons == [
        None,
        "box without area",
        "number that is not finite",
        "picture without a size",
        "not ten numbers",
        "no number",
    ]
    with pytest.raises(NearfarError, match="did you mean 'raw'"):
        build_tower("boxes", variant="rw")
    with pytest.raises(NearfarError, match="did you mean 'relative'"):
        names_of("relativ")
    with pytest.raises(NearfarError, match="was not fitted"):
        BoxTower().read(values(2))
    assert guess_tower(values(2)) == "vector"  # boxes are asked for by name
