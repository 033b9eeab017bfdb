"""The pairwise sigmoid of few pairs: one matrix, few calls. See ``sigmoid`` for the tiled one."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.precision import full_precision, no_second_derivative
from nearfar.contrast.small import small_batch
from nearfar.contrast.step import Direction
from nearfar.contrast.sums import Statistics

__all__ = ["few_sigmoid_pairs", "sigmoid_directions"]


def few_sigmoid_pairs(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    scale: float | Tensor,
    bias: float | Tensor,
    normalize: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n n"]] | None:
    """1/n Σ_ij softplus(t_ij (s_ij + bias)), t = -1 for own pairs and 1 for others, and the numbers under softplus;
    None for batches that are not small."""
    given = small_batch(a, b, scale, normalize, any_logit=True)
    if given is None or len(a) != len(b):
        return None
    kept: list[Tensor] = []
    loss: Tensor = _SigmoidPairs.apply(a, b, given.scale, bias, given.lengths, kept)
    return loss, kept[0]


def sigmoid_directions(signed: Float[Tensor, "n n"]) -> list[Direction]:
    """What the record needs: in place of the log-sum of the rest, the sum of its probabilities."""
    rest = signed.sigmoid()
    rest.diagonal().zero_()
    others = signed.clone()
    others.diagonal().fill_(-torch.inf)
    losses = torch.nn.functional.softplus(signed.diagonal(), threshold=50.0)
    statistics = Statistics(others.amax(1), float(len(signed)), 1.0, 1.0, 0.0)
    return [Direction(losses, rest.sum(1), statistics)]


class _SigmoidPairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor | float,
        bias: Tensor | float,
        lengths: tuple[Tensor, Tensor] | None,
        kept: list[Tensor],
    ) -> Tensor:
        if lengths is not None:
            a, b = a / lengths[0], b / lengths[1]
        with full_precision(a.device):
            signed = torch.mm(a, b.T).mul_(scale).add_(bias)
        signed.diagonal().neg_()
        kept.append(signed)
        ctx.save_for_backward(a, b, scale if isinstance(scale, Tensor) else None)
        ctx.scale, ctx.lengths, ctx.signed = None if isinstance(scale, Tensor) else scale, lengths, signed
        return torch.nn.functional.softplus(signed, threshold=50.0).sum() / len(a)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        no_second_derivative()
        a, b, scale = ctx.saved_tensors
        scale = ctx.scale if scale is None else scale
        values = ctx.signed.sigmoid().mul_(upstream[0] / len(a))
        values.diagonal().neg_()
        with full_precision(a.device):  # a vecdot is a product too
            by_a, by_b = values @ b, values.T @ a
            along = torch.linalg.vecdot(a, by_a).unsqueeze(1)
            across = None if ctx.lengths is None else torch.linalg.vecdot(b, by_b).unsqueeze(1)
        by_scale = along.sum() if ctx.needs_input_grad[2] else None
        by_bias = values.sum() if ctx.needs_input_grad[3] else None
        if across is not None:
            by_a.addcmul_(a, along, value=-1).div_(ctx.lengths[0])
            by_b.addcmul_(b, across, value=-1).div_(ctx.lengths[1])
        return by_a.mul_(scale), by_b.mul_(scale), by_scale, by_bias, None, None
