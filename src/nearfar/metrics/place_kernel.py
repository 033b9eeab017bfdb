"""Counting the irrelevant items above and level with every relevant one, tile by tile, in both directions at once.

As in ``rank_kernel`` the score matrix is never stored: a float32 product settles what is clearly above or below a
threshold, and what is within its rounding error is scored again in float64. Here each relevant item is a threshold,
items whose scores float64 cannot tell apart share one, and the relevant items themselves are struck out of the tile, so
that irrelevant ones are counted alone. Where there are more relevant pairs than fit into memory, items are taken in
blocks, one direction after the other. Products are taken where the embeddings are, counts on the CPU.

Compiled loops of ``place_kernel``: counting the scores of a tile above many thresholds, and sums of resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from nearfar.metrics.rank_kernel import TILE, Side, pair_scores, product_error, tie_width
from nearfar.metrics.ranks import Places
from nearfar.metrics.relevance import Relevance, places_in_rows

__all__ = [
    "count_exactly",
    "count_rows",
    "hide",
    "order_rows",
    "pair_products",
    "place_relevant",
    "sum_resamples",
    "turn",
]


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


#: relevant pairs that are worked on together: some 200 MB
PAIRS = 1 << 22
# Undecided scores that are collected before they are scored again.
_NEAR = 1 << 17
# Numbers of a side that are kept scaled in float32, instead of being scaled for each tile: 64 MB.
_KEPT = 1 << 24

Ints = NDArray[np.int64]
#: what is called with the direction (0: queries, 1: keys), the items of the block, and the places of their partners
Consume = Callable[[int, Ints, Places], None]


@torch.no_grad()
def place_relevant(
    queries: Side,
    keys: Side,
    relevance: Relevance,
    consume: Consume,
    *,
    both: bool,
    tile: tuple[int, int] = TILE,
    pairs: int = PAIRS,
) -> None:
    """Give ``consume`` the places of the relevant keys of every query that has any, and with ``both`` of every key's
    queries, in blocks."""
    with torch.autocast(queries.rows.device.type, enabled=False):
        numbers = relevance.counts()
        candidates = [each.cpu().numpy() for each in relevance.candidates()]
        if int(numbers[0].sum()) <= pairs:
            of_query, of_key = (x.cpu() for x in relevance.pairs())
            grades = None if relevance.grades is None else relevance.grades.cpu()
            own = _own_pairs(relevance)
            scores = _pair_scores(queries, keys, of_query, of_key)
            whole = slice(0, len(queries)), slice(0, len(keys))
            sides = [_Direction(queries, keys, of_query, of_key, scores, grades, whole[0], own)]
            if both:
                own = own[1], own[0]
                sides.append(_Direction(keys, queries, of_key, of_query, scores, grades, whole[1], own))
            _count(queries, keys, sides, tile)
            for direction, half in enumerate(sides):
                half.give(direction, consume, candidates[direction])
            return
        for direction in range(2 if both else 1):
            first, second = (queries, keys) if direction == 0 else (keys, queries)
            for part in _blocks(numbers[direction].cpu().numpy(), pairs):
                rows, columns, grades = _pairs_of(relevance, direction, part)
                own = _own_pairs(relevance)
                own = own if direction == 0 else (own[1], own[0])
                scores = _pair_scores(first, second, rows, columns)
                half = _Direction(first, second, rows, columns, scores, grades, part, own)
                _count(first, second, [half], tile)
                half.give(direction, consume, candidates[direction])


def _blocks(numbers: Ints, most: int) -> Iterator[slice]:
    """Consecutive items with at most so many pairs together, at least one item each."""
    ends = np.cumsum(numbers)
    start = 0
    while start < len(numbers):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + most, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _own_pairs(relevance: Relevance) -> tuple[Tensor, Tensor]:
    if relevance.own is None:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none
    rows = (relevance.own >= 0).nonzero().flatten()
    return rows.cpu(), relevance.own[rows].cpu()


def _pairs_of(relevance: Relevance, direction: int, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """The relevant pairs of some items, (item, partner), without a list of all."""
    if relevance.labels is not None:
        of_items, of_partners = relevance.labels[direction], relevance.labels[1 - direction]
        order = torch.argsort(of_partners, stable=True)
        ordered, wanted = of_partners[order], of_items[part]
        first = torch.searchsorted(ordered, wanted)
        rows, within = places_in_rows(torch.searchsorted(ordered, wanted, right=True) - first)
        columns, rows = order[first[rows] + within].cpu(), rows.cpu() + part.start
        if relevance.own is not None:
            own = relevance.own.cpu()
            others = columns != own[rows] if direction == 0 else rows != own[columns]
            rows, columns = rows[others], columns[others]
        return rows, columns, None
    pairs = [x.cpu() for x in relevance.pairs()]
    items, partners = pairs[direction], pairs[1 - direction]
    kept = ((items >= part.start) & (items < part.stop)).nonzero().flatten()
    grades = None if relevance.grades is None else relevance.grades.cpu()[kept]
    return items[kept], partners[kept], grades


def _pair_scores(first: Side, second: Side, i: Tensor, j: Tensor) -> NDArray[np.float64]:
    """The scores of single pairs in float64."""
    rows = first.rows, second.rows
    if all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) for x in rows):
        scores = np.empty(len(i))
        factors = first.factor.contiguous().numpy(), second.factor.contiguous().numpy()
        a, b = (x.contiguous().numpy() for x in rows)
        pair_products(a, b, factors[0], factors[1], i.numpy(), j.numpy(), scores)
        return scores
    device = rows[0].device
    of_pairs: NDArray[np.float64] = pair_scores(first, second, i.to(device), j.to(device)).cpu().numpy()
    return of_pairs


class _Direction:
    """The thresholds of some items of one side, and the counts of the other side's irrelevant ones above them."""

    def __init__(
        self,
        side: Side,
        others: Side,
        rows: Tensor,
        columns: Tensor,
        scores: NDArray[np.float64],
        grades: Tensor | None,
        part: slice,
        own: tuple[Tensor, Tensor],
    ) -> None:
        self.side, self.others, self.part = side, others, part

        row, column, n = rows.numpy() - part.start, columns.numpy(), part.stop - part.start
        place = row * len(others) + column
        if (np.diff(place) < 0).any():  # from the other side's list
            by_row = np.argsort(place, kind="stable")
            row, column, scores = row[by_row], column[by_row], scores[by_row]
            grades = None if grades is None else grades[torch.from_numpy(by_row)]
        starts = _starts(row, n)
        # float64 scores of one item rise by more than this where they differ
        tie = tie_width(side) * side.length[part].cpu().numpy()
        graded = None if grades is None else grades.numpy()
        order = np.empty_like(row)
        order_rows(starts, scores, order)
        scores = scores[order]
        begins = np.ones(len(row), dtype=bool)
        begins[1:] = (row[1:] != row[:-1]) | (scores[:-1] - scores[1:] > tie[row[1:]])
        tied = np.cumsum(begins) - 1
        if graded is not None:  # falling within each tie
            graded = graded[order]
            graded = graded[np.lexsort((-graded, tied))]
        self.grades = graded
        self.size = np.bincount(tied).astype(np.int64)
        self.row, self.best = row[begins], scores[begins]
        self.starts = _starts(self.row, n)
        self.width = tie[self.row]
        band = product_error(side) * side.length[part].cpu().numpy()[self.row]
        self.high = (self.best + band).astype(np.float32)
        self.low = (self.best - band).astype(np.float32)
        self.above, self.level = np.zeros_like(self.row), np.zeros_like(self.row)
        self.near, self.used = np.empty((_NEAR, 2), dtype=np.int64), 0
        mine = (own[0] >= part.start) & (own[0] < part.stop)
        struck, itself = own[0][mine].numpy() - part.start, own[1][mine].numpy()
        by_row = np.lexsort((itself, struck))
        self.struck = (starts, column), (_starts(struck, n), itself[by_row])

    def count(self, score: NDArray[np.float32], row: int, column: int, exact: Callable[[], Tensor]) -> None:
        """Add a tile whose rows are this side's, counted from ``row`` of the block; ``exact`` gives it in float64."""

        most = max(score.size // 8, 64)
        if self.used + most > _NEAR:
            self.settle()
        if most <= _NEAR:
            used = count_rows(
                score, row, column, self.starts, self.high, self.low, self.above, self.near, self.used, most
            )
            if used >= 0:
                self.used = used
                return
        # So many undecided scores are there only near collapse, where a whole product is cheaper than its entries.
        scores = np.ascontiguousarray(exact().cpu().numpy())
        self.hide(scores, row, column)
        count_exactly(scores, row, self.starts, self.best, self.width, self.above, self.level)

    def hide(self, score: np.ndarray, row: int, column: int) -> None:
        """Strike out of a tile what is no irrelevant candidate: relevant items, and a query itself."""

        for starts, columns in self.struck:
            if len(columns):
                hide(score, row, column, starts, columns)

    def settle(self) -> None:
        """Decide the listed scores in float64."""
        tie, column = self.near[: self.used].T.copy()
        self.used = 0
        if not len(tie):
            return
        i, j = (torch.from_numpy(x) for x in (self.row[tie] + self.part.start, column))
        excess = _pair_scores(self.side, self.others, i, j) - self.best[tie]
        number = len(self.above)
        self.above += np.bincount(tie[excess > self.width[tie]], minlength=number)
        self.level += np.bincount(tie[np.abs(excess) <= self.width[tie]], minlength=number)

    def give(self, direction: int, consume: Consume, candidates: Ints) -> None:
        """Hand over the places of the items that have partners."""
        self.settle()
        items = np.flatnonzero(np.diff(self.starts))
        if len(items):
            at = items + self.part.start
            starts = np.concatenate([self.starts[items], self.starts[-1:]])
            consume(
                direction,
                at,
                Places(starts, self.above, self.level, self.size, candidates[at], self.grades),
            )


def _count(first: Side, second: Side, sides: list[_Direction], tile: tuple[int, int]) -> None:
    """All tiles of one product, for the rows' side and, if there is one, the columns'."""

    part, device = sides[0].part, first.rows.device
    buffer = torch.empty(tile[0] * tile[1], dtype=torch.float32, device=device)
    turned = np.empty(tile[0] * tile[1], dtype=np.float32)
    few = (part.stop - part.start) * first.rows.shape[1] <= _KEPT
    kept = first.tile(part, torch.float32) if few else None
    for left in range(0, len(second), tile[1]):
        columns = slice(left, min(left + tile[1], len(second)))
        right = second.tile(columns, torch.float32).T
        for top in range(part.start, part.stop, tile[0]):
            rows = slice(top, min(top + tile[0], part.stop))
            place = top - part.start
            lines = (
                first.tile(rows, torch.float32)
                if kept is None
                else kept[place : place + rows.stop - rows.start]
            )
            height, breadth = rows.stop - top, columns.stop - left
            out = buffer[: height * breadth].view(height, breadth)
            torch.mm(lines, right, out=out)
            score = out.cpu().numpy()
            sides[0].hide(score, place, left)

            def exact(rows: slice = rows, columns: slice = columns) -> Tensor:
                return first.tile(rows, torch.float64) @ second.tile(columns, torch.float64).T

            sides[0].count(score, place, left, exact)
            if len(sides) > 1:
                other = turned[: score.size].reshape(breadth, height)
                turn(score, other)
                sides[1].count(other, left, top, lambda exact=exact: exact().T)  # type: ignore[misc]


def _starts(rows: Ints, n: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]).astype(np.int64)
