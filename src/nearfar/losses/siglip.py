"""SigLIP: every pair is a binary question of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast import (
    Direction,
    Mask,
    OwnPair,
    Statistics,
    Step,
    checked_mask,
    dense_sigmoid,
    sigmoid_sums,
    uncompiled,
)
from nearfar.errors import NearfarError
from nearfar.losses.arguments import any_number, check_flags, check_matrices, check_part, ready
from nearfar.losses.base import ContrastiveLoss, LossTraits

__all__ = ["SigLipLoss", "siglip", "siglip_step"]


def siglip(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
    logit_scale: float | Float[Tensor, ""] | Float[Tensor, "1"],
    logit_bias: float | Float[Tensor, ""] | Float[Tensor, "1"] = 0.0,
    *,
    normalize: bool = True,
    mask: Bool[Tensor, "n n"] | Mask | None = None,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""]:
    """The pairwise sigmoid loss (Zhai et al. 2023).

    -1/n Σ_ij log σ(t_ij (scale · cos(a_i, b_j) + bias)), with t = 1 for own pairs and -1 for all others.

    ``logit_scale`` is the scale itself (they start at 10), ``logit_bias`` starts at -10, so that the many negatives
    do not swamp the start. Both directions are the same sum. ``mask`` leaves out negatives. ``rows`` makes only those
    rows of ``a`` queries; parts add up to the loss.

    Floor 0. The best constant answer, 1/n everywhere, gives about ln(n) + 1.

    >>> round(siglip(torch.eye(4), torch.eye(4), 10.0, -10.0).item(), 4)
    0.6933
    """
    return siglip_step(a, b, logit_scale, logit_bias, normalize, mask=mask, rows=rows, tile=tile)[0]


@uncompiled
def siglip_step(
    a: Tensor,
    b: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    normalize: bool,
    *,
    mask: Tensor | Mask | None = None,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Step]:
    """``siglip``, and what its record is made of."""
    check_matrices(a=a, b=b)
    check_flags(normalize=normalize)
    check_part(rows, tile)
    if not isinstance(logit_scale, Tensor):
        logit_scale = any_number("logit_scale", logit_scale)
    bias = _bias(logit_bias, a)
    if mask is None and rows is None and tile is None:
        small = dense_sigmoid(a, b, logit_scale, bias, normalize)
        if small is not None:
            return small[0], _Sigmoid(small[0].detach(), small[1], _value(logit_scale))
    first, second, scale = ready(a, b, logit_scale, normalize, scale_name="logit_scale")
    bias = bias.to(first)
    n = len(first)
    if len(second) != n:
        raise NearfarError(f"a has {n} rows and b {len(second)}; row i of b is the partner of row i of a")
    part = slice(0, n) if rows is None else slice(*rows.indices(n))
    if part.step not in (None, 1) or part.start >= part.stop:
        raise NearfarError(f"rows is {part}; at least one row, without steps, is needed")
    mask = None if mask is None else checked_mask(mask, n, n)
    positive, rest, hardest, push, left = sigmoid_sums(
        first[part], second, scale, bias, OwnPair(n), mask=mask, offset=part.start, tile=tile
    )
    loss = (positive + rest).sum() / n
    candidates = float(n) if mask is None else left + 1.0
    step = _Sigmoid(
        loss.detach(),
        partial(
            list,
            [
                Direction(
                    positive.detach(), push, Statistics(hardest, candidates, 1.0, 1.0, 0.0, n - candidates)
                )
            ],
        ),
        scale.detach(),
    )
    return loss, step


def _bias(bias: float | Tensor, like: Tensor) -> Float[Tensor, ""]:
    dtype = torch.promote_types(like.dtype, torch.float32) if like.dtype.is_floating_point else torch.float32
    if not isinstance(bias, Tensor):
        bias = any_number("logit_bias", bias)
    bias = torch.as_tensor(bias, device=like.device)
    if bias.dtype == torch.bool or bias.is_complex():
        raise NearfarError(f"logit_bias is a tensor of {bias.dtype}; one finite number is needed")
    bias = bias.to(dtype)
    if bias.numel() != 1 or (bias.device.type == "cpu" and not bias.detach().isfinite().all()):
        raise NearfarError(f"logit_bias is {bias}; one finite number is needed, they start at -10")
    return bias.reshape(())


def _value(scale: float | Tensor) -> float | Tensor:
    return scale.detach() if isinstance(scale, Tensor) else scale


class _Sigmoid(Step):
    """A pair's probability is its own: it is not shared with the other candidates."""

    def numbers(self) -> Float[Tensor, " numbers"]:
        (direction,) = self.directions()
        one = torch.ones_like(direction.losses)
        candidates = one * direction.statistics.candidates
        # By the derivative of softplus, the push on a negative is its own probability.
        hardest = torch.sigmoid(direction.statistics.hardest)
        share = torch.where(direction.rest > 0, hardest / direction.rest.clamp(min=1e-38), 0.0)
        prior = 1.0 / candidates
        guess = -(prior.log() + (candidates - 1) * torch.where(candidates > 1, torch.log1p(-prior), 0.0))
        return torch.stack(
            [
                candidates.mean(), one[0], one[0], one[0] * 0, torch.exp(-direction.losses).mean(), share.mean(),
                guess.mean(), one[0] * 0, torch.as_tensor(self.scale).to(one),
                (candidates <= 1).sum().to(one), (one * direction.statistics.left_out).mean(),
                self.value.isfinite().to(one),
            ]
        )  # fmt: skip


@dataclass(eq=False, repr=False)
class SigLipLoss(ContrastiveLoss):
    """Is this pair a pair? Asked of every pair of the batch with a sigmoid (Zhai et al. 2023).

    Called with both views, the scale (already exponentiated; they start at 10) and a bias (they start at -10).
    ``nearfar.losses.siglip`` has the definition.

    Floor 0. ``record.uniform_level`` is the loss of the best constant answer, about ln(n) + 1; ``record.p_positive``
    the geometric mean probability that a pair's row is answered right throughout.

    >>> import torch
    >>> loss = SigLipLoss()
    >>> value = loss(torch.eye(4), torch.eye(4), 10.0, -10.0)
    >>> round(value.item(), 2), round(loss.record.uniform_level, 2)
    (0.69, 2.25)
    """

    normalize: bool = True

    traits: ClassVar[LossTraits] = LossTraits(
        "sigmoid", "pair", rows=("a", "b"), pairs=("mask",), numbers=("logit_scale", "logit_bias"), local=()
    )

    def __post_init__(self) -> None:
        check_flags(normalize=self.normalize)

    def forward(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "n d"],
        logit_scale: float | Float[Tensor, ""] | Float[Tensor, "1"],
        logit_bias: float | Float[Tensor, ""] | Float[Tensor, "1"] = 0.0,
        mask: Bool[Tensor, "n n"] | Mask | None = None,
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        step = siglip_step(a, b, logit_scale, logit_bias, self.normalize, mask=mask, rows=rows)
        return self.keep(*step, mask is not None)
