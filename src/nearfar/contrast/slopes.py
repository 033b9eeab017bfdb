"""Derivatives by the logits of a tile, from the sums of its queries."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.patches import Patch
from nearfar.contrast.sums import TINY, Side, rest_share, weight_of, within
from nearfar.contrast.tiles import LEAST, Tile, Workspace

__all__ = ["Slopes", "tile_slopes"]


class Slopes:
    """Derivatives of the upstream value for one direction's queries.

    By a logit of the rest: ``exp(s - rest) (factor + linear s)``; by one of the positives: the same with its own
    numbers, and the share it has beyond its target share.
    """

    def __init__(
        self,
        side: Side,
        results: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        upstream: tuple[Tensor | None, ...],
    ) -> None:
        self.setting, self.side = side.setting, side
        rest, positive, _, expected = results
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
            total = side.total.clamp(min=TINY)
            self.factor = self.factor / total
            self.linear = None if self.linear is None else self.linear / total
        else:
            self.shift = torch.where(rest > -torch.inf, rest, torch.inf)
        if not self.setting.target.single or self.own_linear is not None:
            self.positive = torch.where(positive > -torch.inf, positive, torch.inf)
        if g_excess is not None:
            everyone = slice(0, side.n)
            weighted = side._at("weighted", everyone, 0.0)
            if self.setting.inside:
                mean = weighted.log() + side._at("weighted_top", everyone, -torch.inf)
                self.mean = torch.where(mean > -torch.inf, mean, torch.inf)
            else:
                name = "positives" if self.setting.target.binary else "mass"
                self.unit = 1.0 / side._at(name, everyone, 0.0).clamp(min=TINY)

    def positives(self, patch: Patch, logits: Tensor, at: slice, axis: int) -> Tensor:
        """By the logits of the positives of a tile."""
        if self.setting.target.single and self.own_linear is None:
            return self.own[at]
        share = torch.exp(logits - patch.spread(self.positive[at], axis))
        values = share * patch.spread(self.own[at], axis)
        if self.own_linear is not None:
            values += share * logits.clamp(min=LEAST) * patch.spread(self.own_linear[at], axis)
        if self.excess is None:
            return values
        weight = weight_of(patch, axis)
        if self.setting.inside:
            due = torch.exp(logits - patch.spread(self.mean[at], axis))
            due = due if weight is None else due * weight
        else:
            unit = patch.spread(self.unit[at], axis)
            due = torch.where(logits > -torch.inf, unit if weight is None else unit * weight, 0.0)
        return values.add_((share - due) * patch.spread(self.excess[at], axis))


def tile_slopes(tile: Tile, views: list[tuple[Slopes, slice, int]], space: Workspace) -> Float[Tensor, "r c"]:
    """By all logits of a tile, both directions added. Overwrites the tile unless it is kept for another time."""
    setting = views[0][0].setting
    values = _bounded(tile, views, space) if setting.bounded else _shifted(tile, views, space)
    for patch, logits in tile.taken:
        parts = [
            slope.positives(patch, logits, within(at, patch.rows if axis == 1 else patch.columns), axis)
            for slope, at, axis in views
        ]
        patch.put(values, parts[0] if len(parts) == 1 else parts[0] + parts[1])
    return values


def _bounded(tile: Tile, views: list[tuple[Slopes, slice, int]], space: Workspace) -> Tensor:
    setting, (first, at, _) = views[0][0].setting, views[0]
    values = space("values", *tile.logits.shape)
    linear = any(slope.linear is not None for slope, _, _ in views)
    if setting.keep:  # forward left the powers
        powers = tile.logits
        logits = powers.log().clamp_(min=LEAST) if linear else None
    else:
        logits = tile.logits.clamp(min=LEAST) if linear else None
        powers = tile.logits.exp_()
    if not linear and len(views) == 1:
        return torch.mul(powers, first.factor[at].unsqueeze(1), out=values)
    if not linear:
        torch.add(first.factor[at].unsqueeze(1), views[1][0].factor[views[1][1]], out=values)
        return values.mul_(powers)
    values.zero_()
    for slope, at, axis in views:
        values.add_(slope.factor[at].unsqueeze(axis))
        if slope.linear is not None and logits is not None:
            values.addcmul_(logits, slope.linear[at].unsqueeze(axis))
    return values.mul_(powers)


def _shifted(tile: Tile, views: list[tuple[Slopes, slice, int]], space: Workspace) -> Tensor:
    values = None
    for slope, at, axis in views:
        into = space("values" if values is None else "spare", *tile.logits.shape)
        torch.sub(tile.logits, slope.shift[at].unsqueeze(axis), out=into).exp_()
        factor = slope.factor[at].unsqueeze(axis)
        if slope.linear is not None:
            factor = tile.logits.clamp(min=LEAST).mul_(slope.linear[at].unsqueeze(axis)).add_(factor)
        into.mul_(factor)
        values = into if values is None else values.add_(into)
    assert values is not None
    return values
