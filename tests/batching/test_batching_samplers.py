"""What every sampler promises: each item once, exact length, equal ranks, a state that resumes."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

from nearfar.batching import (
    BalancedBatchSampler,
    HardNegativeSampler,
    Layout,
    Neighbors,
    PartitionBatchSampler,
    RandomBatchSampler,
    SpatialBatchSampler,
    nearest_neighbors,
)
from nearfar.errors import NearfarError

KINDS = ["random", "balanced", "level", "greedy", "filtered", "partition", "blocks", "spatial", "tiles"]


def points(n, d=6, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def make(kind, n, batch_size, **options):
    if kind == "random":
        return RandomBatchSampler(n, batch_size, **options)
    if kind == "balanced":
        labels = np.random.default_rng(1).choice(5, n, p=[0.5, 0.3, 0.15, 0.04, 0.01])
        return BalancedBatchSampler(labels, batch_size, **options)
    if kind in ("spatial", "tiles"):
        slides = np.random.default_rng(1).choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
        size = batch_size if kind == "tiles" else None
        return SpatialBatchSampler(points(n, 2), slides, batch_size, size, **options)
    near = nearest_neighbors(points(n), min(8, n - 1))
    k = near.k
    group = max(1, batch_size // 3)
    return {
        "level": lambda: HardNegativeSampler(near, batch_size, 0.6, k, group_size=group, **options),
        "greedy": lambda: HardNegativeSampler(near, batch_size, 0.6, k, order="greedy", **options),
        "filtered": lambda: HardNegativeSampler(
            near, batch_size, 0.6, k, false_negative_threshold=0.9, **options
        ),
        "partition": lambda: PartitionBatchSampler(near, batch_size, **options),
        "blocks": lambda: PartitionBatchSampler(
            near, batch_size, group, false_negative_threshold=0.9, **options
        ),
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "batch_size"),
    [
        (2, 2),
        (2, 5),
        (3, 2),
        (5, 4),
        (10, 10),
        (11, 10),
        (97, 1),
        (97, 2),
        (97, 8),
        (97, 96),
        (101, 10),
        (128, 32),
    ],
)
def test_every_item_comes_once_and_the_length_is_exact(kind, n, batch_size):
    sampler = make(kind, n, batch_size)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        flat = [i for batch in batches for i in batch]
        assert len(batches) == len(sampler)
        assert len(flat) == len(set(flat)) == n - sampler.remainder
        assert set(flat) <= set(range(n))
        assert all(type(i) is int for i in flat)
        assert max(map(len, batches)) <= batch_size
        assert min(map(len, batches)) >= min(2, batch_size)
    assert sampler.remainder == (n % 2 if batch_size == 2 else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [(61, 7), (64, 8), (43, 14)])
def test_ranks_are_disjoint_and_equally_long(kind, world_size, drop_last, n, batch_size):
    options = {"world_size": world_size, "drop_last": drop_last, "seed": 3}
    ranks = [make(kind, n, batch_size, rank=r, **options) for r in range(world_size)]
    drawn = [list(sampler) for sampler in ranks]
    assert len({len(sampler) for sampler in ranks}) == 1
    for step in zip(*drawn, strict=True):
        assert len({len(batch) for batch in step}) == 1
    flat = [i for batches in drawn for batch in batches for i in batch]
    assert len(flat) == len(set(flat)) == n - ranks[0].remainder
    if drop_last:
        assert {len(batch) for batches in drawn for batch in batches} == {batch_size}
    else:
        assert ranks[0].remainder < world_size


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_a_function_of_seed_and_epoch(kind):
    one, two, other = make(kind, 90, 9), make(kind, 90, 9), make(kind, 90, 9, seed=1)
    first = list(one)
    np.random.default_rng(5).random(3)
    np.random.seed(0)  # noqa: NPY002 - the global generator must not matter
    assert first == list(two) != list(other)
    second = list(one)  # a finished pass moves on to the next epoch
    assert one.epoch == 1
    assert second != first
    two.set_epoch(1)
    assert list(two) == second
    two.set_epoch(0)
    assert list(two) == first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 4, 9, 10])
def test_a_state_yields_the_batches_that_were_left(kind, stop):
    sampler = make(kind, 91, 9, seed=2)
    len(list(sampler))
    whole = [batch.tolist() for batch in sampler.plan(1).batches(0)]
    running = iter(sampler)
    for _ in range(stop):
        next(running)
    state = json.loads(json.dumps(sampler.state_dict()))
    fresh = make(kind, 91, 9, seed=2)
    fresh.load_state_dict(state)
    again = copy.deepcopy(fresh.state_dict())
    assert again == state
    assert fresh.remaining == len(whole) - stop
    assert list(fresh) == whole[stop:] == list(running)
    assert list(fresh) == list(sampler)  # and both go on with the same next epoch
    assert fresh.epoch == 2


@pytest.mark.slow
def test_position_counts_what_was_used_not_what_was_drawn_ahead():
    sampler = RandomBatchSampler(64, 4, seed=1)
    data = list(range(64))
    loader = DataLoader(data, batch_sampler=sampler, num_workers=2, prefetch_factor=2)
    running = iter(loader)
    used = [next(running).tolist() for _ in range(3)]
    assert sampler.state_dict()["position"] > 3  # drawn ahead by the workers
    fresh = RandomBatchSampler(64, 4, seed=1)
    fresh.load_state_dict(sampler.state_dict(position=3))
    fresh.set_epoch(0)  # what a training loop does when it starts the epoch: the position stays
    assert used + list(fresh) == [batch.tolist() for batch in sampler.plan(0).batches()]
    fresh.load_state_dict(sampler.state_dict(position=3))
    fresh.set_epoch(1)  # another epoch: from its beginning
    assert len(list(fresh)) == len(fresh)
    with pytest.raises(NearfarError, match="beyond the 16 batches"):
        sampler.state_dict(position=17)


def test_options_changed_in_mid_epoch_act_from_the_next_epoch():
    near = nearest_neighbors(points(120), 20)
    sampler = HardNegativeSampler(near, 12, 0.3, 20)
    planned = [b.tolist() for b in sampler.plan(0).batches()]
    running = iter(sampler)
    drawn = [next(running) for _ in range(3)]
    sampler.hard_ratio, sampler.hardness_k = 0.9, 10
    state = sampler.state_dict()
    fresh = HardNegativeSampler(near, 12, 0.3, 20)
    fresh.load_state_dict(state)
    assert (fresh.hard_ratio, fresh.hardness_k) == (0.9, 10)
    assert drawn + list(fresh) == planned == drawn + list(running)
    assert fresh.plan(1).nominal == 0.9
    assert list(fresh) == list(sampler) == [b.tolist() for b in fresh.plan(1).batches()]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 8}, "batch_size: saved 9, here 8"),
        ({"seed": 5}, "seed: saved 0, here 5"),
        ({"drop_last": True}, "drop_last"),
        ({"n": 92}, "n: saved 91, here 92"),
    ],
)
def test_a_state_of_another_sampler_is_refused(change, named):
    settings = {"n": 91, "batch_size": 9} | {}
    state = RandomBatchSampler(**settings).state_dict()
    with pytest.raises(NearfarError, match=named):
        RandomBatchSampler(**(settings | change)).load_state_dict(state)
    with pytest.raises(NearfarError, match="belongs to a RandomBatchSampler"):
        make("level", 91, 9).load_state_dict(state)
    with pytest.raises(NearfarError, match="not the state"):
        RandomBatchSampler(**settings).load_state_dict({})


def test_a_state_over_other_neighbours_is_refused():
    mine, other = (nearest_neighbors(points(60, seed=s), 5) for s in (0, 1))
    state = PartitionBatchSampler(mine, 6).state_dict()
    with pytest.raises(NearfarError, match="neighbors: saved"):
        PartitionBatchSampler(other, 6).load_state_dict(state)


def test_layout_states_its_remainder():
    assert Layout(103, 10, world_size=4).remainder == 3
    assert Layout(103, 10, world_size=4).sizes.tolist() == [10, 10, 5]
    assert Layout(5, 2).sizes.tolist() == [2, 2]
    assert Layout(9, 3).remainder == 0
    assert Layout(10, 3).sizes.tolist() == [3, 3, 2, 2]
    for bad in ({"n": 1, "batch_size": 4}, {"n": 9, "batch_size": 0}, {"n": 9, "batch_size": 2.5}):
        with pytest.raises(NearfarError):
            Layout(**bad)
    with pytest.raises(NearfarError, match="leaves no batch"):
        Layout(9, 10, drop_last=True)
    with pytest.raises(NearfarError, match="rank 2 does not exist"):
        RandomBatchSampler(9, 3, rank=2, world_size=2)


def test_ids_must_be_those_of_the_dataset_in_its_order():
    ids = [f"m{i}" for i in range(50)]
    near = nearest_neighbors(points(50), 5, ids=ids)
    sampler = PartitionBatchSampler(near, 5)
    sampler.check_ids(ids)
    with pytest.raises(NearfarError, match=r"at 2 of 50 positions, first at 3.*aligned_to"):
        sampler.check_ids([*ids[:3], ids[4], ids[3], *ids[5:]])
    with pytest.raises(NearfarError, match="50 items, the dataset 49"):
        sampler.check_ids(ids[:-1])
    with pytest.raises(NearfarError, match="neighbour list and sampler differ"):
        HardNegativeSampler(near, 5, hardness_k=5, ids=ids[::-1])
    with pytest.raises(NearfarError, match="has no ids"):
        RandomBatchSampler(50, 5).check_ids(ids)
    turned = near.aligned_to(ids[::-1])
    assert np.array_equal(turned.indices, nearest_neighbors(points(50)[::-1], 5).indices)
    HardNegativeSampler(turned, 5, hardness_k=5, ids=ids[::-1]).check_ids(ids[::-1])
    with pytest.raises(NearfarError, match="unknown"):
        near.aligned_to([*ids[:-1], "x"])


def test_neighbours_may_be_a_plain_array_with_gaps():
    ring = np.array([[(i + 1) % 12, -1] for i in range(12)])
    for sampler in (HardNegativeSampler(ring, 4, 1.0, 2), PartitionBatchSampler(Neighbors(ring), 4)):
        assert sorted(i for batch in sampler for i in batch) == list(range(12))


def test_without_hardness_k_a_shorter_list_is_used_whole():
    near = nearest_neighbors(np.random.default_rng(0).standard_normal((120, 8)), 30)
    assert HardNegativeSampler(near, 12).hardness_k == 30
    with pytest.raises(NearfarError, match="only 30"):
        HardNegativeSampler(near, 12, hardness_k=100)


def test_a_state_whose_planned_options_are_damaged_is_refused_when_it_is_loaded() -> None:
    sampler = HardNegativeSampler(np.arange(1, 13)[:, None] % 12, 4)
    next(iter(sampler))
    state = sampler.state_dict()
    for damaged in (dict.fromkeys(state["planned"]), state["planned"] | {"hard_ratio": "x"}):
        with pytest.raises(NearfarError, match="hard_ratio is"):
            sampler.load_state_dict({**state, "planned": damaged})
