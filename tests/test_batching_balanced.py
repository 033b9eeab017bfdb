"""Balanced batches: classes evenly represented, no item twice in a batch."""

from __future__ import annotations

import numpy as np
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
        BalancedBatchSampler([0.0, float("nan")], 2)
