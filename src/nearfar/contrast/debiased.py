"""Sums over negatives that stand for what they are not: hard ones weighted up, and the share of false ones taken off.

Both need one positive for each query. The kernel gives them log-sums at one or two scales; what is here is done once
for each query, so that tiles, masks, further negatives, parts of a batch and several processes work as elsewhere.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast.running_sums import Statistics

__all__ = ["count_negatives", "debiased_losses", "hard_weighted_rest"]


def count_negatives(rest: Float[Tensor, " n"], statistics: Statistics) -> Float[Tensor, " n"]:
    """Negatives of each query, by weight where a mask has weights."""
    like = torch.zeros_like(rest)
    return (like + statistics.candidates - statistics.positives).clamp(min=0.0).detach()


def hard_weighted_rest(
    sharp: Float[Tensor, " n"], mild: Float[Tensor, " n"], count: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log of N · Σ_j exp((1 + β) s_j) / Σ_j exp(β s_j) (Robinson et al. 2021), from the logarithms of both sums.

    N times the mean of exp(s) over negatives drawn with probability ∝ exp(β s); for β = 0 the plain sum.

    >>> s = torch.tensor([[0.0, 2.0]])
    >>> rest = hard_weighted_rest((2 * s).logsumexp(1), s.logsumexp(1), torch.tensor([2.0]))
    >>> bool(rest > s.logsumexp(1))
    True
    """
    present = (count > 0) & (sharp > -torch.inf) & (mild > -torch.inf)
    sharp, mild = (torch.where(present, each, 0.0) for each in (sharp, mild))
    return torch.where(present, sharp - mild + torch.where(present, count, 1.0).log(), -torch.inf)


def debiased_losses(
    rest: Float[Tensor, " n"],
    positive: Float[Tensor, " n"],
    count: Float[Tensor, " n"],
    scale: Float[Tensor, ""],
    tau_plus: float,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """log(1 + G / exp(s⁺)) with G = max((Σ_j exp(s_j) - N τ⁺ exp(s⁺)) / (1 - τ⁺), N exp(-scale)) (Chuang et al. 2020),
    and of which queries G stands at its least.

    Of N negatives drawn from everything a share τ⁺ are positives in truth, which the second term takes off; the
    least is what N negatives at cosine -1 have. 0 for a query without negatives.

    >>> rest, positive = torch.tensor([5.0]).log(), torch.tensor([1.0]).log()
    >>> loss, least = debiased_losses(rest, positive, torch.tensor([2.0]), torch.tensor(1.0), 0.5)
    >>> round(loss.exp().item(), 3), least.item()  # 1 + (5 - 2 · .5 · 1) / .5
    (9.0, False)
    """
    present = (count > 0) & (rest > -torch.inf)
    count = torch.where(present, count, 1.0)
    odds = torch.where(present, rest - positive, 0.0)  # logarithm of Σ exp(s_j) / exp(s⁺)
    drawn = count * tau_plus
    # Where the difference is small, it is taken of numbers: that of their logarithms would have no digits. Where the
    # sum is far above, its exponential may be out of range.
    near = odds < drawn.log() + 1.0
    low = torch.where(near, odds, 0.0).exp()
    close = torch.log1p(torch.relu(low - drawn) / (1.0 - tau_plus))
    high = torch.where(near, drawn.log() + 2.0, odds)
    estimate = high + torch.log1p(-drawn * torch.exp(-high)) - math.log1p(-tau_plus)
    far = torch.nn.functional.softplus(estimate, threshold=50.0)
    value = torch.where(near, close, far)
    least = torch.nn.functional.softplus(count.log() - scale - positive, threshold=50.0)
    clamped = value.detach() < least.detach()
    value = torch.where(clamped, least, value)
    return torch.where(present, value, 0.0), clamped & present
