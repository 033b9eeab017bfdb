"""Batches of a pivot, some of its neighbours, and random items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.batching.arguments import number, whole
from nearfar.batching.layout import Plan
from nearfar.batching.leveling import building_sequence
from nearfar.batching.neighbor_sampler import NeighborSampler, checked_group_size
from nearfar.batching.neighbors import Neighbors
from nearfar.batching.random import random_plan
from nearfar.errors import NearfarError, nearest_name

__all__ = ["HardNegativeSampler"]

_ORDERS = ("level", "greedy")
# A batch of 1,024 around one pivot would have at most 100 hard items: large batches need several groups.
_LEVEL_GROUP = 64


#: neighbours drawn from unless ``hardness_k`` says otherwise: 10–30 is very close, 50–100 balanced, 150–200 varied
DEFAULT_K = 100


class HardNegativeSampler(NeighborSampler):
    """Batches in which a share of the items are near each other, and therefore hard negatives.

    A batch is made of one or more groups: a pivot, unused neighbours drawn uniformly from its first
    ``hardness_k`` (100, or as many as are stored), and random unused items. ``hard_ratio`` (0 to 1) is the share
    of a group that is hard, the pivot counted in; above 0 it is at least a pair. Every item comes once per epoch
    (see `Layout` for the remainder).

    - ``order="level"`` builds the hard parts of all groups before any random item is placed, lets a group
      whose pivot has run out of unused neighbours go on with the neighbours of those it drew, and deals
      groups from each stage of the building to every part of the epoch: hardness is the same from the first
      batch to the last.
    - ``order="greedy"`` fills batch after batch, each group around one pivot. Neighbours run out: the last
      quarter of an epoch is less hard than the first, the more so the smaller ``hardness_k``. It is kept for
      comparison.

    ``group_size`` is the largest size of a group, by default the batch for "greedy" and at most 64 for
    "level". The first ``curriculum_epoch`` epochs are random batches, the same as those of
    `RandomBatchSampler` with this seed. With ``false_negative_threshold``, neighbours at least so similar are
    never drawn for their pivot and are kept out of each other's batches wherever another item is left to
    take.

    ``hard_ratio``, ``hardness_k``, ``curriculum_epoch`` and ``false_negative_threshold`` may be set between
    epochs.

    >>> from nearfar.batching import nearest_neighbors
    >>> points = np.random.default_rng(0).standard_normal((200, 8))
    >>> sampler = HardNegativeSampler(nearest_neighbors(points, 20), 10, hard_ratio=0.5, hardness_k=20)
    >>> len(sampler), sampler.remainder, len(next(iter(sampler)))
    (20, 0, 10)
    >>> sampler.realised_hardness().hard_share
    0.5
    """

    _changeable: ClassVar[tuple[str, ...]] = (
        "hard_ratio",
        "hardness_k",
        "curriculum_epoch",
        "false_negative_threshold",
    )

    def __init__(
        self,
        neighbors: Neighbors | NDArray[np.integer] | Tensor,
        batch_size: int,
        hard_ratio: float = 0.5,
        hardness_k: int | None = None,
        curriculum_epoch: int = 0,
        group_size: int | None = None,
        order: str = "level",
        *,
        false_negative_threshold: float | None = None,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Sequence[Any] | NDArray[Any] | None = None,
    ) -> None:
        if not isinstance(order, str) or order not in _ORDERS:
            raise NearfarError(f"order {order!r} is unknown; {nearest_name(str(order), _ORDERS)}")
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
        self.order = order
        if group_size is None:
            group_size = self.batch_size if order == "greedy" else min(self.batch_size, _LEVEL_GROUP)
        self.group_size = checked_group_size(group_size, self.batch_size)
        self.hard_ratio = hard_ratio
        self.hardness_k = min(DEFAULT_K, self.neighbors.k) if hardness_k is None else hardness_k

    @property
    def hard_ratio(self) -> float:
        """Share of a batch that is hard, pivots counted in."""
        return self._hard_ratio

    @hard_ratio.setter
    def hard_ratio(self, value: float) -> None:
        self._hard_ratio = number("hard_ratio", value, 0.0, 1.0, "a share from 0 (random batches) to 1")

    @property
    def hardness_k(self) -> int:
        """How many nearest neighbours of a pivot are drawn from."""
        return self._hardness_k

    @hardness_k.setter
    def hardness_k(self, value: int) -> None:
        value = whole("hardness_k", value, 1)
        if value > self.neighbors.k:
            raise NearfarError(
                f"hardness_k={value}, but only {self.neighbors.k} neighbours per item are stored; lower it, "
                f"or search "
                f"more with nearest_neighbors(embeddings, {value})"
            )
        self._hardness_k = value

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "order": self.order, "group_size": self.group_size}

    def _compose(self, epoch: int, options: Mapping[str, Any]) -> Plan:
        if epoch < options["curriculum_epoch"] or options["hard_ratio"] == 0.0:
            return random_plan(self.layout, self.seed, epoch)
        from nearfar.batching import _kernels

        start, batch = self.layout.slots(self.group_size)
        quota = _quota(np.diff(start), options["hard_ratio"])
        if self.order == "level":
            sequence = building_sequence(batch, np.random.default_rng([self.seed, epoch]))
        else:
            sequence = np.arange(len(batch), dtype=np.int32)
        threshold = options["false_negative_threshold"]
        close = self._close if threshold == self._threshold else self.neighbors.too_close(threshold)
        order, hard = _kernels.compose_groups(
            self.neighbors.indices,
            options["hardness_k"],
            close,
            start,
            batch,
            quota,
            sequence,
            self.order == "level",
            _kernels.random_state(self.seed, epoch),
        )
        return Plan(self.layout, order, hard, options["hard_ratio"])


def _quota(sizes: NDArray[np.int64], hard_ratio: float) -> NDArray[np.int64]:
    """Hard items per group: at least a pair, since a pivot alone has no hard negative."""
    return np.minimum(sizes, np.maximum(2, np.rint(hard_ratio * sizes).astype(np.int64)))
