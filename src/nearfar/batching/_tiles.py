"""The compiled loop behind compact tiles: points cut in half again and again, each time across their longer side.

In a file of its own, with all that it calls, for the reason that ``_kernels.py`` gives.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["cut_tiles"]

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
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
