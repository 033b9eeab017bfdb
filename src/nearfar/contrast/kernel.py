"""The one computation behind every softmax loss: log-sum-exps over tiles of a product that is never stored.

For each query the candidates fall into positives and the rest. With

    rest      log Σ exp(s_ij) over candidates that are no positives,
    positive  log Σ exp(s_ij) over positives,
    excess    positive - Σ_j Q_ij s_ij             (sum outside the logarithm)
              positive - log Σ_j W_ij exp(s_ij)    (sum inside it),

every softmax loss is ``softplus(rest - positive) + excess``: how much probability the rest takes, and how unevenly the
positives share theirs. The first term has no cancellation near convergence, where ``log_sum - positive`` loses all its
digits; the second is exactly 0 for a single positive. ``expected`` is the mean logit under the softmax.

Backward computes each tile again from the embeddings and these few numbers per query.

The pairwise sigmoid over the same tiles: every pair is a question of its own, positive or not.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.logit_grads import LogitGrads, positive_logit_grads, tile_logit_grads
from nearfar.contrast.masks import Mask, is_directed, is_soft
from nearfar.contrast.numerics import (
    Context,
    full_precision,
    lengths_of,
    no_second_derivative,
    through_length_,
    unit_and_length,
)
from nearfar.contrast.positives import PositiveLogits, Workspace, is_unmasked
from nearfar.contrast.running_sums import RunningSums, Statistics
from nearfar.contrast.targets import Target
from nearfar.contrast.tiles import (
    Scattered,
    Setting,
    Tile,
    common_shift,
    finite,
    tile_size,
    tiles,
    top_of,
    within,
)
from nearfar.errors import NearfarError

__all__ = ["LogSums", "accumulate_tile", "query_views", "sigmoid_sums"]


#: rows of a tile whose exponentials are read for their sums while they are near
STRIP = 512

Side = TypeVar("Side")


class _SumsContext(Context):
    setting: Setting
    kept: list[Tile]
    sides: list[RunningSums]
    alone: Scattered | None
    walked: bool  # queries were brought to unit length tile by tile
    space: Workspace


class LogSums(torch.autograd.Function):
    """``rest``, ``positive``, ``excess``, ``expected`` of the queries and, with ``both``, of the keys as queries."""

    @staticmethod
    def forward(
        ctx: _SumsContext,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        setting: Setting,
        statistics: list[Statistics],
    ) -> tuple[Tensor | None, ...]:
        lengths: list[Tensor] = []
        walked: Tensor | None = None  # lengths of queries that are brought to unit length on the walk
        if setting.normalize:
            same = a is b
            walked = None if same or setting.keep else lengths_of(a)
            length = walked
            if length is None:
                a, length = unit_and_length(a)
            b, other = (a, length) if same else unit_and_length(b)
            lengths = [length, other]
        space = Workspace(a, setting.size)
        without = int(setting.without_self)
        sides = [RunningSums(len(a), len(b) - without, a, setting)]
        if setting.both:
            sides.append(RunningSums(len(b), len(a) - without, a, setting))
        alone = Scattered.of(setting.target, setting.offset, setting.both, setting.size, a)
        kept: list[Tile] = []
        with full_precision(a.device):
            for tile in tiles(a, b, scale, setting, space, alone, walked):
                accumulate_tile(tile, sides, space)
                if setting.keep:
                    kept.append(tile)
            if alone is not None:
                block = alone.as_positives(setting.without_self)
                for axis, side in zip((1, 0), sides, strict=False):
                    side.add_positives(block, slice(0, side.n), axis)
            results = [side.results() for side in sides]
        statistics.extend(side.statistics() for side in sides)
        flat = [value for result in results for value in result]
        ctx.save_for_backward(a, b, scale, *flat, *lengths)
        ctx.setting, ctx.kept, ctx.sides, ctx.alone = setting, kept, sides, alone
        ctx.walked = walked is not None
        ctx.space = space  # fresh memory for the same tiles would cost page faults
        ctx.set_materialize_grads(False)
        return tuple(flat)

    @staticmethod
    def backward(ctx: _SumsContext, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        a, b, scale, *flat = ctx.saved_tensors
        lengths = [flat.pop() for _ in range(2 * ctx.setting.normalize)][::-1]
        setting, alone, space = ctx.setting, ctx.alone, ctx.space
        logit_grads = []
        for i, side in enumerate(ctx.sides):
            rest, positive, excess, expected = flat[4 * i : 4 * i + 4]
            logit_grads.append(
                LogitGrads(side, (rest, positive, excess, expected), upstream[4 * i : 4 * i + 4])
            )
        by_alone = torch.empty(0)
        if alone is not None:
            block = alone.as_positives(setting.without_self)
            parts = [
                (side, slice(0, side.side.n), axis) for axis, side in zip((1, 0), logit_grads, strict=False)
            ]
            by_alone = positive_logit_grads(block, parts)

        def tile_by_tile(tile: Tile) -> Tensor:
            values = tile_logit_grads(tile, query_views(tile, logit_grads), space)
            if alone is not None:
                alone.put(tile.number, values, by_alone)
            return values

        with full_precision(a.device):
            if setting.keep and not setting.twin:
                (tile,) = ctx.kept
                values = tile_by_tile(tile)
                by_a, by_b = values @ b, values.T @ a
            else:
                by_a = torch.empty_like(a) if len(b) else torch.zeros_like(a)
                by_b = by_a if setting.twin else torch.empty_like(b)
                begun: set[tuple[str, int]] = set()  # blocks of rows that hold something
                into_a, into_b = by_a.split(setting.size[0]), by_b.split(setting.size[1])
                walked = lengths[0] if ctx.walked else None
                for tile in ctx.kept if setting.keep else tiles(a, b, scale, setting, space, lengths=walked):
                    values = tile_by_tile(tile)
                    k, at = tile.rows.start // setting.size[0], tile.columns.start // setting.size[1]
                    _add_product(into_a[k], values, tile.keys, first=("a", k) not in begun)
                    begun.add(("a", k))
                    which = "a" if setting.twin else "b"
                    _add_product(into_b[at], values.T, tile.queries, first=(which, at) not in begun)
                    begun.add((which, at))
            outcome, wanted = [by_a, None if setting.twin else by_b], ctx.needs_input_grad[2]
            along: Tensor | None = None  # Σ_ij slope_ij a_i·b_j, which the products hold already
            if not lengths:
                along = torch.dot(a.flatten(), by_a.flatten()) if wanted else None
                for by_x in [by_a] if setting.twin else [by_a, by_b]:
                    by_x.mul_(scale)
            else:
                along = through_length_(by_a, a, lengths[0], scale, are_unit=not ctx.walked)
                if not setting.twin:
                    through_length_(by_b, b, lengths[1], scale)
            by_scale = None
            if wanted and along is not None:
                by_scale = along * (0.5 if setting.twin else 1.0)
            return *outcome, by_scale, None, None


def _add_product(into: Tensor, one: Tensor, other: Tensor, first: bool) -> None:
    if first:
        torch.mm(one, other, out=into)
    else:
        into.addmm_(one, other)


def query_views(tile: Tile, sides: list[Side]) -> list[tuple[Side, slice, int]]:
    """The queries that a tile is about: those of its rows and, where it counts for them, those of its columns."""
    views = [(sides[0], tile.rows, 1)]
    return [*views, (sides[-1], tile.columns, 0)] if tile.back else views


def accumulate_tile(tile: Tile, sides: list[RunningSums], space: Workspace) -> None:
    """Add a tile to the sums of its queries. Its logits are overwritten."""
    setting, views = sides[0].setting, query_views(tile, sides)
    for side, at, axis in views:
        for block in tile.positives:
            inner = block.patch.rows if axis == 1 else block.patch.columns
            side.add_positives(block, within(at, inner), axis)
        if setting.mask is not None:
            side.count(tile.logits, at, axis, tile.weights)
    if not setting.bounded:
        _add_shifted(tile, views, space)
        return
    weighted: Tensor | None = None
    if not tile.positives and not setting.expected:
        height = STRIP if tile.logits.device.type == "cpu" else len(tile.logits)
        for top in range(0, len(tile.logits), height):
            powers = tile.logits[top : top + height].exp_()
            for side, at, axis in views:
                part = slice(top, top + len(powers))
                side.add_rest(powers, within(at, part) if axis == 1 else at, axis, weighted)
        return
    if setting.expected:
        weighted = space("weighted", *tile.logits.shape).copy_(tile.logits)
    powers = tile.logits.exp_()
    for block in tile.positives:
        block.remove_from(powers)
    if weighted is not None:
        weighted.mul_(powers)
    for side, at, axis in views:
        side.add_rest(powers, at, axis, weighted)


def _add_shifted(tile: Tile, views: list[tuple[RunningSums, slice, int]], space: Workspace) -> None:
    """Add the rest of a tile whose exponentials may overflow: with one shift, if possible, or one for each query."""
    setting, logits = views[0][0].setting, tile.logits
    tops = [top_of(logits, axis) for _, _, axis in views]
    shift = common_shift(tops)
    in_place = shift is not None and not (setting.keep or setting.expected)
    powers = logits if in_place else space("values", *logits.shape)
    weighted: Tensor | None = None
    for k, ((side, at, axis), top) in enumerate(zip(views, tops, strict=True)):
        if k == 0 or shift is None:
            torch.sub(logits, finite(top).unsqueeze(axis) if shift is None else shift, out=powers).exp_()
            if setting.expected:
                weighted = torch.mul(powers, logits, out=space("spare", *logits.shape))
        factor = None if shift is None else torch.exp(shift - top)
        side.add_shifted_rest(powers, at, axis, weighted, top, factor)


def sigmoid_sums(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    scale: Tensor,
    bias: Tensor,
    target: Target,
    *,
    mask: Mask | None = None,
    offset: int = 0,
    tile: tuple[int, int] | None = None,
) -> tuple[
    Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]
]:
    """For each query: Σ softplus(-(s x + bias)) over its positives, Σ softplus(s x + bias) over the rest.

    Then, without gradient, the largest logit of the rest, the sum of its probabilities, and the size of the rest
    where a mask leaves some out. Weights of a target only say what is a positive.
    """
    if is_directed(mask) or is_soft(mask):
        raise NearfarError(
            f"a {type(mask).__name__} tells the directions apart or weighs negatives, and the sigmoid loss asks about "
            "each pair once; leave pairs out with a SimilarityMask or a Boolean matrix"
        )
    setting = Setting(
        target=target, mask=mask, offset=offset, without_self=False, normalize=False, both=False, twin=False,
        inside=False, expected=False, bounded=False, size=tile_size(len(a), len(b), a.device, tile=tile), keep=False,
    )  # fmt: skip
    detached: list[Tensor] = []
    positive, rest = _Sigmoid.apply(a, b, scale, bias, setting, detached)
    return positive, rest, *detached


class _SigmoidContext(Context):
    setting: Setting
    alone: Scattered | None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _SigmoidContext,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor,
        setting: Setting,
        detached: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        positive, rest, push, left = (a.new_zeros(len(a)) for _ in range(4))
        hardest = a.new_full((len(a),), -torch.inf)
        alone = Scattered.of(setting.target, setting.offset, False, setting.size, a)
        with full_precision(a.device):
            for tile in tiles(a, b, scale, setting, Workspace(a, setting.size), alone):
                for block in tile.positives:
                    at = within(tile.rows, block.patch.rows)
                    positive[at] += block.patch.sum(_missing(block, bias), 1)
                torch.maximum(hardest[tile.rows], tile.logits.amax(1), out=hardest[tile.rows])
                if setting.mask is not None:
                    left[tile.rows] += is_unmasked(tile.logits).to(a.dtype).sum(1)
                values = torch.nn.functional.softplus(tile.logits.add_(bias), threshold=50.0)
                rest[tile.rows] += values.sum(1)
                push[tile.rows] += tile.logits.sigmoid_().sum(1)
            if alone is not None:
                every = alone.as_positives(False)
                positive += every.patch.sum(_missing(every, bias), 1)
        detached.extend([hardest + bias, push, left])
        ctx.save_for_backward(a, b, scale, bias)
        ctx.setting, ctx.alone = setting, alone
        return positive, rest

    @staticmethod
    def backward(ctx: _SigmoidContext, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        a, b, scale, bias = ctx.saved_tensors
        setting, alone = ctx.setting, ctx.alone
        by_positive, by_rest = upstream
        by_a, by_b, by_bias = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(bias)
        by_alone = None
        if alone is not None:
            by_alone = _pull(alone.as_positives(False), bias, by_positive)
        with full_precision(a.device):
            for tile in tiles(a, b, scale, setting, Workspace(a, setting.size)):
                values = tile.logits.add_(bias).sigmoid_().mul_(by_rest[tile.rows].unsqueeze(1))
                for block in tile.positives:
                    at = within(tile.rows, block.patch.rows)
                    block.put(values, _pull(block, bias, by_positive[at]))
                if alone is not None and by_alone is not None:
                    alone.put(tile.number, values, by_alone)
                by_bias += values.sum()
                by_a[tile.rows].addmm_(values, tile.keys)
                by_b[tile.columns].addmm_(values.T, tile.queries)
            by_scale = torch.dot(a.flatten(), by_a.flatten()) if ctx.needs_input_grad[2] else None
            return by_a.mul_(scale), by_b.mul_(scale), by_scale, by_bias, None, None


def _missing(block: PositiveLogits, bias: Tensor) -> Tensor:
    """What each positive lacks; a position of the patch that is none after all is hidden, and counts for nothing."""
    return torch.nn.functional.softplus(-(block.logits + bias), threshold=50.0) * block.counts(1)


def _pull(block: PositiveLogits, bias: Tensor, upstream: Tensor) -> Tensor:
    return torch.sigmoid(-(block.logits + bias)) * block.counts(1) * -block.patch.spread(upstream, 1)
