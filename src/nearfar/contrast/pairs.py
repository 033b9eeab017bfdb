"""The kernel for few pairs: where a batch is so small that calls cost more than products, one matrix and few calls.

The same numbers as ``kernel.LogSums`` with ``OwnPair`` and the mean of its losses. With the odds of the rest,
Σ exp(s_ij) / exp(s_ii), a loss is log(1 + odds), which keeps its digits near convergence as well; that is in range
only while logits are below about 40.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfar.contrast.precision import full_precision, no_second_derivative

__all__ = ["FEW_PAIRS", "PairLosses"]

#: queries × keys up to which this is quicker
FEW_PAIRS = 1 << 20


class PairLosses(torch.autograd.Function):
    """The mean loss and, left in ``found``, what its record is made from: odds, total and powers of the rest."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, both: bool, mask: Tensor | None, found: list[Tensor]
    ) -> Tensor:
        with full_precision(a.device):
            queries = a * scale
            powers = torch.mm(queries, b.T).exp_()
            diagonal = powers.diagonal()
            own = diagonal.clone()
            diagonal.zero_()
            if mask is not None:
                powers.mul_(mask.logical_not().to(powers.dtype))
            total = torch.stack([powers.sum(1), powers.sum(0)]) if both else powers.sum(1).unsqueeze(0)
            odds = total / own
            value = odds.log1p().mean()
        found.extend([odds, total, powers])
        ctx.save_for_backward(a, b, scale, queries, powers, own, total)
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        no_second_derivative()
        a, b, scale, queries, powers, own, total = ctx.saved_tensors
        with full_precision(a.device):
            factor = (upstream[0] / total.numel()) / (total + own)
            if len(factor) > 1:
                values = (factor[0].unsqueeze(1) + factor[1]).mul_(powers)
            else:
                values = powers * factor[0].unsqueeze(1)
            values.diagonal().copy_((total * factor).sum(0).neg_())
            by_a = values @ b
            by_scale = torch.linalg.vecdot(a, by_a).sum() if ctx.needs_input_grad[2] else None
            return by_a.mul_(scale), values.T @ queries, by_scale, None, None, None
