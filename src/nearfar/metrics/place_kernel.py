"""Counting the irrelevant items above and level with every relevant one, tile by tile, in both directions at once.

As in ``rank_kernel`` the score matrix is never stored: a float32 product settles what is clearly above or below a
threshold, and what is within its rounding error is scored again in float64. Here each relevant item is a threshold,
items whose scores float64 cannot tell apart share one, and the relevant items themselves are struck out of the tile, so
that irrelevant ones are counted alone. Where there are more relevant pairs than fit into memory, items are taken in
blocks, one direction after the other. Products are taken where the embeddings are, counts on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.metrics.rank_kernel import TILE, Side, pair_scores, product_error, tie_width
from nearfar.metrics.ranks import Places
from nearfar.metrics.relevance import Relevance, places_in_rows

__all__ = ["place_relevant"]

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
        from nearfar.metrics._place_kernels import pair_products

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
        from nearfar.metrics._place_kernels import order_rows

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
        from nearfar.metrics._place_kernels import count_exactly, count_rows

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
        from nearfar.metrics._place_kernels import hide

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
    from nearfar.metrics._place_kernels import turn

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
