"""The compiled loops behind the samplers.

All of them are sequential, so a plan does not depend on the number of threads, and all draw from a counter-based
generator that is passed in (`state`, one ``uint64``), so a plan depends on nothing but its arguments. They work on
``int32`` neighbour lists of shape (n, k) in which -1 means "no neighbour", and release the GIL.

Words used below: a *slot* is a run of consecutive places in the plan that is filled around one pivot; one or more
slots make a *batch*. ``close[i]`` says how many leading neighbours of item ``i`` are too similar to be its negatives.

They stay in one file because numba keys its on-disk cache by the file of the outermost function: a helper changed in
a different file would leave stale machine code behind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = [
    "balance",
    "compose_groups",
    "count_inside",
    "cut_tiles",
    "fill_slots",
    "grouped",
    "propagate",
    "random_state",
    "separate",
    "shuffled",
]


Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)

# How far a random filler is looked for when the next one is too similar to somebody in the batch.
_LOOK_AHEAD = 64


def random_state(seed: int, epoch: int) -> UInt64:
    """The generator of one epoch: a pure function of the two numbers."""
    return np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64).astype(np.uint64)


@njit(cache=True, nogil=True, inline="always")
def _below(state: UInt64, bound: int) -> Any:
    """A uniform integer in [0, bound), bound < 2**32: splitmix64, then multiply and shift."""
    state[0] += _GOLDEN
    z = state[0]
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    z = z ^ (z >> _S31)
    return np.int64(((z >> _S32) * np.uint64(bound)) >> _S32)


@njit(cache=True, nogil=True)
def shuffled(n: int, state: UInt64) -> Int32:
    """A uniform permutation of 0 … n-1 (inside-out Fisher-Yates)."""
    order = np.empty(n, np.int32)
    for i in range(n):
        j = _below(state, i + 1)
        order[i] = order[j]
        order[j] = i
    return order


@njit(cache=True, nogil=True, inline="always")
def _clashes(item: int, batch: int, nearest: Int32, close: Int32, place: Int32) -> bool:
    """Is an item too similar to this one already in the batch?"""
    for a in range(min(close[item], nearest.shape[1])):
        other = nearest[item, a]
        if 0 <= other < len(place) and place[other] == batch:
            return True
    return False


@njit(cache=True, nogil=True)
def _draw_filler(
    batch: int,
    first: int,
    pool: Int32,
    used: NDArray[np.bool_],
    nearest: Int32,
    close: Int32,
    place: Int32,
    filtered: bool,
) -> tuple[int, int]:
    """The next unused item of the pool that does not clash with the batch, and where the pool now begins.

    If the whole look-ahead clashes, the first unused item is taken all the same: every item comes once.
    """
    while first < len(pool) and used[pool[first]]:
        first += 1
    if first == len(pool):
        raise RuntimeError("a plan has more places than items")
    if not filtered:
        return pool[first], first + 1
    at, seen = first, 0
    while at < len(pool) and seen < _LOOK_AHEAD:
        item = pool[at]
        at += 1
        if used[item]:
            continue
        seen += 1
        if not _clashes(item, batch, nearest, close, place):
            return item, first
    return pool[first], first


@njit(cache=True, nogil=True)
def fill_slots(
    plan: Int32,
    slot_start: Int64,
    slot_batch: Int32,
    filled: Int64,
    first: int,
    pool: Int32,
    used: NDArray[np.bool_],
    nearest: Int32,
    close: Int32,
    place: Int32,
    filtered: bool,
) -> None:
    """Fill what is left of every slot, behind its ``filled`` items, with unused ones of the pool from ``first`` on."""
    for slot in range(len(slot_batch)):
        batch = slot_batch[slot]
        for at in range(slot_start[slot] + filled[slot], slot_start[slot + 1]):
            plan[at], first = _draw_filler(batch, first, pool, used, nearest, close, place, filtered)
            used[plan[at]] = True
            if filtered:
                place[plan[at]] = batch


@njit(cache=True, nogil=True)
def compose_groups(
    nearest: Int32,
    k: int,
    close: Int32,
    slot_start: Int64,
    slot_batch: Int32,
    quota: Int64,
    sequence: Int32,
    level: bool,
    state: UInt64,
) -> tuple[Int32, NDArray[np.bool_]]:
    """Fill every slot with a pivot, unused neighbours drawn uniformly from its first ``k``, and random items.

    ``quota[s]`` counts the hard items of slot ``s``, its pivot among them; ``sequence`` is the order of the
    building. With ``level`` the hard parts of all slots are built before any filler is placed, and a slot
    whose pivot runs out goes on with the neighbours of those it drew, and only then with a further pivot.
    Without it, slots are filled one after another, fillers included, and a pivot that runs out leaves its
    slot to fillers.

    Returns the plan (slot_start[-1],) and which of its items are hard: drawn as a neighbour, or a pivot with
    such.
    """
    n, slots = len(close), len(slot_batch)
    k = min(k, nearest.shape[1])
    plan = np.empty(slot_start[slots], np.int32)
    hard = np.zeros(slot_start[slots], np.bool_)
    # Availability is asked for most often, so it has a byte per item, which stays in cache; the batch of an
    # item is needed, and kept, only for the filter.
    used = np.zeros(n, np.bool_)
    filtered = close.max() > 0
    place = np.full(n if filtered else 0, -1, np.int32)
    pool = shuffled(n, state)
    filled = np.zeros(slots, np.int64)
    unused = np.empty(max(k, 1), np.int32)
    first = 0
    for slot in sequence:
        batch, begin, want = slot_batch[slot], slot_start[slot], quota[slot]
        m, expanded = 0, 0
        while m < want:
            if expanded == m:
                if m > 0 and not level:
                    break
                pivot, first = _draw_filler(batch, first, pool, used, nearest, close, place, filtered)
                used[pivot] = True
                if filtered:
                    place[pivot] = batch
                plan[begin + m] = pivot
                m += 1
            centre = plan[begin + expanded]
            expanded += 1
            available = 0
            if m < want:
                for a in range(close[centre], k):
                    item = nearest[centre, a]
                    if 0 <= item < n and not used[item]:
                        unused[available] = item
                        available += 1
            drawn = 0
            while drawn < available and m < want:
                pick = drawn + _below(state, available - drawn)
                item = unused[pick]
                unused[pick] = unused[drawn]
                drawn += 1
                if used[item]:  # named twice in the row, and drawn already
                    continue
                if filtered:
                    if _clashes(item, batch, nearest, close, place):
                        continue
                    place[item] = batch
                used[item] = True
                plan[begin + m] = item
                hard[begin + m] = True
                hard[begin + expanded - 1] = True
                m += 1
            if not level:
                break
        filled[slot] = m
        if not level:
            for at in range(begin + m, slot_start[slot + 1]):
                plan[at], first = _draw_filler(batch, first, pool, used, nearest, close, place, filtered)
                used[plan[at]] = True
                if filtered:
                    place[plan[at]] = batch
    if level:
        fill_slots(plan, slot_start, slot_batch, filled, first, pool, used, nearest, close, place, filtered)
    return plan, hard


@njit(cache=True, nogil=True)
def grouped(label: Int32, start: Int64) -> Int32:
    """The items with a label, label after label (a counting sort): those of label b from ``start[b]`` on."""
    order = np.empty(start[-1], np.int32)
    at = start[:-1].copy()
    for item in range(len(label)):
        here = label[item]
        if here >= 0:
            if here >= len(at) or at[here] >= start[here + 1]:
                raise RuntimeError("a label has more items than places")
            order[at[here]] = item
            at[here] += 1
    for here in range(len(at)):
        if at[here] != start[here + 1]:
            raise RuntimeError("a label has fewer items than places")
    return order


@njit(cache=True, nogil=True, inline="always")
def _count_votes(
    item: int, width: int, nearest: Int32, close: Int32, label: Int32, votes: Int32, seen: Int32
) -> int:
    """How many of an item's first ``width`` neighbours are in each slot; one too close vetoes its slot."""
    count = 0
    for a in range(min(max(width, close[item]), nearest.shape[1])):
        other = nearest[item, a]
        slot = label[other] if 0 <= other < len(label) else -1
        if slot < 0:
            continue
        if votes[slot] == 0:
            seen[count] = slot
            count += 1
        if a >= close[item]:
            votes[slot] += 1
        elif votes[slot] > -2_000_000_000:  # thousands of vetoes must not wrap around
            votes[slot] -= 1_000_000
    return count


@njit(cache=True, nogil=True)
def propagate(
    nearest: Int32, width: int, close: Int32, label: Int32, size: Int64, low: Int64, high: Int64, passes: int
) -> int:
    """Label propagation under size bounds, in place: items move to the slot with most of their neighbours.

    A slot never shrinks below ``low`` nor grows above ``high``. Items with label -1 stay out. Stops early
    when a pass moves fewer than one item in a thousand; returns the number of moves.
    """
    n, width = len(label), min(width, nearest.shape[1])
    votes = np.zeros(len(size), np.int32)
    seen = np.empty(nearest.shape[1] + 1, np.int32)
    total = 0
    for _ in range(passes):
        moves = 0
        for item in range(n):
            here = label[item]
            if here < 0 or size[here] <= low[here]:
                continue
            if close[item] == 0:
                inside = 0
                for a in range(width):
                    other = nearest[item, a]
                    inside += 0 <= other < n and label[other] == here
                if 2 * inside >= width:  # a majority cannot be outvoted
                    continue
            count = _count_votes(item, width, nearest, close, label, votes, seen)
            best, most = here, votes[here]
            for a in range(count):
                slot = seen[a]
                if votes[slot] > most and size[slot] < high[slot]:
                    best, most = slot, votes[slot]
                votes[slot] = 0
            if best != here:
                size[here] -= 1
                size[best] += 1
                label[item] = best
                moves += 1
        total += moves
        if moves * 1000 < n:
            break
    return total


@njit(cache=True, nogil=True)
def balance(
    nearest: Int32, width: int, close: Int32, label: Int32, size: Int64, target: Int64, rounds: int
) -> int:
    """Bring every slot to its exact size, in place, by the moves that lose the fewest neighbours.

    In each round the items of slots that are too large are ranked by the neighbours they would lose in the
    best slot with room, and moved in that order. What has no neighbour in any slot with room moves in the
    last round to the first that has room, the least attached items first. Returns the number of moves.
    """
    n, slots, width = len(label), len(size), min(width, nearest.shape[1])
    votes = np.zeros(slots, np.int32)
    seen = np.empty(nearest.shape[1] + 1, np.int32)
    moved = 0
    for turn in range(rounds + 1):
        last = turn == rounds
        surplus = 0
        for slot in range(slots):
            surplus += max(0, size[slot] - target[slot])
        if surplus == 0:
            break
        items = np.empty(n, np.int32)
        goal = np.empty(n, np.int32)
        loss = np.empty(n, np.int32)
        ranks = np.zeros(2 * width + 3, np.int64)
        movable = 0
        for item in range(n):
            here = label[item]
            if here < 0 or size[here] <= target[here]:
                continue
            count = _count_votes(item, width, nearest, close, label, votes, seen)
            best, most, own = -1, 0, max(votes[here], -1)
            for a in range(count):
                slot = seen[a]
                if votes[slot] > most and size[slot] < target[slot]:
                    best, most = slot, votes[slot]
                votes[slot] = 0
            if best >= 0 or last:
                items[movable], goal[movable], loss[movable] = item, best, own - most + width + 1
                ranks[loss[movable] + 1] += 1
                movable += 1
        for a in range(1, len(ranks)):
            ranks[a] += ranks[a - 1]
        ranked = np.empty(movable, np.int32)
        for a in range(movable):
            ranked[ranks[loss[a]]] = a
            ranks[loss[a]] += 1
        room = 0
        for rank in range(movable):
            a = ranked[rank]
            item, best, here = items[a], goal[a], label[items[a]]
            if size[here] <= target[here]:
                continue
            if last and (best < 0 or size[best] >= target[best]):
                while room < slots and size[room] >= target[room]:
                    room += 1
                if room == slots:
                    raise RuntimeError("the blocks have fewer places than items")
                best = room
                for slot in range(room, min(slots, room + _LOOK_AHEAD)):
                    if size[slot] < target[slot] and not _clashes(item, slot, nearest, close, label):
                        best = slot
                        break
            if size[best] < target[best] and (last or not _clashes(item, best, nearest, close, label)):
                size[here] -= 1
                size[best] += 1
                label[item] = best
                moved += 1
    return moved


@njit(cache=True, nogil=True)
def separate(
    order: Int32, batch: Int32, place: Int32, nearest: Int32, close: Int32, tries: int, state: UInt64
) -> int:
    """Exchange items that are too similar to somebody in their batch with random ones, in place.

    ``batch`` (total,) is the batch of each place of the plan, ``place`` (n,) that of each item. An exchange
    is made only if neither side clashes afterwards. Returns how many items found no partner in ``tries``
    draws.
    """
    failed = 0
    for at in range(len(order)):
        item, here = order[at], batch[at]
        if close[item] == 0 or not _clashes(item, here, nearest, close, place):
            continue
        failed += 1
        for _ in range(tries):
            to = _below(state, len(order))
            other, target = order[to], batch[to]
            if (
                target != here
                and not _clashes(item, target, nearest, close, place)
                and not _clashes(other, here, nearest, close, place)
            ):
                order[at], order[to] = other, item
                place[item], place[other] = target, here
                failed -= 1
                break
    return failed


@njit(cache=True, nogil=True)
def count_inside(items: Int32, nearest: Int32, k: int, close: Int32, label: Int32) -> tuple[Int32, Int32]:
    """Of each item given: how many of its first ``k`` neighbours share its label, and how many too close."""
    inside = np.zeros(len(items), np.int32)
    false = np.zeros(len(items), np.int32)
    for row in range(len(items)):
        item = items[row]
        if not 0 <= item < len(label):
            continue
        for a in range(min(max(k, close[item]), nearest.shape[1])):
            other = nearest[item, a]
            if 0 <= other < len(label) and label[other] == label[item]:
                inside[row] += a < k
                false[row] += a < close[item]
    return inside, false


Float64 = NDArray[np.float64]


@njit(cache=True, nogil=True)
def _select(order: Int32, key: Float64, begin: int, end: int, at: int) -> None:
    """Reorder ``order[begin:end]`` so that no key before place ``at`` is larger than one behind it (Hoare 1961)."""
    low, high = begin, end - 1
    while low < high:
        a, b, c = key[order[low]], key[order[(low + high) // 2]], key[order[high]]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while key[order[i]] < pivot:
                i += 1
            while key[order[j]] > pivot:
                j -= 1
            if i <= j:
                kept = order[i]
                order[i] = order[j]
                order[j] = kept
                i += 1
                j -= 1
        if at <= j:
            high = j
        elif at >= i:
            low = i
        else:
            return


@njit(cache=True, nogil=True)
def cut_tiles(order: Int32, x: Float64, y: Float64, bounds: Int64, first: Int64) -> None:
    """Reorder the items of every slide so that each run between two ``bounds`` is compact.

    ``order`` holds the items slide by slide, ``x`` and ``y`` their coordinates by item; ``bounds`` where each tile
    begins in ``order`` (one more for the end), ``first`` the first tile of each slide (one more for the end).
    """
    waiting = np.empty(
        (len(bounds) + 1, 2), np.int64
    )  # pieces that wait to be cut: never more than there are tiles
    for slide in range(len(first) - 1):
        waiting[0, 0], waiting[0, 1] = first[slide], first[slide + 1]
        count = 1
        while count:
            count -= 1
            low, high = waiting[count, 0], waiting[count, 1]
            if high - low < 2:
                continue
            begin, end = bounds[low], bounds[high]
            left, right, bottom, top = np.inf, -np.inf, np.inf, -np.inf
            for place in range(begin, end):
                item = order[place]
                left, right = min(left, x[item]), max(right, x[item])
                bottom, top = min(bottom, y[item]), max(top, y[item])
            # The bound nearest to the middle: every tile keeps its exact size.
            middle = low + 1
            for tile in range(low + 1, high):
                if abs(2 * bounds[tile] - begin - end) < abs(2 * bounds[middle] - begin - end):
                    middle = tile
            _select(order, x if right - left >= top - bottom else y, begin, end, bounds[middle])
            waiting[count, 0], waiting[count, 1] = low, middle
            waiting[count + 1, 0], waiting[count + 1, 1] = middle, high
            count += 2
