"""Batches in which the classes are evenly represented."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import flag, shown, whole_number
from nearfar.batching.base import BatchSampler, digest
from nearfar.batching.plan import Layout, Plan
from nearfar.errors import NearfarError
from nearfar.ids import Ids
from nearfar.labels import label_codes

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
    the others fill up, first those of the batch and then the next in turn. The number of batches stays the same, and
    ``remainder`` counts the items of large classes that the epoch leaves out.

    ``labels`` is any container that `nearfar.labels.label_codes` reads. Items whose label is missing (−1, NaN, None)
    are never drawn: ``unlabelled`` counts them, ``remainder`` too, and a warning says so once. A plan takes time in
    proportion to the items, whatever the number of classes.

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
        labels: Ids | Tensor,
        batch_size: int,
        samples_per_class: int = 2,
        *,
        repeat: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Ids | None = None,
    ) -> None:
        code, self.classes = label_codes(labels)
        flag("drop_last", drop_last)
        if ids is not None:
            try:
                np.asarray(ids)
            except (TypeError, ValueError):
                raise NearfarError(f"ids are {shown(ids)}; one id for each item is needed") from None
        super().__init__(
            len(code), batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size, ids=ids
        )
        self.samples_per_class = whole_number("samples_per_class", samples_per_class, 1)
        self.repeat = flag("repeat", repeat)
        self.unlabelled = int((code < 0).sum())
        if self.unlabelled:
            if self.unlabelled == len(code):
                raise NearfarError(
                    f"labels: all {len(code)} are missing (-1, NaN, None), so that there is nothing to balance; use "
                    "RandomBatchSampler"
                )
            self.layout = replace(self.layout, left_out=self.unlabelled)
            if self.rank == 0:
                warnings.warn(
                    f"{self.unlabelled} of {len(code)} items have no label (-1, NaN, None) and are never drawn; give "
                    "them a class of their own if they should be",
                    stacklevel=2,
                )
        self._code = code
        self._planned: tuple[int, Plan, int] | None = None

    @property
    def remainder(self) -> int:
        """Items that the current epoch leaves out."""
        if not self.repeat:
            return self.layout.remainder
        plan = self.plan()
        if self._planned is None or self._planned[1] is not plan:
            return self.n - len(np.unique(plan.order))
        return self._planned[2]

    def _identity(self) -> dict[str, object]:
        return {
            "labels": digest(self._code),
            "samples_per_class": self.samples_per_class,
            "repeat": self.repeat,
            "planning": 2,  # a plan of the first kind came from other draws
        }

    def _compose(self, epoch: int, options: Mapping[str, object]) -> Plan:
        # The plan of an epoch is asked for more than once: to iterate, to log it, to count what it leaves out.
        if self._planned is not None and self._planned[0] == epoch:
            return self._planned[1]
        rng = np.random.default_rng([self.seed, epoch])
        # The items of each class in random order, class after class; those without a label stand first, and fall off.
        items = np.lexsort((rng.random(self.n), self._code)).astype(np.int32)[self.unlabelled :]
        counts = np.bincount(self._code[items], minlength=len(self.classes))
        order = (_equal_shares if self.repeat else _spread_once)(
            items, counts, self.layout, self.samples_per_class, rng
        )
        plan = Plan(self.layout, order)
        self._planned = epoch, plan, self.n - len(np.unique(order))
        return plan


def _spread_once(
    items: NDArray[np.int32],
    counts: NDArray[np.int64],
    layout: Layout,
    company: int,
    rng: np.random.Generator,
) -> NDArray[np.int32]:
    """Each item once. ``items`` of one class stand together; ``counts`` says how many there are of each."""
    chunks = np.maximum(1, counts // company)
    part = np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    of = np.repeat(np.arange(len(counts)), chunks)
    # The first of a class's chunks are one longer where its items cannot be divided evenly.
    length = counts[of] // chunks[of] + (part < counts[of] % chunks[of])
    start = np.cumsum(length) - length
    key = (part + rng.random(len(counts))[of]) / chunks[of]  # evenly over the epoch, from a random start
    by_key = np.argsort(key, kind="stable")[::-1]  # taken from the end
    waiting = list(zip(start[by_key].tolist(), length[by_key].tolist(), strict=True))
    order: list[NDArray[np.int32]] = []
    for size in np.diff(layout.starts).tolist():
        room = size
        while room:
            near = range(len(waiting) - 1, max(-1, len(waiting) - 1 - _LOOK_AHEAD), -1)
            at = next((at for at in near if waiting[at][1] <= room), None)
            if at is None:
                first, taken = waiting.pop()
                waiting.append((first + room, taken - room))
                taken = room
            else:
                first, taken = waiting.pop(at)
            order.append(items[first : first + taken])
            room -= taken
    return np.concatenate(order)


class _Deck:
    """The items of a class in random order; all are dealt before it is shuffled again."""

    def __init__(self, items: NDArray[np.int32], rng: np.random.Generator) -> None:
        self.items, self.rng = items, rng
        self.left = items.tolist()  # in random order already

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
            again = self.rng.permutation(self.items) if len(self.items) > 1 else self.items
            fresh = [item for item in again.tolist() if item not in waiting]
            self.left = fresh + self.left
        return drawn


class _Turn:
    """The order in which classes come: all of them before any comes again."""

    def __init__(self, classes: int, rng: np.random.Generator) -> None:
        self.classes, self.rng = classes, rng
        self.left: list[int] = []

    def next(self, but: Collection[int]) -> int:
        """The next class that is not in ``but``, of which there is one."""
        at = next((at for at in range(len(self.left) - 1, -1, -1) if self.left[at] not in but), None)
        if at is None:  # a batch may begin a new turn before the old one is through
            waiting = set(self.left)
            self.left = [
                c for c in self.rng.permutation(self.classes).tolist() if c not in waiting
            ] + self.left
            return self.next(but)
        return self.left.pop(at)


def _equal_shares(
    items: NDArray[np.int32],
    counts: NDArray[np.int64],
    layout: Layout,
    company: int,
    rng: np.random.Generator,
) -> NDArray[np.int32]:
    """Classes in turn, with equal shares of a batch. Arguments as of ``_spread_once``."""
    ends = np.cumsum(counts).tolist()
    decks = [_Deck(items[end - count : end], rng) for end, count in zip(ends, counts.tolist(), strict=True)]
    turn = _Turn(len(decks), rng)
    order: list[int] = []
    for size in layout.sizes.tolist():
        taken: set[int] = set()  # by any rank in this step
        for _ in range(layout.world_size):
            width = min(len(decks), max(1, size // company))
            chosen: dict[int, None] = {}
            for _ in range(width):
                chosen[turn.next(chosen)] = None
            batch: list[int] = []
            giving = []  # those that have more
            for at, c in enumerate(chosen):
                drawn = decks[c].draw(size // width + (at < size % width), taken)
                batch += drawn
                if len(drawn) < len(decks[c].items):
                    giving.append(c)
            while len(batch) < size:  # what small classes could not give comes from the others, one by one
                given = [(c, decks[c].draw(1, taken)) for c in giving[: size - len(batch)]]
                giving = giving[len(given) :] + [c for c, drawn in given if drawn]
                batch += [item for _, drawn in given for item in drawn]
                if not giving and len(batch) < size:
                    c = turn.next(chosen)
                    chosen[c] = None
                    drawn = decks[c].draw(min(size - len(batch), size // width), taken)
                    batch += drawn
                    giving = [c] if len(drawn) < len(decks[c].items) else []
            order += batch
    return np.array(order, np.int32)
