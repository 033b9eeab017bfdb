"""The kernel for the partners of one direction: a query's sums are complete with its row of tiles.

So its derivatives are taken at once, from tiles that are still in memory: three products where ``kernel``, which has to
know the sums of the columns too, computes each tile twice and needs four. What has to be kept for that are the tiles of
some rows. Backward has nothing left to do but to multiply by what comes from above.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.masks import Mask
from nearfar.contrast.numerics import (
    Context,
    full_precision,
    no_second_derivative,
    through_length_,
    unit_and_length,
)
from nearfar.contrast.positives import MASKED_LOGIT, is_unmasked
from nearfar.contrast.running_sums import Direction, Statistics, Step
from nearfar.contrast.tiles import TILE, finite

__all__ = ["one_direction_loss"]

#: pairs whose logits are kept at a time (16 MB), in tiles as wide as those of the kernel
MAX_KEPT_LOGITS = 1 << 22
#: rows at a time; with fewer, the products are slow
MIN_ROWS = 128
#: up to this logit no shift is needed: neither sums nor what they are divided by come near the ends of the range
UNSHIFTED_MAX = 40.0


def one_direction_loss(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    scale: Float[Tensor, ""],
    normalize: bool,
    mask: Mask | None = None,
) -> tuple[Float[Tensor, ""], Step] | None:
    """The mean loss of ``softmax_loss`` with ``OwnPair``, queries ``a``, and what its record is made of.

    None where that is slower: off the CPU, or where the keys are so many that too few rows of them
    could be kept. ``normalize`` brings rows to unit length first.
    """
    n, m = len(a), len(b)
    if a.device.type != "cpu" or not 0 < n <= m or MAX_KEPT_LOGITS // m < MIN_ROWS:
        return None
    learns = torch.is_grad_enabled()
    needed = _NeededGrads(*(learns and x.requires_grad for x in (a, b, scale)))
    numbers = _QueryNumbers(
        torch.empty_like(a[:, 0]), torch.empty_like(a[:, 0]), torch.empty_like(a[:, 0]), []
    )
    loss: Tensor = _OneDirection.apply(a, b, scale, normalize, mask, needed, numbers)
    return loss, Step(loss.detach(), partial(_directions, numbers, m, mask is not None), scale.detach())


class _NeededGrads(NamedTuple):
    """Derivatives that backward will need."""

    a: bool
    b: bool
    scale: bool


class _QueryNumbers(NamedTuple):
    """Of each query: its loss, the log-sum and the largest logit of the rest; how many a mask has left, row by row."""

    losses: Float[Tensor, " n"]
    rest: Float[Tensor, " n"]
    hardest: Float[Tensor, " n"]
    left: list[Tensor]


def _directions(numbers: _QueryNumbers, keys: int, masked: bool) -> list[Direction]:
    candidates: Tensor | float = torch.cat(numbers.left) + 1.0 if masked else float(keys)
    statistics = Statistics(numbers.hardest, candidates, 1.0, 1.0, 0.0, float(keys) - candidates)
    return [Direction(numbers.losses, numbers.rest, statistics)]


class _OneDirection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        normalize: bool,
        mask: Mask | None,
        needed: _NeededGrads,
        numbers: _QueryNumbers,
    ) -> Tensor:
        lengths: tuple[Tensor, Tensor] | None = None
        largest = scale.item()
        if normalize:
            (a, long_a), (b, long_b) = unit_and_length(a), unit_and_length(b)
            lengths = long_a, long_b
        else:
            largest *= math.prod(torch.linalg.vector_norm(x, dim=1).amax().item() for x in (a, b))
        with full_precision(a.device):  # a vecdot is a product too
            by_a, by_b = _walk(a, b, scale, mask, needed, numbers, plain=largest * 1.001 < UNSHIFTED_MAX)
            outcome: list[Tensor | None] = [None, None, None]
            share = 1.0 / len(a)
            if needed.scale and by_a is not None:
                outcome[2] = torch.dot(a.flatten(), by_a.flatten()) * share
            factor = scale * share
            for k, (by_x, x, is_needed) in enumerate(((by_a, a, needed.a), (by_b, b, needed.b))):
                if by_x is None or not is_needed:
                    continue
                if lengths is None:
                    by_x.mul_(factor)
                else:
                    through_length_(by_x, x, lengths[k], factor)
                outcome[k] = by_x
        ctx.save_for_backward(*outcome)
        return numbers.losses.mean()

    @staticmethod
    def backward(ctx: Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        return (
            *(None if by_x is None else by_x * upstream[0] for by_x in ctx.saved_tensors),
            None,
            None,
            None,
            None,
        )


def _walk(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    mask: Mask | None,
    needed: _NeededGrads,
    numbers: _QueryNumbers,
    plain: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Losses of all queries, row of tiles by row of tiles; of n times the mean loss the derivatives by scale · a and
    scale · b, as far as they are needed."""
    n, m = len(a), len(b)
    height, width = min(MAX_KEPT_LOGITS // m, TILE[0], n), min(TILE[1], m)
    by_a = torch.empty_like(a) if needed.a or needed.scale else None
    by_b = torch.zeros_like(b) if needed.b else None
    columns = [slice(left, min(left + width, m)) for left in range(0, m, width)]
    keys, into = b.split(width), None if by_b is None else by_b.split(width)
    room, spare = a.new_empty(len(columns), height * width), a.new_empty(height, a.shape[1])
    for top, queries in zip(range(0, n, height), a.split(height), strict=True):
        rows = slice(top, top + len(queries))
        scaled = torch.mul(queries, scale, out=spare[: len(queries)])
        tiles = [
            room[k, : len(queries) * len(key)].view(len(queries), len(key)) for k, key in enumerate(keys)
        ]
        own, shift = a.new_empty(len(queries)), None
        for tile, key, at in zip(tiles, keys, columns, strict=True):
            torch.mm(scaled, key.T, out=tile)
            _take_own(tile, own, rows, at)
            if mask is not None:
                tile.add_(mask.tile(rows, at).to(tile), alpha=MASKED_LOGIT)
        if mask is not None:
            numbers.left.append(torch.stack([is_unmasked(tile).sum(1) for tile in tiles]).sum(0).to(a.dtype))
        if not plain:
            shift = finite(torch.stack([tile.amax(1) for tile in tiles]).amax(0))
        total, peak = a.new_zeros(len(queries)), a.new_zeros(len(queries))
        for tile in tiles:
            if shift is not None:
                tile.sub_(shift.unsqueeze(1))
            tile.exp_()
            total += tile.sum(1)
            torch.maximum(peak, tile.amax(1), out=peak)
        rest, hardest = total.log(), peak.log()
        if shift is not None:
            rest, hardest = rest.add_(shift), hardest.add_(shift)
        gap = rest - own
        numbers.rest[rows], numbers.hardest[rows] = rest, hardest
        # Beyond the threshold softplus gives its argument: at 50 that is exact in float64 too.
        numbers.losses[rows] = torch.nn.functional.softplus(gap, threshold=50.0)
        missed = gap.sigmoid_().unsqueeze(1)  # the probability that is not the partner's
        weight = torch.where(total > 0, missed[:, 0] / total, 0.0).unsqueeze(1)
        if by_a is not None:
            mine = by_a[rows]
            for k, (tile, key) in enumerate(zip(tiles, keys, strict=True)):
                torch.mm(tile, key, out=mine) if k == 0 else mine.addmm_(tile, key)
            mine.mul_(weight).addcmul_(b[rows], missed, value=-1)
        if by_b is not None and into is not None:
            weighted = torch.mul(queries, weight, out=spare[: len(queries)])
            for tile, back in zip(tiles, into, strict=True):
                back.addmm_(tile.T, weighted)
            by_b[rows].addcmul_(queries, missed, value=-1)
    return by_a, by_b


def _take_own(tile: Tensor, own: Tensor, rows: slice, columns: slice) -> None:
    """The partners' logits out of a tile, where they are hidden from now on."""
    first, last = max(rows.start, columns.start), min(rows.stop, columns.stop)
    if first < last:
        part = slice(first - rows.start, last - rows.start)
        diagonal = tile[part, first - columns.start : last - columns.start].diagonal()
        own[part] = diagonal
        diagonal.fill_(MASKED_LOGIT)
