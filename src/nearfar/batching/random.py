"""Batches of items in random order: what every other sampler is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from nearfar.batching.base import BatchSampler, Layout, Plan

__all__ = ["RandomBatchSampler"]


def random_plan(layout: Layout, seed: int, epoch: int) -> Plan:
    """The first ``layout.total`` items of a random permutation that (seed, epoch) determine."""
    from nearfar.batching import _kernels

    order = _kernels.shuffled(layout.n, _kernels.random_state(seed, epoch))
    return Plan(layout, order[: layout.total])


class RandomBatchSampler(BatchSampler):
    """Every item once per epoch, in random order.

    The random epochs of `HardNegativeSampler` (``curriculum_epoch``) are the same batches for the same seed,
    so that a comparison of the two differs in nothing but the composition.

    >>> sampler = RandomBatchSampler(10, 4, seed=1)
    >>> len(sampler), sorted(i for batch in sampler for i in batch)
    (3, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Sequence[Any] | NDArray[Any] | None = None,
    ) -> None:
        super().__init__(
            n, batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size, ids=ids
        )

    def _compose(self, epoch: int, options: Mapping[str, Any]) -> Plan:
        return random_plan(self.layout, self.seed, epoch)
