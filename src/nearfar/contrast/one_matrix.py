"""Small batches: calls cost more there than products, and one matrix of all logits is the quickest way.

What the losses have in common stands here: from embeddings to logits, and from derivatives by logits back to
embeddings. Between the two stand the ``Scores`` of each loss.

All of it runs in inference mode: there is no graph to draw here, and a call without its bookkeeping takes three
quarters of the time. What is handed out is none of its tensors, which could not be changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.fused import times
from nearfar.contrast.precision import full_precision, no_second_derivative
from nearfar.contrast.small import SmallBatch

__all__ = ["Scores", "one_matrix"]

#: up to so many rows, adding the transposed derivatives is quicker than a second product with them
TURNED = 512


class Scores(Protocol):
    """What a loss makes of the logits, and what its record needs of that."""

    def take(self, logits: Float[Tensor, "n m"]) -> Sequence[Float[Tensor, ""]]:
        """The values; the logits may be overwritten."""

    def slopes(
        self, by_first: float | None, by_second: float | None = None, /
    ) -> tuple[Float[Tensor, "n m"], float]:
        """Derivatives by the logits, up to a factor, which is cheaper to apply later. None: that value is not used."""

    def products(self, slopes: Float[Tensor, "n m"]) -> Float[Tensor, "n m"] | None:
        """Slopes times logits; None where the logits are gone."""


def one_matrix(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    given: SmallBatch,
    scores: Scores,
    bias: Float[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, ""], ...]:
    """The values of ``scores`` at the logits scale · a b' + bias, differentiable in these; ``b=None`` stands for a."""
    values: tuple[Tensor, ...] = _OneMatrix.apply(a, b, given.scale, bias, given, scores)
    return values


class _OneMatrix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor | float,
        bias: Tensor | None,
        given: SmallBatch,
        scores: Scores,
    ) -> tuple[Tensor, ...]:
        ctx.given, ctx.scores, ctx.unit = given, scores, None
        with torch.inference_mode(), full_precision(a.device):
            if given.lengths is not None:
                a, b = a / given.lengths[0], None if b is None else b / given.lengths[1]
                ctx.unit = a, b
            values = scores.take(times(a, (a if b is None else b).T, given.value, plus=bias))
        if ctx.unit is None:
            ctx.save_for_backward(a, b)  # the caller's own, which nobody may change until backward
        ctx.set_materialize_grads(False)
        return tuple([value.clone() for value in values])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        no_second_derivative()
        if all(value is None for value in upstream):
            return (None,) * 6
        given: SmallBatch = ctx.given
        scores: Scores = ctx.scores
        a, b = ctx.saved_tensors if ctx.unit is None else ctx.unit
        by_a, by_b = torch.empty_like(a), None if b is None else torch.empty_like(b)
        by_scale = by_bias = None
        with torch.inference_mode(), full_precision(a.device):  # a vecdot is a product too
            slopes, factor = scores.slopes(*[None if value is None else value.item() for value in upstream])
            if ctx.needs_input_grad[3]:
                by_bias = slopes.sum() * factor
            twice = b is None and len(a) > TURNED
            if b is None and not twice:
                slopes = slopes + slopes.T
            times(slopes, a if b is None else b, factor * given.value, out=by_a)
            if twice:
                by_a.addmm_(slopes.T, a, alpha=factor * given.value)
            if by_b is not None:
                times(slopes.T, a, factor * given.value, out=by_b)
            if ctx.needs_input_grad[2] or given.lengths is not None:
                dots, share = _dots(slopes, scores, a, by_a, b, by_b, twice, factor)
                if ctx.needs_input_grad[2]:
                    by_scale = dots[0].sum() * (share / given.value * (0.5 if b is None else 1.0))
                if given.lengths is not None:
                    by_a.addcmul_(a, dots[0], value=-share).div_(given.lengths[0])
                    if b is not None and by_b is not None:
                        by_b.addcmul_(b, dots[1], value=-share).div_(given.lengths[1])
        if by_scale is not None:
            by_scale = by_scale.clone()
        if by_bias is not None:
            by_bias = by_bias.clone()
        return by_a, by_b, by_scale, by_bias, None, None


def _dots(
    slopes: Tensor,
    scores: Scores,
    a: Tensor,
    by_a: Tensor,
    b: Tensor | None,
    by_b: Tensor | None,
    twice: bool,
    factor: float,
) -> tuple[list[Tensor], float]:
    """Each row's product with its derivative, up to a factor: from the logits where these are fewer numbers."""
    products = None if a.shape[1] < slopes.shape[1] else scores.products(slopes)
    if products is not None:
        dots = [products.sum(1, keepdim=True)]
        if twice:
            dots[0] += products.sum(0).unsqueeze(1)
        elif b is not None:
            dots.append(products.sum(0).unsqueeze(1))
        return dots, factor
    dots = [torch.linalg.vecdot(a, by_a).unsqueeze(1)]
    if b is not None:
        dots.append(torch.linalg.vecdot(b, by_b).unsqueeze(1))
    return dots, 1.0
