"""Batches in random order, batches of texts of similar length, and items that come several times an epoch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.arguments import array, whole_number
from nearfar.batching.base import BatchSampler, as_ids, check_not_rebuilt, digest
from nearfar.batching.plan import Layout, Plan
from nearfar.errors import NearfarError
from nearfar.ids import Ids

__all__ = ["LengthBatchSampler", "RandomBatchSampler"]


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
        ids: Ids | None = None,
    ) -> None:
        super().__init__(
            n, batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size, ids=ids
        )

    def _compose(self, epoch: int, options: Mapping[str, object]) -> Plan:
        return random_plan(self.layout, self.seed, epoch)


class LengthBatchSampler(BatchSampler):
    """Random batches whose items have similar lengths, so that little is padded.

    An epoch is a random order; windows of ``window`` batches are sorted by length, cut into batches, and the batches
    shuffled. ``window=1`` is plain random order.

    ``repeats``: how often each item comes in an epoch, at least once. The copies of an item are spread evenly over the
    epoch: they meet in no batch as long as there are more than ``window`` batches for each copy.

    >>> lengths = np.array([3, 90, 4, 80, 5, 70])
    >>> sampler = LengthBatchSampler(lengths, 3)
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 2, 4], [1, 3, 5]]
    >>> twice = LengthBatchSampler(lengths, 2, repeats=np.array([1, 2, 1, 1, 1, 2]))
    >>> len(twice), sorted(i for batch in twice for i in batch)
    (4, [0, 1, 1, 2, 3, 4, 5, 5])
    """

    def __init__(
        self,
        lengths: Int[ndarray, " n"] | Float[ndarray, " n"],
        batch_size: int,
        *,
        repeats: Int[ndarray, " n"] | None = None,
        window: int = 8,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Ids | None = None,
    ) -> None:
        check_not_rebuilt(type(self).__name__, lengths)
        self.lengths = _one_each("lengths", lengths, "the length of every item, (n,) finite numbers", "iuf")
        counts = np.ones(len(self.lengths), dtype=np.int64)
        if repeats is not None:
            counts = _one_each("repeats", repeats, "how often an item comes in an epoch, (n,) whole numbers")
        if counts.shape != self.lengths.shape:
            raise NearfarError(
                f"lengths have shape {self.lengths.shape} and repeats {counts.shape}; one number for each item"
            )
        if len(counts) and counts.min() < 1:
            raise NearfarError("repeats are whole numbers of at least 1: how often an item comes in an epoch")
        if int(counts.sum()) > np.iinfo(np.int32).max:
            raise NearfarError(
                f"repeats make {int(counts.sum())} items of an epoch; 32-bit positions hold fewer"
            )
        # Every copy is an item of the plan; positions are those of the items.
        self._items = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        first = np.cumsum(counts) - counts
        self._copy = np.arange(len(self._items)) - np.repeat(first, counts)
        self._counts = counts
        super().__init__(
            len(self._items),
            batch_size,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            ids=None if ids is None else as_ids(ids, len(counts))[self._items],
        )
        self.window = whole_number("window", window, 1)

    def _identity(self) -> dict[str, object]:
        return {"lengths": digest(self.lengths), "repeats": digest(self._counts), "window": self.window}

    def _compose(self, epoch: int, options: Mapping[str, object]) -> Plan:
        rng = np.random.default_rng([self.seed, epoch])
        layout = self.layout
        place = (self._copy + rng.random(len(self._counts))[self._items]) / self._counts[self._items]
        order = self._items[np.argsort(place, kind="stable")][: layout.total]
        if self.window > 1:
            order = _sorted_windows(order, self.lengths, layout, self.window, rng)
        return Plan(layout, order)


def _one_each(name: str, value: object, needs: str, kinds: str = "iu") -> np.ndarray:
    """One number for each item; whole ones as int64, whatever type they came in."""
    numbers = array(name, value, needs, kinds)
    if numbers.ndim != 1:
        raise NearfarError(f"{name} have shape {numbers.shape}; give {needs}")
    if not np.isfinite(numbers).all():
        raise NearfarError(f"{name} hold numbers that are not finite; give {needs}")
    whole_numbers = numbers.dtype.kind in "iu" or bool((numbers == np.floor(numbers)).all())
    return numbers.astype(np.int64 if whole_numbers else np.float64)


def _sorted_windows(
    order: NDArray[np.int32],
    lengths: np.ndarray,
    layout: Layout,
    window: int,
    rng: np.random.Generator,
) -> NDArray[np.int32]:
    order = order.copy()
    starts = layout.starts
    step = window * layout.world_size
    for first in range(0, len(starts) - 1, step):
        span = slice(starts[first], starts[min(first + step, len(starts) - 1)])
        order[span] = order[span][np.argsort(lengths[order[span]], kind="stable")]
    sizes = np.diff(starts)
    full = np.flatnonzero(sizes == sizes[0])
    shuffled = np.arange(len(sizes))
    # Ranks of one step keep together: the batches that they get at once have similar lengths, too.
    if layout.world_size == 1:
        shuffled[full] = full[rng.permutation(len(full))]
    else:
        steps = np.flatnonzero(sizes[:: layout.world_size] == sizes[0])
        new = steps[rng.permutation(len(steps))]
        ranks = np.arange(layout.world_size)
        old_places = (steps[:, None] * layout.world_size + ranks).ravel()
        shuffled[old_places] = (new[:, None] * layout.world_size + ranks).ravel()
    return np.concatenate([order[starts[b] : starts[b + 1]] for b in shuffled])
