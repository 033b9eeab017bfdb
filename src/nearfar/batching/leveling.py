"""Placing hard and easy batches so that every stretch of an epoch is equally hard."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["building_sequence", "even_out"]


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
