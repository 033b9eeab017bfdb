"""Balanced batches: classes evenly represented, no item twice in a batch."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from nearfar.batching import BalancedBatchSampler
from nearfar.errors import NearfarError


def labels(*counts):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def test_every_class_is_spread_over_the_epoch():
    y = labels(600, 300, 90, 10)
    for batch in BalancedBatchSampler(y, 50):
        counts = np.bincount(y[batch], minlength=4)
        assert abs(counts - [30, 15, 4.5, 0.5]).max() <= 3


def test_an_item_has_company_of_its_class():
    y = labels(*[4] * 100)
    alone = 0
    for batch in BalancedBatchSampler(y, 40, samples_per_class=4):
        alone += (np.bincount(y[batch]) == 1).sum()
    assert alone == 0
    assert len(list(BalancedBatchSampler(y, 30, samples_per_class=4))) == 14


@pytest.mark.parametrize("world_size", [1, 2])
def test_equal_shares_without_repeats_in_a_batch(world_size):
    y = labels(500, 100, 40, 3)
    ranks = [
        BalancedBatchSampler(y, 32, repeat=True, rank=r, world_size=world_size) for r in range(world_size)
    ]
    seen = np.zeros(len(y), int)
    for step in zip(*ranks, strict=True):
        joint = [i for batch in step for i in batch]
        assert len(set(joint)) == len(joint)
        for batch in step:
            counts = np.bincount(y[batch], minlength=4)
            if len(batch) == 32:
                small = 3 if world_size == 1 else counts[3]
                assert counts[3] == small
                assert np.ptp(counts[:3]) <= 1  # the others share what the small class cannot give
            np.add.at(seen, batch, 1)
    for c in range(3):  # all items of a class before any comes again
        assert np.ptp(seen[y == c]) <= 1 + (world_size > 1)
    assert ranks[0].remainder == (seen == 0).sum()


def test_more_classes_than_a_batch_holds_take_turns():
    y = labels(*[6] * 50)
    seen = np.zeros(50, int)
    for batch in BalancedBatchSampler(y, 20, samples_per_class=4, repeat=True):
        counts = np.bincount(y[batch], minlength=50)
        assert sorted(counts[counts > 0]) == [4] * 5
        seen += counts > 0
    assert np.ptp(seen) <= 1


def test_labels_of_any_kind():
    words = ["a", "b", "a", "b"] * 5
    assert list(BalancedBatchSampler(words, 5)) == list(BalancedBatchSampler(np.array([0, 1, 0, 1] * 5), 5))
    assert list(BalancedBatchSampler(torch.tensor([0, 1, 0, 1] * 5), 5)) == list(
        BalancedBatchSampler(words, 5)
    )
    with pytest.raises(NearfarError, match="one class per item"):
        BalancedBatchSampler(np.zeros((4, 2)), 2)
    with pytest.raises(NearfarError, match="not finite"):
        BalancedBatchSampler([0.0, float("inf")], 2)


MISSING = {
    "numbers": np.array([0, 1, -1, 0, 1, -1, 0, 1]),
    "floats": np.array([0, 1, np.nan, 0, 1, np.nan, 0, 1]),
    "texts": np.array(["a", "b", "nan", "a", "b", "", "a", "b"]),
    "a list": ["a", "b", None, "a", "b", float("nan"), "a", "b"],
    "nullable": pd.array([0, 1, None, 0, 1, None, 0, 1], "Int64"),
    "a column": pd.Series([0, 1, None, 0, 1, None, 0, 1]),
    "categories": pd.Series(["a", "b", None, "a", "b", None, "a", "b"], dtype="category", index=[0] * 8),
    "masked": np.ma.masked_array([0, 1, 9, 0, 1, 9, 0, 1], [0, 0, 1, 0, 0, 1, 0, 0]),
    "a tensor": torch.tensor([0, 1, -1, 0, 1, -1, 0, 1], dtype=torch.int8),
}


@pytest.mark.parametrize("form", MISSING)
@pytest.mark.parametrize("repeat", [False, True])
def test_items_without_a_label_are_never_drawn_and_said_once(form, repeat):
    with pytest.warns(UserWarning, match="2 of 8 items have no label"):
        sampler = BalancedBatchSampler(MISSING[form], 4, repeat=repeat)
    for _ in range(2):
        with warnings.catch_warnings(action="error"):
            drawn = [i for batch in sampler for i in batch]
        assert set(drawn) <= {0, 1, 3, 4, 6, 7}
        assert len(drawn) == 6
    assert (sampler.unlabelled, sampler.remainder, len(sampler)) == (2, 8 - len(set(drawn)), 2)
    assert (sampler.plan().labels()[[2, 5]] == -1).all()
    with pytest.raises(NearfarError, match="labels: all 3 are missing"):
        BalancedBatchSampler([None] * 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"repeat": True}, {"repeat": True, "samples_per_class": 4}, {}, {"repeat": True, "world_size": 4}],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_plan_of_many_classes_is_made_once(options, size, monkeypatch):
    """How long it takes is measured by benchmarks/samplers.py."""
    sampler = BalancedBatchSampler(np.arange(80_000) % (80_000 // size), 256, **options)
    plan = sampler.plan()
    monkeypatch.setattr(np.random, "default_rng", None)
    assert sampler.remainder == 80_000 - len(np.unique(plan.order))
    assert sampler.plan() is plan


def test_who_fills_up_is_the_next_in_turn():
    """Classes of one item cannot give a pair: others come in for them, and not always the same."""
    seen = np.zeros(400, int)
    for batch in BalancedBatchSampler(np.arange(400), 20, samples_per_class=2, repeat=True):
        np.add.at(seen, batch, 1)
    assert np.ptp(seen) <= 1


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_any_classes_give_full_batches_without_repeats(repeat, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(-1, rng.integers(1, 40), rng.integers(20, 300))
    size, world = int(rng.integers(2, 9)), int(rng.integers(1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = [
            BalancedBatchSampler(y, size, int(rng.integers(1, 4)), repeat=repeat, world_size=world, rank=0)
        ]
    plan = ranks[0].plan()
    for step in range(plan.layout.steps):
        joint = np.concatenate([plan.batch(step, r) for r in range(world)])
        assert len(set(joint.tolist())) == len(joint) == world * plan.layout.sizes[step]
        assert (y[joint] >= 0).all()
    if not repeat:
        assert np.bincount(plan.order).max() == 1
