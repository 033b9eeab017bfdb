"""Plans over neighbour lists on disk, made from one stretch of rows after another.

Near items stand near each other in the files (`MappedNeighbors`), so that most neighbours of a row are in its stretch.
Stretches are cut anew in every epoch: neighbours that a cut keeps apart are together in other epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nearfar.batching import _kernels
from nearfar.batching.mapped_neighbors import MappedNeighbors

__all__ = ["cut_into_stretches", "groups_by_stretches", "parts_of"]

#: bytes of the lists of a stretch, which are in memory
STRETCH_BYTES = 256 << 20


def cut_into_stretches(n: int, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Bounds of nearly equal stretches of ``n`` rows with ``k`` neighbours, each moved by up to a quarter.

    >>> cut_into_stretches(10, 5, np.random.default_rng(0)).tolist()
    [0, 10]
    """
    count = max(1, -(-n * k * 4 // STRETCH_BYTES))
    bounds = np.arange(count + 1) * (n / count)
    bounds[1:-1] += rng.uniform(-0.25, 0.25, count - 1) * (n / count)
    return np.unique(np.rint(bounds).astype(np.int64))


def _dealt(rows: NDArray[np.int64], groups: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """The stretch in which each group is built, in the order of the building: in proportion to rows, evenly spread."""
    ends = np.rint(np.cumsum(rows) / rows.sum() * groups).astype(np.int64)
    count = np.diff(ends, prepend=0)
    of = np.repeat(np.arange(len(rows)), count)
    turn = np.arange(groups) - np.repeat(ends - count, count)
    return of[np.argsort((turn + rng.random(groups)) / count[of], kind="stable")]


def groups_by_stretches(
    near: MappedNeighbors,
    k: int,
    close: NDArray[np.int32],
    start: NDArray[np.int64],
    batch: NDArray[np.int32],
    quota: NDArray[np.int64],
    sequence: NDArray[np.int32],
    rng: np.random.Generator,
    state: NDArray[np.uint64],
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """As ``_kernels.compose_groups`` with ``level``: items by their position, and which of them are hard.

    A group is built in one stretch; every part of the epoch has groups of every stretch and of every stage of the
    building. Random items come from all that is left, in all stretches.
    """
    bounds = cut_into_stretches(near.n, k, rng)
    turn = _dealt(np.diff(bounds), len(batch), rng)
    close = close[near.positions]
    plan, hard = np.empty(start[-1], np.int32), np.zeros(start[-1], np.bool_)
    used, filled = np.zeros(near.n, np.bool_), np.zeros(len(batch), np.int64)
    filtered = bool(close.max(initial=0) > 0)
    place = np.full(near.n if filtered else 0, -1, np.int32)
    for at, (begin, end) in enumerate(pairwise(bounds.tolist())):
        slots = sequence[turn == at]
        want = quota[slots]
        want = np.minimum(want, np.maximum(0, end - begin - (np.cumsum(want) - want)))  # no more than rows
        local_start = np.concatenate([[0], np.cumsum(want)]).astype(np.int64)
        order, is_hard = _kernels.compose_groups(
            near.local(begin, end, k), k, close[begin:end], local_start, batch[slots], want,
            np.arange(len(slots), dtype=np.int32), True, state,
        )  # fmt: skip
        to = np.repeat(start[slots] - local_start[:-1], want) + np.arange(local_start[-1])
        order += np.int32(begin)
        plan[to], hard[to], used[order], filled[slots] = order, is_hard, True, want
        if filtered:
            place[order] = np.repeat(batch[slots], want)
    pool = _kernels.shuffled(near.n, state)
    _kernels.fill_slots(plan, start, batch, filled, 0, pool, used, near.stored, close, place, filtered)
    return near.positions[plan], hard


def parts_of(
    near: MappedNeighbors, start: NDArray[np.int64], rng: np.random.Generator
) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Stretches, each with the slots that are made of it: slots of every size in each, no more places than rows."""
    target = np.diff(start)
    bounds = cut_into_stretches(near.n, near.k, rng)
    cuts = np.unique(np.rint(bounds * (len(target) / near.n)).astype(np.int64))
    mixed = rng.permutation(len(target))
    end = used = 0
    for low, high in pairwise(cuts.tolist()):
        slots = mixed[low:high]
        used += int(target[slots].sum())
        begin, end = end, used + (near.n - int(start[-1])) * used // int(start[-1])
        yield begin, end, slots
