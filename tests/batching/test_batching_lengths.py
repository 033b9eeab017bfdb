"""Batches by length: every item as often as it should, epochs a function of the seed, little padding, resume."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from nearfar.batching import LengthBatchSampler
from nearfar.errors import NearfarError

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 100, size=403)


def padding(batches: list[list[int]]) -> float:
    return float(np.mean([LENGTHS[b].max() * len(b) / LENGTHS[b].sum() for b in batches]))


def test_every_item_once_and_little_padding() -> None:
    sampler = LengthBatchSampler(LENGTHS, 16, seed=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 26
    assert sorted(i for b in batches for i in b) == list(range(403))
    plain = list(LengthBatchSampler(LENGTHS, 16, seed=3, window=1))
    assert padding(batches) < 1.25 < 1.6 < padding(plain)
    assert list(LengthBatchSampler(LENGTHS, 16, seed=3)) == batches != list(sampler)
    # Short and long batches come in no order.
    means = [LENGTHS[b].mean() for b in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5


def test_copies_are_counted_and_meet_in_no_batch() -> None:
    repeats = np.ones(403, dtype=int)
    repeats[:20] = 3
    sampler = LengthBatchSampler(LENGTHS, 16, repeats=repeats, window=4)
    for _ in range(3):
        batches = list(sampler)
        seen = Counter(i for b in batches for i in b)
        assert all(seen[i] == repeats[i] for i in range(403))
        assert all(len(set(b)) == len(b) for b in batches)


def test_state_goes_on_in_mid_epoch() -> None:
    sampler = LengthBatchSampler(LENGTHS, 16, repeats=np.full(403, 2))
    sampler.set_epoch(2)
    batches = list(sampler)
    sampler.set_epoch(2)
    again = iter(sampler)
    first = [next(again) for _ in range(5)]
    other = LengthBatchSampler(LENGTHS, 16, repeats=np.full(403, 2))
    other.load_state_dict(sampler.state_dict())
    assert first + list(other) == batches
    with pytest.raises(NearfarError, match="repeats"):
        LengthBatchSampler(LENGTHS, 16).load_state_dict(
            LengthBatchSampler(LENGTHS, 16, repeats=np.where(LENGTHS > 50, 1, 1)).state_dict()
            | {"fingerprint": sampler._fingerprint() | {"n": 403}}
        )


def test_ranks_share_an_epoch() -> None:
    ranks = [list(LengthBatchSampler(LENGTHS, 8, rank=r, world_size=2)) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    items = [i for rank in ranks for b in rank for i in b]
    assert len(items) == len(set(items)) == 402  # one is left out: 403 is odd
    for a, b in zip(*ranks, strict=True):
        assert len(a) == len(b)


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        (np.zeros(403, int), "at least 1"),
        (np.ones(403), "whole numbers"),
        (np.ones(3, int), "one number for each"),
    ],
)
def test_bad_repeats(repeats: np.ndarray, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        LengthBatchSampler(LENGTHS, 16, repeats=repeats)


def test_lengths_may_be_any_finite_numbers() -> None:
    lengths = np.array([3, 90, 4, 80, 5, 70])
    plan = list(LengthBatchSampler(lengths, 3))
    assert list(LengthBatchSampler(lengths.astype(np.float32), 3)) == plan
    assert list(LengthBatchSampler(lengths + 0.5, 3)) == plan
    whole, widened = LengthBatchSampler(lengths, 3), LengthBatchSampler(lengths.astype(np.float32), 3)
    widened.load_state_dict(whole.state_dict())
