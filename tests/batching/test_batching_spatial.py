"""Compact tiles: neighbours share a batch, slides are mixed, and what is counted in a batch is what a loop counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from nearfar.batching import (
    Layout,
    Plan,
    RandomBatchSampler,
    SpatialBatchSampler,
    positions_in_batch,
    weight_in_batch,
)
from nearfar.errors import NearfarError


def slides(*sides, k=6):
    """Grids of spots, their slides, and the k nearest of every spot on its own slide."""
    xy, slide, near = [], [], []
    for at, side in enumerate(sides):
        grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
        near.append(cKDTree(grid).query(grid, k + 1)[1][:, 1:] + sum(map(len, xy)))
        xy.append(grid)
        slide.append(np.full(side * side, at))
    return np.concatenate(xy), np.concatenate(slide), np.concatenate(near)


def test_a_tile_is_a_neighbourhood_and_a_batch_has_several_slides():
    xy, slide, near = slides(20, 24, 16)
    sampler = SpatialBatchSampler(xy, slide, 64, 16, seed=3)
    plan = sampler.plan(0)
    assert (weight_in_batch(plan, near) > 0).mean() > 0.99
    assert (weight_in_batch(RandomBatchSampler(len(xy), 64).plan(0), near) > 0).mean() < 0.5
    assert np.mean([len(set(slide[batch])) for batch in plan.batches()]) > 2.5
    whole = SpatialBatchSampler(xy, slide, 64, 64)  # one tile: the most compact there is
    assert weight_in_batch(whole.plan(0), near).mean() > weight_in_batch(plan, near).mean()
    tiles = [batch[i : i + 16] for batch in plan.batches() for i in range(0, len(batch), 16)]
    single = [tile for tile in tiles if len(set(slide[tile])) == 1]
    assert len(single) > 0.9 * len(tiles)
    extent = [np.ptp(xy[tile], axis=0).max() for tile in single]
    assert np.median(extent) <= 5  # 16 spots of a grid in a square turned by 45 degrees reach 5
    assert max(extent) < 16


def test_every_slide_is_spread_over_the_epoch():
    xy, slide, _ = slides(30, 15, 15)
    batches = SpatialBatchSampler(xy, slide, 45, 15, seed=1).plan(0).batches()
    for part in np.array_split(np.arange(len(batches)), 4):
        share = np.bincount(slide[np.concatenate([batches[i] for i in part])], minlength=3) / 45 / len(part)
        assert abs(share - [2 / 3, 1 / 6, 1 / 6]).max() < 0.12


def test_tiles_differ_from_epoch_to_epoch():
    xy, slide, near = slides(20)
    sampler = SpatialBatchSampler(xy, slide, 20, 20)

    def pairs(epoch):
        label = sampler.plan(epoch).labels()
        return label[near] == label[:, None]

    assert (pairs(0) != pairs(1)).mean() > 0.1  # other pairs of neighbours are cut apart


def test_slides_smaller_than_a_tile_and_equal_places():
    rng = np.random.default_rng(0)
    slide = rng.integers(40, size=200)  # five items each, tiles of sixteen
    sampler = SpatialBatchSampler(rng.random((200, 2)), slide, 32, 16)
    for batch in sampler.plan(0).batches():
        assert len(set(slide[batch])) < 20  # pieces of slides, not single items: random batches have about 22
    same = SpatialBatchSampler(np.zeros((50, 2)), None, 8)
    assert sorted(same.plan(2).order.tolist()) == list(range(50))


def test_positions_and_weights_in_a_batch_against_a_loop():
    rng = np.random.default_rng(1)
    near = rng.integers(-1, 60, (60, 4))
    near[near == np.arange(60)[:, None]] = -1
    alpha = rng.random((60, 4))
    for ranks in (1, 2):
        plan = RandomBatchSampler(60, 9, world_size=ranks).plan(0)
        found = weight_in_batch(plan, near, alpha)
        steps = [
            np.concatenate([plan.batch(step, r) for r in range(ranks)]).tolist()
            for step in range(plan.layout.steps)
        ]
        for item, weight in zip(plan.order.tolist(), found, strict=True):
            step = next(step for step in steps if item in step)
            assert weight == pytest.approx(
                sum(a for a, j in zip(alpha[item], near[item], strict=True) if j in step)
            )
    batch = plan.batch(0).tolist()
    index = positions_in_batch(torch.as_tensor(near[batch]), torch.as_tensor(batch))
    for row, item in enumerate(batch):
        assert index[row].tolist() == [batch.index(j) if j in batch else -1 for j in near[item]]


def test_bad_input_is_named():
    with pytest.raises(NearfarError, match=r"positions have shape \(5, 3\)"):
        SpatialBatchSampler(np.zeros((5, 3)), None, 2)
    with pytest.raises(NearfarError, match="1 positions are not finite, first that of item 3"):
        SpatialBatchSampler([[0, 0]] * 3 + [[0, np.nan]], None, 2)
    with pytest.raises(NearfarError, match=r"4 positions, but slides of shape \(3,\)"):
        SpatialBatchSampler([[0, 0]] * 4, ["a"] * 3, 2)
    with pytest.raises(NearfarError, match="tile_size=9 is larger than a batch of 4"):
        SpatialBatchSampler([[0, 0]] * 9, None, 4, 9)
    state = SpatialBatchSampler(np.arange(18).reshape(9, 2), None, 4).state_dict()
    with pytest.raises(NearfarError, match="places: saved"):
        SpatialBatchSampler(np.arange(18).reshape(9, 2) ** 2, None, 4).load_state_dict(state)
    with pytest.raises(NearfarError, match="tile_size: saved 4, here 2"):
        SpatialBatchSampler(np.arange(18).reshape(9, 2), None, 4, 2).load_state_dict(state)
    with pytest.raises(NearfarError, match=r"neighbors of shape \(2, 1\) for 4 items"):
        weight_in_batch(Plan(Layout(4, 2), np.arange(4, dtype=np.int32)), np.zeros((2, 1), int))
