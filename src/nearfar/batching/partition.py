"""The whole set cut into equal batches of items that are each other's neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import whole_number
from nearfar.batching.hard_negative import NeighborSampler, building_sequence, checked_group_size, even_out
from nearfar.batching.mapped_neighbors import MappedNeighbors
from nearfar.batching.neighbors import Neighbors
from nearfar.batching.plan import Plan
from nearfar.batching.random import random_plan
from nearfar.ids import Ids

__all__ = ["PartitionBatchSampler"]

# Votes come from the nearest neighbours only; more of them cost time and change little (measured at 100,000
# items: with 32 voters 50.4 of 100 neighbours are in the batch, with 64 of them 51.4 at 1.5 times the cost).
_VOTERS = 32
_SLACK = 0.1  # how far a block may leave its size while labels move
_PARTNERS = 256  # random partners tried for an item that is too similar to a different item of its batch


class PartitionBatchSampler(NeighborSampler):
    """Every batch a neighbourhood: the neighbour graph is cut into blocks of equal size, anew in every epoch.

    Blocks grow from random pivots along unused neighbours; then size-constrained label propagation moves
    items to the block that holds most of their neighbours, and blocks are brought to their exact size with
    the least loss (the idea of composing batches from a graph: Sachidananda et al., GCBS, ICML 2023). Blocks
    are dealt to the epoch so that hard and easy ones are spread evenly: hardness is level from the first
    batch to the last. Different pivots make different blocks in each epoch.

    ``group_size`` is the size of a block, by default the whole batch; smaller blocks, several to a batch,
    give batches that are less hard and more varied. ``passes`` bounds the passes of propagation. With
    ``false_negative_threshold``, neighbours at least so similar are kept in different batches as far as sizes
    allow.

    >>> from nearfar.batching import nearest_neighbors
    >>> points = np.random.default_rng(0).standard_normal((400, 8))
    >>> sampler = PartitionBatchSampler(nearest_neighbors(points, 20), batch_size=20)
    >>> report = sampler.realised_hardness()
    >>> report.neighbors > 5 * report.random
    True
    """

    _changeable: ClassVar[tuple[str, ...]] = ("curriculum_epoch", "false_negative_threshold")

    def __init__(
        self,
        neighbors: Neighbors | NDArray[np.integer] | Tensor,
        batch_size: int,
        group_size: int | None = None,
        curriculum_epoch: int = 0,
        *,
        passes: int = 4,
        false_negative_threshold: float | None = None,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Ids | None = None,
    ) -> None:
        super().__init__(
            neighbors,
            batch_size,
            false_negative_threshold=false_negative_threshold,
            curriculum_epoch=curriculum_epoch,
            ids=ids,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        self.group_size = checked_group_size(
            self.batch_size if group_size is None else group_size, self.batch_size
        )
        self.passes = whole_number("passes", passes, 0)

    def _identity(self) -> dict[str, object]:
        return {**super()._identity(), "group_size": self.group_size, "passes": self.passes}

    def _compose(self, epoch: int, options: Mapping[str, Any]) -> Plan:
        if epoch < options["curriculum_epoch"]:
            return random_plan(self.layout, self.seed, epoch)
        from nearfar.batching import _kernels
        from nearfar.batching.stretches import parts_of

        near = self.neighbors
        rng = np.random.default_rng([self.seed, epoch])
        threshold = options["false_negative_threshold"]
        close = self._close if threshold == self._threshold else near.too_close(threshold)
        start, batch = self.layout.slots(self.group_size)
        state = _kernels.random_state(self.seed, epoch)
        if isinstance(near, MappedNeighbors):  # rows as they stand in the files, one stretch after another
            close = close[near.positions]
            members, hardness = np.empty(start[-1], np.int32), np.empty(len(batch))
            target = np.diff(start)
            for begin, end, slots in parts_of(near, start, rng):
                lists = near.local(begin, end, near.k)
                local_start = np.concatenate([[0], np.cumsum(target[slots])]).astype(np.int64)
                some, hardness[slots] = self._blocks(lists, close[begin:end], local_start, rng, state)
                to = np.repeat(start[slots] - local_start[:-1], target[slots]) + np.arange(len(some))
                members[to] = some + np.int32(begin)
            stored = near.stored
        else:
            members, hardness = self._blocks(near.indices, close, start, rng, state)
            stored = near.indices
        plan = Plan(self.layout, self._deal(members, hardness, start, batch, rng))
        if threshold is not None:
            of_place = np.repeat(batch, np.diff(start))
            _kernels.separate(
                plan.order,
                of_place,
                plan.labels(),
                stored,
                close,
                _PARTNERS,
                _kernels.random_state(epoch, self.seed),
            )
        return replace(plan, order=near.positions[plan.order]) if isinstance(near, MappedNeighbors) else plan

    def _blocks(
        self,
        nearest: NDArray[np.int32],
        close: NDArray[np.int32],
        start: NDArray[np.int64],
        rng: np.random.Generator,
        state: NDArray[np.uint64],
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Members of each block, block after block as ``start`` says, and how many of its voters an item has in it."""
        from nearfar.batching import _kernels

        target, k = np.diff(start), nearest.shape[1]
        blocks = np.arange(len(target), dtype=np.int32)
        order, _ = _kernels.compose_groups(
            nearest, k, close, start, blocks, target, rng.permutation(blocks), True, state
        )
        label = np.full(len(nearest), -1, np.int32)
        label[order] = np.repeat(blocks, target)
        size, voters = target.copy(), min(k, _VOTERS)
        slack = np.maximum(1, (target * _SLACK).astype(np.int64))
        _kernels.propagate(nearest, voters, close, label, size, target - slack, target + slack, self.passes)
        _kernels.balance(nearest, voters, close, label, size, target, 6)
        members = _kernels.grouped(label, start)
        some = members[:: max(1, len(members) // 30_000)]
        inside, _ = _kernels.count_inside(some, nearest, voters, np.zeros_like(label), label)
        seen = np.bincount(label[some], minlength=len(target))
        return members, np.bincount(label[some], inside, len(target)) / np.maximum(seen, 1)

    def _deal(
        self,
        members: NDArray[np.int32],
        hardness: NDArray[np.float64],
        start: NDArray[np.int64],
        batch: NDArray[np.int32],
        rng: np.random.Generator,
    ) -> NDArray[np.int32]:
        """Place the blocks in the epoch, hard and easy evenly spread, each in a place of its size."""
        size = np.diff(start)
        places = building_sequence(batch, rng)
        tenth = 10 * (batch // self.layout.world_size) // self.layout.steps
        order = np.empty(len(members), np.int32)
        for length in np.unique(size):
            blocks = np.flatnonzero(size == length)
            if self.group_size == self.batch_size:
                pairs = zip(blocks[even_out(hardness[blocks], tenth[blocks], rng)], blocks, strict=True)
            else:  # several blocks to a batch: one of each degree of hardness
                ranked = blocks[np.argsort(-hardness[blocks], kind="stable")]
                pairs = zip(ranked, places[size[places] == length], strict=True)
            for block, place in pairs:
                order[start[place] : start[place + 1]] = members[start[block] : start[block + 1]]
        return order
