"""The kernel for few pairs: where a batch is so small that calls cost more than products, one matrix and few calls.

The same numbers as ``softmax_loss`` with ``OwnPair``. With the odds of the rest, Σ exp(s_ij) / exp(s_ii), a loss is
log(1 + odds), which keeps its digits near convergence as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.masks import Mask
from nearfar.contrast.precision import full_precision, no_second_derivative
from nearfar.contrast.small import small_batch
from nearfar.contrast.step import Direction, Step
from nearfar.contrast.sums import Statistics

__all__ = ["few_pairs"]


def few_pairs(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    scale: float | Tensor,
    both: bool,
    normalize: bool,
    mask: Mask | None = None,
) -> tuple[Float[Tensor, ""], Step] | None:
    """The mean loss of partners i and i, and what its record is made of; None where this is not the place for it."""
    found = small_batch(a, b, scale, normalize)
    if found is None:
        return None
    n, m = len(a), len(b)
    left_out = None if mask is None else mask.tile(slice(0, n), slice(0, m))
    kept: list[Tensor] = []
    loss: Tensor = _PairLosses.apply(a, b, found.scale, found.lengths, both, left_out, kept)
    look = partial(_directions, kept, m, mask is not None)
    return loss, Step(loss.detach(), look, found.value)


def _directions(kept: list[Tensor], keys: int, masked: bool) -> list[Direction]:
    odds, total, powers = kept
    directions = []
    for k, axis in enumerate((1, 0)[: len(odds)]):
        candidates: Tensor | float = float(keys)
        if masked:
            candidates = (powers > 0).sum(axis).to(odds.dtype) + 1.0
        statistics = Statistics(powers.amax(axis).log(), candidates, 1.0, 1.0, 0.0)
        directions.append(Direction(odds[k].log1p(), total[k].log(), statistics))
    return directions


class _PairLosses(torch.autograd.Function):
    """Normalising, product, losses and their mean; odds, total and powers of the rest are left in ``found``."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor | float,
        lengths: list[Tensor] | None,
        both: bool,
        mask: Tensor | None,
        found: list[Tensor],
    ) -> Tensor:
        if lengths is not None:
            a, b = a / lengths[0], b / lengths[1]
        with full_precision(a.device):
            powers = torch.mm(a, b.T).mul_(scale).exp_()
        diagonal = powers.diagonal()
        own = diagonal.clone()
        diagonal.zero_()
        if mask is not None:
            powers.mul_(mask.logical_not().to(powers))
        total = torch.stack([powers.sum(1), powers.sum(0)]) if both else powers.sum(1).unsqueeze(0)
        odds = total / own
        found += [odds, total, powers]
        ctx.save_for_backward(a, b, powers, own, total, scale if isinstance(scale, Tensor) else None)
        ctx.scale, ctx.lengths = None if isinstance(scale, Tensor) else scale, lengths
        return odds.log1p().mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        no_second_derivative()
        a, b, powers, own, total, scale = ctx.saved_tensors
        scale = ctx.scale if scale is None else scale
        factor = (upstream[0] * scale / total.numel()) / (total + own)
        if len(factor) > 1:
            values = (factor[0].unsqueeze(1) + factor[1]).mul_(powers)
        else:
            values = powers * factor[0].unsqueeze(1)
        values.diagonal().copy_((total * factor).sum(0).neg_())
        with full_precision(a.device):  # a vecdot is a product too
            by_a, by_b = values @ b, values.T @ a
            along = torch.linalg.vecdot(a, by_a).unsqueeze(1)
            across = None if ctx.lengths is None else torch.linalg.vecdot(b, by_b).unsqueeze(1)
        by_scale = along.sum() / scale if ctx.needs_input_grad[2] else None
        if across is not None:
            by_a.addcmul_(a, along, value=-1).div_(ctx.lengths[0])
            by_b.addcmul_(b, across, value=-1).div_(ctx.lengths[1])
        return by_a, by_b, by_scale, None, None, None, None
