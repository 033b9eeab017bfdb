"""Any neighbour list whatever: repeats, gaps, hubs, empty rows, more neighbours than items."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.batching import (
    HardNegativeSampler,
    Layout,
    LengthBatchSampler,
    Neighbors,
    PartitionBatchSampler,
    Plan,
    RandomBatchSampler,
    SpatialBatchSampler,
    measure_hardness,
    nearest_neighbors,
)
from nearfar.batching import _kernels as kernels
from nearfar.errors import NearfarError


@st.composite
def lists(draw):
    """Neighbour indices (n, k) and perhaps similarities; nobody is its own neighbour, and that is all they keep to."""
    n, k = draw(st.integers(2, 40)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from(["any", "same", "hub", "padded", "empty rows", "few"]))
    near = rng.integers(-1, n, (n, k))
    if shape == "same":
        near = np.repeat(near[:, :1], k, axis=1)
    elif shape == "hub":
        near[rng.random((n, k)) < 0.8] = 0
    elif shape == "padded":
        near = np.take_along_axis(near, np.minimum(np.arange(k), rng.integers(0, k, (n, 1))), 1)
    elif shape == "empty rows":
        near[rng.random(n) < 0.7] = -1
    elif shape == "few":
        near[rng.random((n, k)) < 0.9] = -1
    near[near == np.arange(n)[:, None]] = -1
    values = None
    if draw(st.booleans()):
        values = -np.sort(-np.round(rng.uniform(-1, 1, (n, k)), draw(st.integers(0, 3))), axis=1)
    return near.astype(draw(st.sampled_from([np.int8, np.int32, np.int64]))), values


def quietly(near, values=None) -> Neighbors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Neighbors(near, values)


@pytest.mark.slow
@given(lists())
@settings(deadline=None, max_examples=150)
def test_a_row_is_a_set_in_the_order_it_was_given(given_list):
    near, values = given_list
    before = near.copy()
    result = quietly(near, values)
    assert np.array_equal(near, before)  # the caller's own array stays
    for row in range(len(near)):
        first = {}
        for place, item in enumerate(near[row].tolist()):
            if item >= 0:
                first.setdefault(item, place)
        wanted = list(first) + [-1] * (near.shape[1] - len(first))
        assert result.indices[row].tolist() == wanted
        if values is not None:
            kept = values[row, list(first.values())].astype(np.float32).tolist()
            assert result.similarities[row].tolist() == kept + [-np.inf] * (near.shape[1] - len(first))


@pytest.mark.slow
@given(
    lists(),
    st.integers(1, 45),
    st.integers(1, 45),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
    st.sampled_from(["level", "greedy", "partition"]),
    st.floats(-1, 1.5),
)
@settings(deadline=None, max_examples=300)
def test_every_item_once_an_epoch(given_list, batch, group, ratio, ranks, drop, kind, threshold):
    near, values = given_list
    n = len(near)
    if n < ranks * max(2, batch if drop else 1):
        return
    options = {
        "group_size": min(group, batch),
        "false_negative_threshold": None if values is None else threshold,
        "drop_last": drop,
        "world_size": ranks,
    }
    listed = quietly(near, values)
    epochs = []
    for rank in range(ranks):
        if kind == "partition":
            sampler = PartitionBatchSampler(listed, batch, rank=rank, **options)
        else:
            sampler = HardNegativeSampler(listed, batch, ratio, order=kind, rank=rank, **options)
        epochs.append([list(sampler) for _ in range(2)])
    for epoch in range(2):
        flat = [item for rank in range(ranks) for members in epochs[rank][epoch] for item in members]
        assert len(flat) == len(set(flat)) == n - sampler.remainder
        assert len({tuple(map(len, epochs[rank][epoch])) for rank in range(ranks)}) == 1
    assert sampler.realised_hardness().items == n - sampler.remainder


@pytest.mark.slow
@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_tiles_and_lengths_use_every_item_once(n, batch, seed):
    rng = np.random.default_rng(seed)
    places = rng.choice([0.0, 1.0, 1e12, -3.5], (n, 2)) * rng.random((n, 2)).round(1)  # with many ties
    for sampler in (
        SpatialBatchSampler(places, rng.integers(0, 4, n), batch, int(rng.integers(1, batch + 1))),
        LengthBatchSampler(rng.integers(0, 5, n), batch, window=int(rng.integers(1, 5))),
    ):
        flat = [item for members in sampler for item in members]
        assert len(flat) == len(set(flat)) == n - sampler.remainder


def test_repeats_are_counted_and_none_moves_to_the_end():
    near = [[1, 1, 2], [-1, 0, -1], [1, 0, -1]]
    values = [[0.9, 0.9, 0.5], [0.1, 0.8, 0.0], [0.7, 0.6, 0.99]]
    with pytest.warns(
        UserWarning, match="1 neighbours in 1 of 3 rows come a second time in their row, first in row 0"
    ):
        listed = Neighbors(near, values)
    assert listed.indices.tolist() == [[1, 2, -1], [0, -1, -1], [1, 0, -1]]
    assert listed.too_close(0.6).tolist() == [1, 1, 2]
    assert listed.too_close(-1.0).tolist() == [2, 1, 2]  # none is no neighbour, however low the threshold
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is clean is taken as it is, without a copy
        clean = np.array([[1, 2], [0, -1], [0, 1]], np.int32)
        assert Neighbors(clean).indices is clean or np.shares_memory(Neighbors(clean).indices, clean)


@pytest.mark.parametrize(
    ("near", "named"),
    [
        (np.array([[2**32 + 1], [0]]), "belong to a different set"),  # 1 if it were cut to 32 bits
        (np.array([[1], [-2]]), "hold -2 to 1"),
        (np.array([[1], [2**64 - 1]], np.uint64), "belong to a different set"),
        (np.array([[1.0], [0.0]]), "neighbour indices is an array .* of float64"),
        (np.array([[True], [False]]), "of bool"),
        ([[1], [0, 1]], "cannot be read as an array"),
        (np.zeros((2, 0), int), r"shape \(2, 0\)"),
    ],
)
def test_positions_are_checked_before_they_are_cut_to_32_bits(near, named):
    with pytest.raises(NearfarError, match=named):
        Neighbors(near)


def test_similarities_that_are_nan_are_refused_where_there_is_a_neighbour():
    near = np.array([[1, -1], [0, -1]])
    assert Neighbors(near, np.array([[0.5, np.nan], [0.5, np.nan]])).too_close(0.4).tolist() == [1, 1]
    with pytest.raises(NearfarError, match="1 NaN, first in row 1"):
        Neighbors(near, np.array([[0.5, 0.0], [np.nan, 0.0]]))


@pytest.mark.slow
def test_a_list_that_was_changed_after_its_check_ends_in_no_crash():
    rng = np.random.default_rng(0)
    for _ in range(30):
        listed = nearest_neighbors(rng.standard_normal((50, 4)), 8)
        listed.indices[rng.integers(0, 50, 40), rng.integers(0, 8, 40)] = rng.choice(
            [10**9, -(2**31), 2**31 - 1, 50, -5, 3], 40
        )
        for sampler in (
            PartitionBatchSampler(listed, 7, 3, false_negative_threshold=0.5),
            HardNegativeSampler(listed, 7, 0.8, false_negative_threshold=0.5),
            HardNegativeSampler(listed, 7, 0.8, order="greedy"),
        ):
            assert sorted(item for members in sampler for item in members) == list(range(50))
            sampler.realised_hardness()


def test_compiled_loops_stop_where_places_and_items_do_not_agree():
    near, close = np.array([[1], [0]], np.int32), np.zeros(2, np.int32)
    with pytest.raises(RuntimeError, match="more items than places"):
        kernels.grouped(np.zeros(5, np.int32), np.array([0, 2, 4]))
    with pytest.raises(RuntimeError, match="fewer items than places"):
        kernels.grouped(np.zeros(1, np.int32), np.array([0, 2]))
    with pytest.raises(RuntimeError, match="more places than items"):
        kernels.compose_groups(
            near, 1, close, np.array([0, 5]), np.zeros(1, np.int32), np.array([5]), np.zeros(1, np.int32), True,
            kernels.random_state(0, 0),
        )  # fmt: skip


@pytest.mark.slow
def test_thousands_of_vetoes_do_not_wrap_around():
    n, k = 3001, 3000
    near = np.array([np.delete(np.arange(n), i) for i in range(n)], np.int32)
    sampler = PartitionBatchSampler(
        Neighbors(near, np.ones((n, k), np.float32)), 100, false_negative_threshold=0.5
    )
    assert sorted(item for members in sampler for item in members) == list(range(n))


def test_a_plan_knows_its_positions():
    layout = Layout(6, 3)
    assert Plan(layout, [0, 1, 2, 3, 4, 5]).batch(1).tolist() == [3, 4, 5]
    near = np.array([[(i + 1) % 6] for i in range(6)])
    for order in ([0, 1, 2], [0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, -1], [0.0] * 6, None):
        with pytest.raises(NearfarError, match="order"):
            measure_hardness(Plan(layout, order), near)
    with pytest.raises(NearfarError, match="batch 2 of rank 0 does not exist"):
        Plan(layout, torch.arange(6)).batch(2)
    assert RandomBatchSampler(6, 3).plan().order.dtype == np.int32
