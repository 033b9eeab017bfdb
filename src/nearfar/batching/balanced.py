"""Batches in which the classes are evenly represented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.batching.base import BatchSampler, digest
from nearfar.batching.layout import Layout, Plan, whole
from nearfar.errors import NearfarError

__all__ = ["BalancedBatchSampler"]

# How many later chunks are tried for the space left in a batch before one is cut in two.
_LOOK_AHEAD = 16


class BalancedBatchSampler(BatchSampler):
    """Every batch a fair sample of the classes; no item ever twice in a batch.

    By default every item comes once per epoch: each class is cut into chunks of ``samples_per_class`` items
    (so that an item has company of its own class) which are spread evenly from the first batch to the last. A
    batch then holds the classes in the proportions of the whole set, and a small class is neither bunched nor
    repeated.

    With ``repeat=True`` the classes of a batch have *equal* shares: all of them where the batch has room for
    ``samples_per_class`` of each, otherwise as many as fit, in turn. A small class comes again in a later
    batch once all its items have been drawn; a class with fewer items than its share gives what it has, and
    the others fill up. The number of batches stays the same, and ``remainder`` counts the items of large
    classes that the epoch leaves out.

    >>> labels = ["common"] * 90 + ["rare"] * 10
    >>> once = BalancedBatchSampler(labels, 20)
    >>> [sum(i >= 90 for i in batch) for batch in once]
    [2, 2, 2, 2, 2]
    >>> equal = BalancedBatchSampler(labels, 20, repeat=True)
    >>> [sum(i >= 90 for i in batch) for batch in equal]
    [10, 10, 10, 10, 10]
    """

    def __init__(
        self,
        labels: Sequence[Any] | NDArray[Any] | Tensor,
        batch_size: int,
        samples_per_class: int = 2,
        *,
        repeat: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Sequence[Any] | NDArray[Any] | None = None,
    ) -> None:
        values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if values.ndim != 1:
            raise NearfarError(f"labels must be one class per item, not an array of shape {values.shape}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise NearfarError("labels hold values that are not finite; give every item a class")
        super().__init__(
            len(values), batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size, ids=ids
        )
        self.samples_per_class = whole("samples_per_class", samples_per_class, 1)
        self.repeat = bool(repeat)
        self.classes, code = np.unique(
            values.astype(str) if values.dtype == object else values, return_inverse=True
        )
        by_class = np.argsort(code, kind="stable").astype(np.int32)
        self._members = np.split(by_class, np.cumsum(np.bincount(code))[:-1])
        self._code = code

    @property
    def remainder(self) -> int:
        """Items that the current epoch leaves out."""
        return self.n - len(np.unique(self.plan().order)) if self.repeat else self.layout.remainder

    def _identity(self) -> dict[str, Any]:
        return {
            "labels": digest(self._code),
            "samples_per_class": self.samples_per_class,
            "repeat": self.repeat,
        }

    def _compose(self, epoch: int, options: Mapping[str, Any]) -> Plan:
        rng = np.random.default_rng([self.seed, epoch])
        order = (_equal_shares if self.repeat else _spread_once)(
            self._members, self.layout, self.samples_per_class, rng
        )
        return Plan(self.layout, order)


def _spread_once(
    members: list[NDArray[np.int32]], layout: Layout, company: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    chunks: list[NDArray[np.int32]] = []
    keys: list[NDArray[np.float64]] = []
    for items in members:
        count = max(1, len(items) // company)
        chunks += np.array_split(rng.permutation(items), count)
        keys.append((np.arange(count) + rng.random()) / count)  # evenly over the epoch, from a random start
    waiting = [chunks[at] for at in np.argsort(np.concatenate(keys), kind="stable")]
    waiting.reverse()  # taken from the end
    order: list[NDArray[np.int32]] = []
    for size in np.diff(layout.starts):
        room = int(size)
        while room:
            near = range(len(waiting) - 1, max(-1, len(waiting) - 1 - _LOOK_AHEAD), -1)
            at = next((at for at in near if len(waiting[at]) <= room), None)
            if at is None:
                chunk = waiting.pop()
                waiting.append(chunk[room:])
                chunk = chunk[:room]
            else:
                chunk = waiting.pop(at)
            order.append(chunk)
            room -= len(chunk)
    return np.concatenate(order)


class _Deck:
    """The items of a class in random order; all are dealt before it is shuffled again."""

    def __init__(self, items: NDArray[np.int32], rng: np.random.Generator) -> None:
        self.items, self.rng = items, rng
        self.left: list[int] = []

    def draw(self, count: int, taken: set[int]) -> list[int]:
        """Up to ``count`` items that are not ``taken``; fewer where the class has no more."""
        drawn: list[int] = []
        for _ in range(2):
            kept: list[int] = []
            while self.left and len(drawn) < count:
                item = self.left.pop()
                (kept if item in taken else drawn).append(item)
            self.left += reversed(kept)
            taken.update(drawn)
            if len(drawn) == count:
                break
            waiting = set(self.left)  # only items that are taken: they stay first in line
            fresh = [item for item in self.rng.permutation(self.items).tolist() if item not in waiting]
            self.left = fresh + self.left
        return drawn


def _equal_shares(
    members: list[NDArray[np.int32]], layout: Layout, company: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    decks = [_Deck(items, rng) for items in members]
    turn: list[int] = []
    order: list[int] = []
    for size in layout.sizes.tolist():
        taken: set[int] = set()  # by any rank in this step
        for _ in range(layout.world_size):
            width = min(len(decks), max(1, size // company))
            chosen: list[int] = []
            while len(chosen) < width:
                if not turn:
                    turn = rng.permutation(len(decks)).tolist()
                at = next((at for at in range(len(turn) - 1, -1, -1) if turn[at] not in chosen), None)
                if at is None:  # a batch may begin a new turn before the old one is through
                    turn = [c for c in rng.permutation(len(decks)).tolist() if c not in turn] + turn
                    continue
                chosen.append(turn.pop(at))
            batch: list[int] = []
            for at, c in enumerate(chosen):
                batch += decks[c].draw(size // width + (at < size % width), taken)
            sources = [*chosen, *(c for c in range(len(decks)) if c not in chosen)]
            at = 0
            while len(batch) < size:  # what small classes could not give comes from the others, one by one
                batch += decks[sources[at % len(sources)]].draw(1, taken)
                at += 1
            order += batch
    return np.array(order, np.int32)
