"""Compiled loops of ``place_kernel``: counting the scores of a tile above many thresholds, and sums of resamples."""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["count_exactly", "count_rows", "hide", "order_rows", "pair_products", "sum_resamples", "turn"]

# Up to so many thresholds a row is compared with one after the other, sixteen scores at a time; beyond, every score
# is looked up in a table of the thresholds.
_FEW = 64


@njit(cache=True, nogil=True)
def hide(score: np.ndarray, row: int, column: int, starts: np.ndarray, columns: np.ndarray) -> None:
    """Set what is no irrelevant candidate to −∞: entries of CSR rows from ``row`` on, under the tile at ``column``."""
    width = score.shape[1]
    for i in range(score.shape[0]):
        low, high = starts[row + i], starts[row + i + 1]
        last = high
        while low < high:
            middle = (low + high) >> 1
            if columns[middle] < column:
                low = middle + 1
            else:
                high = middle
        while low < last and columns[low] < column + width:
            score[i, columns[low] - column] = -np.inf
            low += 1


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz"})
def _compare(scores: np.ndarray, high: np.float32, low: np.float32) -> tuple[np.float32, np.float32]:
    """How many scores are above ``high``, and how many at least ``low``: in floats, exact below 2^24."""
    above, at_least = np.float32(0), np.float32(0)
    for j in range(scores.shape[0]):
        s = scores[j]
        above += np.float32(1) if s > high else np.float32(0)
        at_least += np.float32(1) if s >= low else np.float32(0)
    return above, at_least


@njit(cache=True, nogil=True)
def count_rows(
    score: np.ndarray,
    row: int,
    column: int,
    starts: np.ndarray,
    high: np.ndarray,
    low: np.ndarray,
    above: np.ndarray,
    near: np.ndarray,
    used: int,
    most: int,
) -> int:
    """Add the scores clearly above each threshold of the rows to ``above``; list those within its band in ``near``.

    Thresholds of a row fall from ``starts[row]`` on. ``near`` gets (threshold, column) from place ``used`` on. Returns
    how many are listed then, or −1 where the tile has more than ``most``: nothing is counted then.
    """
    rows, width = score.shape
    first, last = starts[row], starts[row + rows]
    counts = np.zeros(last - first, dtype=np.int64)
    begin = used
    for i in range(rows):
        start, stop = starts[row + i], starts[row + i + 1]
        scores = score[i]
        if stop - start <= _FEW:
            for g in range(start, stop):
                clearly, at_least = _compare(scores, high[g], low[g])
                counts[g - first] = np.int64(clearly)
                if at_least != clearly:
                    for j in range(width):
                        if low[g] <= scores[j] <= high[g]:
                            if used - begin >= most:
                                return -1
                            near[used, 0], near[used, 1] = g, column + j
                            used += 1
            continue
        number = stop - start
        floor, top = low[stop - 1], high[start]
        cells = 2 * number
        scale = cells / max(np.float64(top) - np.float64(floor), 1e-30)
        # table[c]: how many thresholds, counted from the lowest, lie below cell c
        table = np.zeros(cells + 2, dtype=np.int64)
        for q in range(number):
            at = int((np.float64(high[stop - 1 - q]) - floor) * scale)
            table[min(max(at, 0), cells) + 1] += 1
        for c in range(cells + 1):
            table[c + 1] += table[c]
        passed = np.zeros(number + 1, dtype=np.int64)
        for j in range(width):
            s = scores[j]
            if s < floor:
                continue
            if s > top:
                passed[number] += 1
                continue
            cell = min(max(int((np.float64(s) - floor) * scale), 0), cells)
            left, right = table[cell], table[cell + 1]
            while left < right:  # the first threshold that the score is not clearly above
                middle = (left + right) >> 1
                if high[stop - 1 - middle] < s:
                    left = middle + 1
                else:
                    right = middle
            passed[left] += 1
            while left < number and low[stop - 1 - left] <= s:
                if used - begin >= most:
                    return -1
                near[used, 0], near[used, 1] = stop - 1 - left, column + j
                used += 1
                left += 1
        total = 0
        for q in range(number, 0, -1):  # a score above the q lowest is above each of them
            total += passed[q]
            counts[stop - q - first] = total
    for k in range(last - first):
        above[first + k] += counts[k]
    return used


@njit(cache=True, nogil=True)
def count_exactly(
    score: np.ndarray,
    row: int,
    starts: np.ndarray,
    best: np.ndarray,
    width: np.ndarray,
    above: np.ndarray,
    level: np.ndarray,
) -> None:
    """Add the scores above and level with each threshold, from scores in float64; a row has one width."""
    for i in range(score.shape[0]):
        start, stop = starts[row + i], starts[row + i + 1]
        number = stop - start
        passed = np.zeros(number + 1, dtype=np.int64)
        for j in range(score.shape[1]):
            s = score[i, j]
            left, right = 0, number
            while left < right:  # how many thresholds, counted from the lowest, the score is above
                middle = (left + right) >> 1
                g = stop - 1 - middle
                if s - best[g] > width[g]:
                    left = middle + 1
                else:
                    right = middle
            passed[left] += 1
            while left < number and s - best[stop - 1 - left] >= -width[stop - 1 - left]:
                level[stop - 1 - left] += 1
                left += 1
        total = 0
        for q in range(number, 0, -1):
            total += passed[q]
            above[stop - q] += total


@njit(cache=True, nogil=True)
def order_rows(starts: np.ndarray, scores: np.ndarray, order: np.ndarray) -> None:
    """The places of the scores of each row, from the highest down."""
    for i in range(starts.shape[0] - 1):
        start, stop = starts[i], starts[i + 1]
        if stop - start == 1:
            order[start] = start
        elif stop > start:
            order[start:stop] = start + np.argsort(-scores[start:stop], kind="mergesort")


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})
def pair_products(
    first: np.ndarray,
    second: np.ndarray,
    factors: np.ndarray,
    others: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    scores: np.ndarray,
) -> None:
    """The products of pairs of scaled rows in float64; equal rows give equal products."""
    for p in range(i.shape[0]):
        a, b = i[p], j[p]
        total = 0.0
        for d in range(first.shape[1]):
            total += (np.float64(first[a, d]) * factors[a]) * (np.float64(second[b, d]) * others[b])
        scores[p] = total


@njit(cache=True, nogil=True)
def turn(score: np.ndarray, turned: np.ndarray) -> None:
    """Write the transposed tile, sixteen columns at a time: a line of the cache is read once."""
    rows, columns = score.shape
    for start in range(0, columns, 16):
        stop = min(start + 16, columns)
        for i in range(rows):
            for j in range(start, stop):
                turned[j, i] = score[i, j]


@njit(cache=True, nogil=True)
def sum_resamples(drawn: np.ndarray, scores: np.ndarray, sums: np.ndarray) -> None:
    """For each row of drawn items the sum of every column of their scores."""
    for b in range(drawn.shape[0]):
        for i in range(drawn.shape[1]):
            item = drawn[b, i]
            for k in range(scores.shape[1]):
                sums[b, k] += scores[item, k]
