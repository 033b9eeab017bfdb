"""Counting who scores above the best relevant item, tile by tile, in both directions from one product.

The score matrix is never stored. A float32 product settles every entry that is clearly above or below its
threshold; the few within the product's rounding error of it are scored again in float64. So ties are ties of
the embeddings themselves, wherever in a tile the duplicates fall, and counts agree with a float64 loop. Where a
query's own key is left out, its score is −∞: below every threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from nearfar.arguments import check_dense, numbers
from nearfar.errors import NearfarError
from nearfar.metrics.relevance import Relevance

__all__ = ["Counts", "Side", "count_ranks", "pair_scores", "product_error", "tie_width"]


# A tile of 256 × 1024 scores and its 0/1 mask are 1 MB each: they stay in the cache of a core.
TILE = (256, 1024)
# Numbers gathered at once when single pairs are scored in float64: 4 MB for each side.
_GATHER = 1 << 19


class Side:
    """One side's embeddings with the factor that brings each row to unit length (or all rows below it).

    Raises ``NearfarError`` naming the rows that hold NaN or infinite numbers. Rows of zeros stay zero: they
    score 0 with everything.
    """

    def __init__(self, rows: object, name: str, normalize: bool) -> None:
        rows = _as_rows(rows, name)
        self.rows = rows.detach().to("cpu") if rows.device.type == "mps" else rows.detach()
        step = max(_GATHER // rows.shape[1], 1)
        norms = torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in self.rows.split(step)])
        bad = (~norms.isfinite()).nonzero().flatten()
        if len(bad):
            shown = ", ".join(str(int(i)) for i in bad[:5]) + (", …" if len(bad) > 5 else "")
            raise NearfarError(
                f"{name} hold NaN or infinite numbers in {len(bad)} of {len(norms)} rows: {shown}; a diverged "
                "model or an empty input makes such rows"
            )
        if normalize:
            self.factor = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
            self.length = (norms > 0).double()
        else:
            # A common factor leaves every order as it is and keeps float32 from overflowing.
            largest = norms.max().clamp_min(1e-300)
            self.factor = (1 / largest).expand(len(norms))
            self.length = norms / largest

    def __len__(self) -> int:
        return len(self.rows)

    def tile(self, at: slice | Tensor, dtype: torch.dtype) -> Float[Tensor, "rows d"]:
        """The scaled rows; a product of two scaled rows is at most 1."""
        wide = self.rows[at].to(torch.promote_types(self.rows.dtype, dtype))
        return (wide * self.factor[at, None].to(wide.dtype)).to(dtype)


def _as_rows(rows: object, name: str) -> Tensor:
    """Embeddings as a matrix of floating point numbers; whole numbers become float64, which holds them exactly."""
    if not isinstance(rows, Tensor):
        if isinstance(rows, np.ndarray) and rows.dtype.kind == "f" and rows.dtype.itemsize <= 8:
            array = np.ascontiguousarray(rows, rows.dtype.newbyteorder("="))
        else:
            array = numbers(name, rows, finite=False)
        rows = torch.as_tensor(array)
    if rows.ndim != 2 or 0 in rows.shape:
        raise NearfarError(
            f"{name} have shape {tuple(rows.shape)}; embeddings are a matrix (items, dimensions)"
        )
    check_dense(name, rows)
    if rows.is_complex():
        raise NearfarError(f"{name} are {rows.dtype}; embeddings are real numbers")
    if not rows.is_floating_point():
        return rows.to(torch.float64)
    return rows.to(torch.float32) if torch.finfo(rows.dtype).bits < 16 else rows


@dataclass
class Counts:
    """For each item of one side: other side's irrelevant items above and level with its best relevant one."""

    best: Float64[Tensor, " n"]
    better: Int64[Tensor, " n"]
    tied: Int64[Tensor, " n"]
    relevant_tied: Int64[Tensor, " n"]

    @classmethod
    def empty(cls, best: Float64[Tensor, " n"]) -> Counts:
        zeros = torch.zeros(len(best), dtype=torch.int64, device=best.device)
        return cls(best, zeros.clone(), zeros.clone(), zeros.clone())


@torch.no_grad()
def count_ranks(
    queries: Side, keys: Side, relevance: Relevance, *, both: bool, tile: tuple[int, int] = TILE
) -> tuple[Counts, Counts | None]:
    """Counts for the queries, and with ``both`` for the keys as well."""
    # Under autocast a float32 product would be taken in half precision.
    with torch.autocast(queries.rows.device.type, enabled=False):
        dense = int(relevance.counts()[0].sum()) > max(
            len(queries) * len(keys) // 32, len(queries) + len(keys)
        )
        return (_count_dense if dense else _count_sparse)(queries, keys, relevance, both, tile)


def _count_sparse(
    queries: Side, keys: Side, relevance: Relevance, both: bool, tile: tuple[int, int]
) -> tuple[Counts, Counts | None]:
    """One float32 product; the relevant pairs are scored beforehand, one by one, in float64."""
    of_query, of_key = relevance.pairs()
    scores = pair_scores(queries, keys, of_query, of_key)
    tie, band = tie_width(queries), product_error(queries)
    sides = [_Half(queries, _best(scores, of_query, len(queries), tie, queries), band)]
    if both:
        sides.append(_Half(keys, _best(scores, of_key, len(keys), tie, keys), band))
    buffer = torch.empty(tile[0] * tile[1], dtype=torch.float32, device=queries.rows.device)
    mask = torch.empty_like(buffer)
    for columns in _slices(len(keys), tile[1]):
        key_tile = keys.tile(columns, torch.float32).T
        for rows in _slices(len(queries), tile[0]):
            shape = rows.stop - rows.start, columns.stop - columns.start
            score = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(queries.tile(rows, torch.float32), key_tile, out=score)
            if relevance.own is not None:
                score[relevance.own_entries(rows, columns)] = -torch.inf
            relevant = None
            for half, own, other, axis in zip(sides, (rows, columns), (columns, rows), (1, 0), strict=False):
                lines = half.count(score, own, axis, mask[: score.numel()].view(shape))
                if not len(lines):
                    continue
                relevant = relevance.tile(rows, columns) if relevant is None else relevant
                picked, known = (x[lines] if axis == 1 else x[:, lines].T for x in (score, relevant))
                pair = (queries, keys) if axis == 1 else (keys, queries)
                half.settle(picked, known, lines + own.start, other, pair, tie)
    return sides[0].counts, sides[1].counts if both else None


class _Half:
    """One direction of the sparse pass: thresholds around the best relevant score, and the counts so far."""

    def __init__(self, side: Side, counts: Counts, band: float) -> None:
        self.counts = counts
        self.above = (counts.best + band * side.length).float()
        self.below = (counts.best - band * side.length).float()

    def count(self, score: Tensor, own: slice, axis: int, mask: Tensor) -> Int64[Tensor, " lines"]:
        """Add the entries clearly above; return the rows of ``own`` with undecided entries."""
        above, below = self.above[own], self.below[own]
        if axis == 1:
            above, below = above[:, None], below[:, None]
        # Comparisons written as 0.0 and 1.0 let matrix-vector products do the sums: exact below 2^24.
        clearly = _sums(torch.gt(score, above, out=mask), axis)
        at_least = _sums(torch.ge(score, below, out=mask), axis)
        self.counts.better[own] += clearly.long()
        return (at_least != clearly).nonzero().flatten()

    def settle(
        self, score: Tensor, relevant: Tensor, at: Tensor, other: slice, sides: tuple[Side, Side], tie: float
    ) -> None:
        """Decide the undecided irrelevant entries of the rows ``at`` in float64."""
        near = (score >= self.below[at, None]) & (score <= self.above[at, None]) & ~relevant
        number = int(near.sum())
        if number * 64 > near.numel():
            # So many are only found near collapse; then a whole product is cheaper than its entries.
            excess = sides[0].tile(at, torch.float64) @ sides[1].tile(other, torch.float64).T
            excess -= self.counts.best[at, None]
            width = tie * sides[0].length[at, None]
            self.counts.better.index_add_(0, at, ((excess > width) & near).sum(1))
            self.counts.tied.index_add_(0, at, ((excess.abs() <= width) & near).sum(1))
        elif number:
            line, column = near.nonzero().unbind(1)
            at = at[line]
            excess = pair_scores(*sides, at, column + other.start) - self.counts.best[at]
            width = tie * sides[0].length[at]
            self.counts.better.index_add_(0, at, (excess > width).long())
            self.counts.tied.index_add_(0, at, (excess.abs() <= width).long())


def _count_dense(
    queries: Side, keys: Side, relevance: Relevance, both: bool, tile: tuple[int, int]
) -> tuple[Counts, Counts | None]:
    """Many relevant pairs, as with classes: two float64 products, the first for the best relevant scores."""
    device, tie = queries.rows.device, tie_width(queries)

    def tiles() -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        for columns in _slices(len(keys), tile[1]):
            key_tile = keys.tile(columns, torch.float64).T
            for rows in _slices(len(queries), tile[0]):
                score = queries.tile(rows, torch.float64) @ key_tile
                if relevance.own is not None:
                    score[relevance.own_entries(rows, columns)] = -torch.inf
                yield rows, columns, score, relevance.tile(rows, columns)

    best = [torch.full((len(s),), -torch.inf, dtype=torch.float64, device=device) for s in (queries, keys)]
    for rows, columns, score, relevant in tiles():
        of_relevant = score.masked_fill(~relevant, -torch.inf)
        best[0][rows] = torch.maximum(best[0][rows], of_relevant.amax(1))
        best[1][columns] = torch.maximum(best[1][columns], of_relevant.amax(0))
    counts = [Counts.empty(b) for b in best[: 2 if both else 1]]
    for rows, columns, score, relevant in tiles():
        for count, own, side, axis in zip(counts, (rows, columns), (queries, keys), (1, 0), strict=False):
            own_best, width = count.best[own], tie * side.length[own]
            if axis == 1:
                own_best, width = own_best[:, None], width[:, None]
            excess = score - own_best
            level = excess.abs() <= width
            count.better[own] += ((excess > width) & ~relevant).sum(axis)
            count.tied[own] += (level & ~relevant).sum(axis)
            count.relevant_tied[own] += (level & relevant).sum(axis)
    return counts[0], counts[1] if both else None


def _best(scores: Tensor, owner: Tensor, n: int, tie: float, side: Side) -> Counts:
    """Each item's best relevant score, and how many relevant ones share it."""
    best = torch.full((n,), -torch.inf, dtype=torch.float64, device=scores.device)
    best.scatter_reduce_(0, owner, scores, "amax")
    counts = Counts.empty(best)
    level = scores >= best[owner] - tie * side.length[owner]
    counts.relevant_tied.index_add_(0, owner, level.long())
    return counts


def pair_scores(first: Side, second: Side, i: Tensor, j: Tensor) -> Float64[Tensor, " pairs"]:
    scores = torch.empty(len(i), dtype=torch.float64, device=i.device)
    step = max(_GATHER // first.rows.shape[1], 1)
    for part in _slices(len(i), step):
        rows = first.tile(i[part], torch.float64), second.tile(j[part], torch.float64)
        scores[part] = (rows[0] * rows[1]).sum(1)
    return scores


def product_error(side: Side) -> float:
    """A bound on the float32 product's error for rows of at most unit length, twenty deviations wide.

    Rounding accumulates like a random walk over the dimensions. Faster and coarser products that the user has
    allowed (TF32, bfloat16) round the inputs first; the band widens, and more entries go to float64.
    """
    unit = 2.0**-24
    of_inputs = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    return unit * (8 * side.rows.shape[1] ** 0.5 + 8) + of_inputs


def tie_width(side: Side) -> float:
    """Scores closer than float64 can tell apart are equal."""
    return 2.0**-51 * side.rows.shape[1]


def _sums(mask: Float[Tensor, "r c"], axis: int) -> Float[Tensor, " n"]:
    ones = mask.new_ones(mask.shape[axis])
    return mask @ ones if axis == 1 else ones @ mask


def _slices(n: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
