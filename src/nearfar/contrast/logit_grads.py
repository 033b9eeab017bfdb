"""Derivatives with respect to the logits of a tile, from the sums of its queries."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.positives import MASKED_LOGIT, PositiveLogits, Workspace, is_unmasked
from nearfar.contrast.running_sums import RunningSums
from nearfar.contrast.tiles import Tile, common_shift, rest_share, times_sum, tiny, within

__all__ = ["LogitGrads", "positive_logit_grads", "tile_logit_grads"]


#: below every logit of a bounded tile; a hidden one, times a grads as large as 1 / sum, would overflow
MIN_LOGIT = -1e3


class LogitGrads:
    """Derivatives of the upstream value for one direction's queries.

    With respect to a logit of the rest: ``exp(s - rest) (factor + linear s)``; to one of the
    positives: the same with its own numbers, and the share it has beyond its target share.
    """

    def __init__(
        self,
        side: RunningSums,
        results: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        upstream: tuple[Tensor | None, ...],
    ) -> None:
        self.setting, self.side = side.setting, side
        rest, positive, _, expected = results
        least = tiny(rest)
        g_rest, g_positive, g_excess, g_expected = upstream
        self.factor = torch.zeros_like(rest) if g_rest is None else g_rest
        self.own = torch.zeros_like(rest) if g_positive is None else g_positive
        self.excess = g_excess
        self.linear = self.own_linear = None
        if g_expected is not None and expected is not None:
            share = rest_share(rest, positive)
            self.linear, self.own_linear = g_expected * share, g_expected * (1 - share)
            self.factor = self.factor + self.linear * (1 - expected)
            self.own = self.own + self.own_linear * (1 - expected)
        if self.setting.bounded:
            assert side.total is not None
            total = side.total.clamp(min=least)
            self.factor = self.factor / total
            self.linear = None if self.linear is None else self.linear / total
        else:
            self.shift = torch.where(rest > -torch.inf, rest, torch.inf)
        target = self.setting.target
        if target.single:
            self.positive = torch.where(positive > -torch.inf, positive, torch.inf)
        elif self.setting.bounded:
            self.normaliser = side.sum_of("positive_total").clamp(min=least)
        else:
            self.positive, self.normaliser = _shift_and_total(side, "positive_top", "positive_total")
        if self.excess is not None:
            # Without positives it is 0 whatever the logits are; 0 / 0 below would say otherwise to a scaled loss.
            self.excess = torch.where(side.sum_of("positives") > 0, self.excess, 0.0)
        if g_excess is not None and not self.setting.inside:
            self.unit = 1.0 / side.sum_of("positives" if target.binary else "mass").clamp(min=least)
        elif g_excess is not None and self.setting.bounded:
            self.unit = side.sum_of("weighted").clamp(min=least)
        elif g_excess is not None:
            self.drawn, self.unit = _shift_and_total(side, "weighted_top", "weighted")

    @property
    def is_plain(self) -> bool:
        """Weighted positives, sum outside: share and due of both directions then join in two products."""
        setting = self.setting
        weighted = not setting.target.binary and not setting.inside and setting.bounded
        return weighted and self.own_linear is None and self.excess is not None

    def positives(self, block: PositiveLogits, at: slice, axis: int) -> Tensor:
        """By the logits of the positives of a tile."""
        target = self.setting.target
        if target.single and self.own_linear is None:
            return self.own[at]
        opposite = block.opposite_only(axis)
        values = self._positives(block, at, axis)
        return values if opposite is None else values.add_(self._opposite(block, opposite, at, axis))

    def _opposite(self, block: PositiveLogits, opposite: Tensor, at: slice, axis: int) -> Tensor:
        patch = block.patch
        factor = patch.spread(self.factor[at], axis)
        if self.linear is not None:
            factor = factor + block.finite() * patch.spread(self.linear[at], axis)
        logits = torch.add(block.logits, opposite - 1, alpha=-MASKED_LOGIT)
        if not self.setting.bounded:
            logits = logits - patch.spread(self.shift[at], axis)
        return logits.exp_().mul_(factor)

    def _positives(self, block: PositiveLogits, at: slice, axis: int) -> Tensor:
        target, patch = self.setting.target, block.patch
        # Of a single positive the share is 1 to the last digit: it is divided by itself, or had itself subtracted.
        share = block.buffer("share")
        if self.setting.bounded and not target.single:
            torch.div(block.powers(axis), patch.spread(self.normaliser[at], axis), out=share)
        else:
            torch.sub(block.own(axis), patch.spread(self.positive[at], axis), out=share).exp_()
            if not target.single:
                share.div_(patch.spread(self.normaliser[at], axis))
        values = torch.mul(share, patch.spread(self.own[at], axis), out=block.buffer(f"logit_grads {axis}"))
        if self.own_linear is not None:
            values += share * block.finite() * patch.spread(self.own_linear[at], axis)
        if self.excess is None:
            return values
        due = block.buffer("due")
        if not self.setting.inside:
            torch.mul(block.weights(axis), patch.spread(self.unit[at], axis), out=due)
        elif self.setting.bounded:
            torch.mul(block.weights(axis), block.powers(axis), out=due).div_(
                patch.spread(self.unit[at], axis)
            )
        else:
            torch.sub(block.own(axis), patch.spread(self.drawn[at], axis), out=due).exp_()
            due.mul_(block.weights(axis)).div_(patch.spread(self.unit[at], axis))
        return values.add_(share.sub_(due).mul_(patch.spread(self.excess[at], axis)))


def _shift_and_total(side: RunningSums, top: str, total: str) -> tuple[Tensor, Tensor]:
    """A log-sum in two parts: joined, its rounding would drown the difference of two shares that are nearly 1."""
    highest = side.top_of(top)
    totals = side.sum_of(total)
    return torch.where(is_unmasked(highest), highest, torch.inf), totals.clamp(min=tiny(totals))


def tile_logit_grads(
    tile: Tile, views: list[tuple[LogitGrads, slice, int]], space: Workspace
) -> Float[Tensor, "r c"]:
    """By all logits of a tile, both directions added. Overwrites the tile unless it is kept for later."""
    setting = views[0][0].setting
    values = _bounded(tile, views, space) if setting.bounded else _shifted(tile, views, space)
    for block in tile.positives:
        patch = block.patch
        parts = [
            (grads, within(at, patch.rows if axis == 1 else patch.columns), axis) for grads, at, axis in views
        ]
        block.put(values, positive_logit_grads(block, parts))
    return values


def positive_logit_grads(block: PositiveLogits, views: list[tuple[LogitGrads, slice, int]]) -> Tensor:
    """By the logits of positives, both directions added; ``views`` are the queries that they belong to."""
    if all(grads.is_plain for grads, _, _ in views) and block.patch.weight_back is None:
        return _plain(block, views)
    grads_of = [grads.positives(block, at, axis) for grads, at, axis in views]
    return grads_of[0] if len(grads_of) == 1 else grads_of[0].add_(grads_of[1])


def _plain(block: PositiveLogits, views: list[tuple[LogitGrads, slice, int]]) -> Tensor:
    by_power, by_weight = [], []
    for grads, at, axis in views:
        own, excess = grads.own[at], grads.excess[at]  # type: ignore[index]
        by_power.append(block.patch.spread((own + excess) / grads.normaliser[at], axis))
        by_weight.append(block.patch.spread(excess * grads.unit[at], axis))
    share, due = block.buffer("share"), block.buffer("due")
    if len(views) == 1:
        torch.mul(block.powers(1), by_power[0], out=share)
        torch.mul(block.weights(1), by_weight[0], out=due)
    else:
        torch.add(*by_power, out=share).mul_(block.powers(1))
        torch.add(*by_weight, out=due).mul_(block.weights(1))
    return share.sub_(due)


def _bounded(tile: Tile, views: list[tuple[LogitGrads, slice, int]], space: Workspace) -> Tensor:
    if any(grads.linear is not None for grads, _, _ in views):
        return _linear(tile, views, space)
    keep = views[0][0].setting.keep  # forward left the powers, for any number of backwards
    if not keep:
        for block in tile.positives:
            block.powers(1)  # while the logits are there
    values = space("values", *tile.logits.shape) if keep else tile.logits
    powers = tile.logits if keep else tile.logits.exp_()
    _times_factors(powers, [grads.factor[at] for grads, at, _ in views], values)
    if not keep:
        for block in tile.positives:
            block.remove_from(values)
    return values


def _linear(tile: Tile, views: list[tuple[LogitGrads, slice, int]], space: Workspace) -> Tensor:
    if views[0][0].setting.keep:
        powers, logits = tile.logits, tile.logits.log()
    else:
        logits = tile.logits.clone()
        for block in tile.positives:
            block.powers(1)
        powers = tile.logits.exp_()
        for block in tile.positives:
            block.remove_from(powers)
    logits.clamp_(min=MIN_LOGIT)
    values = space("values", *tile.logits.shape).zero_()
    for grads, at, axis in views:
        values.add_(grads.factor[at].unsqueeze(axis))
        if grads.linear is not None:
            values.addcmul_(logits, grads.linear[at].unsqueeze(axis))
    return values.mul_(powers)


def _shifted(tile: Tile, views: list[tuple[LogitGrads, slice, int]], space: Workspace) -> Tensor:
    common = None
    if not any(grads.linear is not None for grads, _, _ in views):
        common = common_shift([grads.shift[at] for grads, at, _ in views])
    if common is not None:
        values = space("values", *tile.logits.shape) if views[0][0].setting.keep else tile.logits
        torch.sub(tile.logits, common, out=values).exp_()
        return _times_factors(
            values, [grads.factor[at] * torch.exp(common - grads.shift[at]) for grads, at, _ in views], values
        )
    values = space("values", *tile.logits.shape)
    for k, (grads, at, axis) in enumerate(views):
        into = space("spare", *values.shape) if k else values
        torch.sub(tile.logits, grads.shift[at].unsqueeze(axis), out=into).exp_()
        factor = grads.factor[at].unsqueeze(axis)
        if grads.linear is not None:
            factor = (tile.logits * grads.linear[at].unsqueeze(axis)).add_(factor)
        into.mul_(factor)
        if k:
            values.add_(into)
    return values


def _times_factors(powers: Tensor, factors: list[Tensor], out: Tensor) -> Tensor:
    """Powers times the factor of their row and, where there is one, that of their column added."""
    rows, *columns = factors
    if columns:
        return times_sum(powers, rows.unsqueeze(1), columns[0], out=out)
    return torch.mul(powers, rows.unsqueeze(1), out=out)
