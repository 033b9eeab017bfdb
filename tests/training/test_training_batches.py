"""The A/A check that every run with hard batches makes before it trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nearfar.batching import nearest_neighbors
from nearfar.config.samplers import HardBatchOptions, HardSampler, Items
from nearfar.errors import NearfarError
from nearfar.training.batches import build_sampler, check_batches

RNG = np.random.default_rng(0)
POINTS = RNG.standard_normal((20, 16))[RNG.integers(20, size=600)] + 0.3 * RNG.standard_normal((600, 16))


def config(**changes: Any) -> Any:
    given = {"batch_size": 20, "epochs": 4, "hardness_k": 20, "sampler": HardSampler()}
    return HardBatchOptions(**given | changes)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, "0 -> 0.5", "linear 0 -> 0.8"])
def test_misaligned_neighbours_are_refused_before_training(ratio: Any) -> None:
    options = config(hard_ratio=ratio)
    aligned = build_sampler(options, Items(600, nearest_neighbors(POINTS, 20)))
    before = aligned.hard_ratio
    said: list[str] = []
    check_batches(options, aligned, POINTS, said.append)
    assert said[0].startswith("A/A check: mean cosine")
    assert aligned.hard_ratio == before
    shuffled = nearest_neighbors(POINTS[np.random.default_rng(1).permutation(600)], 20)
    with pytest.raises(NearfarError):
        check_batches(options, build_sampler(options, Items(600, shuffled)), POINTS, said.append)


def test_random_batches_are_not_called_hard() -> None:
    options = config(hard_ratio=0)
    said: list[str] = []
    check_batches(
        options, build_sampler(options, Items(600, nearest_neighbors(POINTS, 20))), POINTS, said.append
    )
    assert said == ["A/A check: none, every batch is random (hard_ratio=0)"]
