"""The pairwise sigmoid over the same tiles: every pair is a question of its own, positive or not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.masks import Mask, is_directed, is_soft
from nearfar.contrast.numerics import Context, full_precision, no_second_derivative
from nearfar.contrast.positives import PositiveLogits, Workspace, is_unmasked
from nearfar.contrast.reductions import within
from nearfar.contrast.targets import Target
from nearfar.contrast.tiles import Scattered, Setting, tile_size, tiles
from nearfar.errors import NearfarError

__all__ = ["sigmoid_sums"]


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
