"""Batches for pairs of which only some have a photo: a batch holds one sort, so that each has company."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from nearfar.batching import BalancedBatchSampler, BatchSampler, RandomBatchSampler
from nearfar.batching.base import Plan, digest
from nearfar.errors import NearfarError, nearest_name

__all__ = ["SAMPLERS", "BatchesBySort", "build_sampler"]

SAMPLERS = ("random", "balanced")


class BatchesBySort(BatchSampler):
    """Random batches in which all rows are marked or none is; at most one batch of an epoch holds both.

    >>> marked = np.arange(40) < 12
    >>> sorts = [set(marked[batch].tolist()) for batch in BatchesBySort(marked, 4)]
    >>> sum(len(sort) > 1 for sort in sorts), len(sorts)
    (0, 10)
    """

    def __init__(self, marked: Bool[ndarray, " n"], batch_size: int, *, seed: int = 0) -> None:
        super().__init__(len(marked), batch_size, seed=seed)
        self.marked = np.asarray(marked, dtype=bool)

    def _identity(self) -> dict[str, Any]:
        return {"marked": digest(self.marked)}

    def _compose(self, epoch: int, options: Mapping[str, Any]) -> Plan:
        rng = np.random.default_rng([self.seed, epoch])
        first, second = (rng.permutation(np.flatnonzero(self.marked == sort)) for sort in (True, False))
        order = np.concatenate([first, second])[: self.layout.total].astype(np.int32)
        # Whole batches change places; what is shorter than the others stays last.
        sizes = self.layout.sizes
        full = int((sizes == self.batch_size).sum())
        head = order[: full * self.batch_size].reshape(full, self.batch_size)
        return Plan(
            self.layout, np.concatenate([rng.permutation(head).reshape(-1), order[full * self.batch_size :]])
        )


def build_sampler(config: Any, label: ndarray, seen: Bool[ndarray, " n"]) -> BatchSampler:
    """The sampler that ``sampler=`` names: random batches, or equal shares of every relation (small ones repeat)."""
    name, size, seed = config.sampler.name, int(config.batch_size), int(config.seed)
    if size > len(label):
        raise NearfarError(
            f"batch_size={size} is larger than the training set of {len(label)} pairs; lower it."
        )
    if name == "random":
        if seen.all() or not seen.any():
            return RandomBatchSampler(len(label), size, seed=seed)
        return BatchesBySort(seen, size, seed=seed)
    if name == "balanced":
        return BalancedBatchSampler(label, size, repeat=True, seed=seed)
    raise NearfarError(f"sampler={name}: {nearest_name(str(name), SAMPLERS)}")
