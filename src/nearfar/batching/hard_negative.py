"""Hard-negative batches: a pivot, some of its neighbours, and random items, equally hard throughout the epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import number, whole_number
from nearfar.batching.base import BatchSampler, check_not_rebuilt, compare_ids, log
from nearfar.batching.hardness import HardnessReport, measure_hardness
from nearfar.batching.mapped_neighbors import MappedNeighbors
from nearfar.batching.neighbors import Neighbors, as_neighbors
from nearfar.batching.plan import Plan
from nearfar.batching.random import random_plan
from nearfar.errors import NearfarError, nearest_name
from nearfar.ids import Ids

__all__ = ["HardNegativeSampler", "NeighborSampler", "building_sequence", "checked_group_size", "even_out"]


def even_out(
    values: NDArray[np.floating] | NDArray[np.integer], window: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.int64]:
    """An order of the items in which every stretch has nearly the mean of all ``values``.

    ``window`` says, in rising order, to which window (say a tenth of the epoch) each place belongs. From the
    most extreme inwards, each item goes to the window that it brings nearest to the mean; within a window,
    large and small ones are paired.

    >>> values = np.arange(40.0)
    >>> order = even_out(values, np.arange(40) // 4, np.random.default_rng(0))
    >>> values[order].reshape(10, 4).sum(1).tolist(), sorted(order.tolist()) == list(range(40))
    ([78.0, 78.0, 78.0, 78.0, 78.0, 78.0, 78.0, 78.0, 78.0, 78.0], True)
    """
    offset = values - np.mean(values)
    left = np.bincount(window).tolist()
    content: list[list[int]] = [[] for _ in left]
    sums = (rng.permutation(len(left)) * 1e-9).tolist()  # ties between empty windows are broken at random
    for item in np.argsort(-np.abs(offset), kind="stable").tolist():
        step = float(offset[item])
        free = [w for w, room in enumerate(left) if room]
        w = min(free, key=sums.__getitem__) if step > 0 else max(free, key=sums.__getitem__)
        content[w].append(item)
        sums[w] += step
        left[w] -= 1
    parts = [np.array(items, np.int64) for items in content if items]
    return np.concatenate([items[_paired(values[items], rng)] for items in parts])


def _paired(
    values: NDArray[np.floating] | NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.int64]:
    """An order in which runs of 2, 4, 8 … neighbours are balanced.

    Extremes are paired, the pairs are paired again by their sums, and so on; which of two comes first is
    random.
    """
    count = len(values)
    if count < 2:
        return np.arange(count)
    # Padded to a power of two with places of mean value, which are taken out again at the end.
    full = 1 << (count - 1).bit_length()
    padded = np.full(full, np.mean(values), np.float64)
    padded[:count] = values
    runs = rng.permutation(full)[:, None]  # so that ties are broken at random
    sums = padded[runs[:, 0]]
    while len(runs) > 1:
        rank = np.argsort(sums, kind="stable")
        half = len(runs) // 2
        low, high = rank[:half], rank[: half - 1 : -1]
        swap = rng.random(half) < 0.5
        first, second = np.where(swap, high, low), np.where(swap, low, high)
        runs = np.concatenate([runs[first], runs[second]], axis=1)
        sums = sums[first] + sums[second]
    return runs[0][runs[0] < count]


def building_sequence(batch: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
    """The order in which groups are built, given the batch (groups,) each belongs to.

    Groups built late have fewer unused neighbours to draw from. One group is built for every batch, then a
    second for every batch, and so on, so that each batch has groups of every stage; within a stage, batches
    come in an order in which early and late ones are evenly spread over the epoch.
    """
    batches = int(batch[-1]) + 1
    first = np.searchsorted(batch, np.arange(batches))
    count = np.diff(np.append(first, len(batch)))
    stages = []
    for stage in range(int(count.max())):
        dealt = np.argsort(_paired(np.arange(batches), rng))  # the batch that is built t-th
        stages.append(first[dealt[count[dealt] > stage]] + stage)
    return np.concatenate(stages).astype(np.int32)


class NeighborSampler(BatchSampler):
    """Base of `HardNegativeSampler` and `PartitionBatchSampler`."""

    composes_hard_batches: ClassVar[bool] = True

    def __init__(
        self,
        neighbors: Neighbors | NDArray[np.integer] | Tensor,
        batch_size: int,
        *,
        false_negative_threshold: float | None,
        curriculum_epoch: int,
        ids: Ids | None,
        **options: Any,
    ) -> None:
        check_not_rebuilt(type(self).__name__, neighbors)
        self.neighbors = as_neighbors(neighbors)
        if ids is None:
            ids = self.neighbors.ids
        super().__init__(self.neighbors.n, batch_size, ids=ids, **options)
        if self.neighbors.ids is not None and self.ids is not None:
            compare_ids(self.neighbors.ids, self.ids, "neighbour list", "sampler")
        self.false_negative_threshold = false_negative_threshold
        self.curriculum_epoch = curriculum_epoch

    @property
    def false_negative_threshold(self) -> float | None:
        """Similarity from which a neighbour is a likely false negative, to be kept out of the batch."""
        return self._threshold

    @false_negative_threshold.setter
    def false_negative_threshold(self, value: float | None) -> None:
        if value is not None:
            value = number("false_negative_threshold", value, -1.0, infinite=True)
        self._close = self.neighbors.too_close(value)
        self._threshold = value

    @property
    def curriculum_epoch(self) -> int:
        """So many epochs of random batches come first."""
        return self._curriculum

    @curriculum_epoch.setter
    def curriculum_epoch(self, value: int) -> None:
        self._curriculum = whole_number("curriculum_epoch", value, 0)

    def _identity(self) -> dict[str, object]:
        return {"neighbors": self.neighbors.fingerprint()}

    def realised_hardness(
        self, epoch: int | None = None, *, threshold: float | None = None, sample: int | None = 20_000
    ) -> HardnessReport:
        """How hard the batches of an epoch are, per quarter, by default of the one that is being drawn.

        ``threshold`` for likely false negatives defaults to the filter's own; ``sample`` evenly spaced items
        stand for all.
        """
        running = self._running if epoch is None else None
        if sample is not None:
            sample = whole_number("sample", sample, 1)
        return self._measure(running or self.plan(epoch), threshold, sample)

    def _measure(
        self, plan: Plan, threshold: float | None = None, sample: int | None = 20_000
    ) -> HardnessReport:
        return measure_hardness(
            plan,
            self.neighbors,
            k=getattr(self, "hardness_k", None),
            threshold=self.false_negative_threshold if threshold is None else threshold,
            sample=sample,
        )

    def _announce(self, epoch: int, plan: Plan) -> None:
        if not log.isEnabledFor(logging.INFO):  # measuring costs more than planning
            return
        if epoch == self.curriculum_epoch > 0:
            log.info(
                "epoch %d: %d epochs of random batches are over, this is the first hard one", epoch, epoch
            )
        log.info("epoch %d: %s", epoch, self._measure(plan))


def checked_group_size(value: int, batch_size: int) -> int:
    """A group size that fits a batch."""
    value = whole_number("group_size", value, 1)
    if value > batch_size:
        raise NearfarError(f"group_size={value} is larger than a batch of {batch_size}")
    return value


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
        ids: Ids | None = None,
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
        if order == "greedy" and isinstance(self.neighbors, MappedNeighbors):
            raise NearfarError(
                "order='greedy' is for comparison, and needs the lists in memory; on disk 'level' plans them"
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
        self._hard_ratio = number("hard_ratio", value, 0, 1)

    @property
    def hardness_k(self) -> int:
        """How many nearest neighbours of a pivot are drawn from."""
        return self._hardness_k

    @hardness_k.setter
    def hardness_k(self, value: int) -> None:
        value = whole_number("hardness_k", value, 1)
        if value > self.neighbors.k:
            raise NearfarError(
                f"hardness_k={value}, but only {self.neighbors.k} neighbours per item are stored; lower it, "
                f"or search "
                f"more with nearest_neighbors(embeddings, {value})"
            )
        self._hardness_k = value

    def _identity(self) -> dict[str, object]:
        return {**super()._identity(), "order": self.order, "group_size": self.group_size}

    def _compose(self, epoch: int, options: Mapping[str, Any]) -> Plan:
        if epoch < options["curriculum_epoch"] or options["hard_ratio"] == 0.0:
            return random_plan(self.layout, self.seed, epoch)
        from nearfar.batching import _kernels
        from nearfar.batching.stretches import groups_by_stretches

        start, batch = self.layout.slots(self.group_size)
        quota = _quota(np.diff(start), options["hard_ratio"])
        rng = np.random.default_rng([self.seed, epoch])
        level = self.order == "level"
        sequence = building_sequence(batch, rng) if level else np.arange(len(batch), dtype=np.int32)
        threshold = options["false_negative_threshold"]
        close = self._close if threshold == self._threshold else self.neighbors.too_close(threshold)
        state, near, k = _kernels.random_state(self.seed, epoch), self.neighbors, options["hardness_k"]
        if isinstance(near, MappedNeighbors):
            order, hard = groups_by_stretches(near, k, close, start, batch, quota, sequence, rng, state)
        else:
            order, hard = _kernels.compose_groups(
                near.indices, k, close, start, batch, quota, sequence, level, state
            )
        return Plan(self.layout, order, hard, options["hard_ratio"])


def _quota(sizes: NDArray[np.int64], hard_ratio: float) -> NDArray[np.int64]:
    """Hard items per group: at least a pair, since a pivot alone has no hard negative."""
    return np.minimum(sizes, np.maximum(2, np.rint(hard_ratio * sizes).astype(np.int64)))
