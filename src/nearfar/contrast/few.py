"""The kernel for few rows: where calls cost more than products, one matrix of all pairs and as few calls as will do.

The same numbers as ``kernel``, by the same formula: with the sums of exponentials over the rest and over the positives,
a loss is log(1 + rest / positives) + excess, which keeps its digits near convergence.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.precision import full_precision, no_second_derivative
from nearfar.contrast.reductions import tiny
from nearfar.contrast.small import small_batch
from nearfar.contrast.step import Direction, Step
from nearfar.contrast.sums import Statistics
from nearfar.contrast.targets import Target

__all__ = ["few_rows"]

#: up to so many rows, adding the transposed derivatives is quicker than a second product with them
TURNED = 512


def few_rows(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    scale: float | Float[Tensor, ""],
    target: Target,
    *,
    both: bool = False,
    without_self: bool = False,
    inside: bool = False,
    normalize: bool = True,
    expected: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Step] | None:
    """The mean loss of ``softmax_loss`` and what its record is made of; None for batches that are not small (``small``)
    or in which nothing has a positive.

    Between the two, with ``expected``: how far the mean logit under the softmax lies above that under the target,
    averaged over rows and directions; all rows must have a positive then, and the sum stands outside the logarithm.
    """
    given = small_batch(a, b, scale, normalize)
    if given is None or len(a) * len(a if b is None else b) > target.few_pairs:
        return None
    if both and target.shape[0] != target.shape[1]:
        return None
    weights = _Weights.of(target, a, both, without_self)
    if weights is None:
        return None
    setting = _Setting(weights, both, target.binary, without_self, inside, expected)
    found: list[_Sums] = []
    loss, gap = _FewRows.apply(a, b, given.scale, given.lengths, setting, found)
    return loss, gap, Step(loss.detach(), partial(_directions, found), given.value, inside)


class _Weights(NamedTuple):
    """What the positives of each query weigh; of both directions (2, n, n) only where they are not the same matrix."""

    weight: Float[Tensor, "*two n m"]
    member: Float[Tensor, "*two n m"]  # 1 where there is a positive, else 0
    mass: Float[Tensor, "*two n"]
    part: Tensor | None  # of each query in the mean, 0 where it has no positive; None where all have one

    @classmethod
    def of(cls, target: Target, like: Tensor, both: bool, without_self: bool) -> _Weights | None:
        """None where a direction has no positive at all."""
        weight = target.dense(like)
        if both and not target.symmetric:
            turned = target.turned()
            if turned is not target:
                weight = torch.stack([weight, turned.dense(like)])
        if without_self:
            weight.diagonal(dim1=-2, dim2=-1).zero_()  # not fill_diagonal_, which is slow
        mass = weight.sum(-1)
        part = None
        if (without_self or not target.everybody) and not mass.min() > 0:
            valid = (mass > 0).to(mass)
            count = valid.sum(-1, keepdim=True)
            if not count.min() > 0:
                return None
            part = valid / count
        return cls(weight, weight if target.binary else weight.sign(), mass, part)


class _Setting(NamedTuple):
    weights: _Weights
    both: bool
    binary: bool
    without_self: bool
    inside: bool
    expected: bool


class _Sums:
    """Sums and losses of the queries, of one direction (n) or of both (2, n), and derivatives by their logits."""

    def __init__(self, logits: Float[Tensor, "*two n m"], setting: _Setting) -> None:
        self.setting, weights = setting, setting.weights
        powers = logits.exp()
        if setting.without_self:
            powers.diagonal(dim1=-2, dim2=-1).zero_()
        least = tiny(powers)
        self.own = powers * weights.member
        # x - x and x - 0: nothing is rounded
        self.rest = powers - self.own if setting.expected else powers.sub_(self.own)
        self.rest_sum, self.own_sum = self.rest.sum(-1), self.own.sum(-1)
        if weights.part is not None:
            self.own_sum.clamp_(min=least)
        self.total = self.rest_sum + self.own_sum
        losses = (self.rest_sum / self.own_sum).log1p_()
        self.due: Tensor | None = None  # what each positive should have of the positives' probability
        if setting.inside and not setting.binary:
            self.due = self.own * weights.weight
            weighted = self.due.sum(-1).clamp_(min=least)
            self.due /= weighted.unsqueeze(-1)
            losses += (self.own_sum / weighted).log_()
        elif not setting.inside:
            mass = weights.mass if weights.part is None else weights.mass.clamp(min=least)
            self.due = weights.weight / mass.unsqueeze(-1)
            self.held = (self.due * logits).sum(-1)
            losses += self.own_sum.log().sub_(self.held)
        if weights.part is not None:
            losses = torch.where(weights.part > 0, losses, 0.0)
        self.losses, self.logits = losses, logits
        if setting.expected:
            self.powers = powers
            self.mean_logit = (powers * logits).sum(-1) / self.total

    def mean(self) -> Float[Tensor, ""]:
        """The mean loss of the queries that have a positive, averaged over the directions."""
        part = self.setting.weights.part
        return self.losses.mean() if part is None else (self.losses * part).sum(-1).mean()

    def gap(self) -> Float[Tensor, ""]:
        """The mean logit under the softmax over that under the target."""
        return (self.mean_logit - self.held).mean()

    def slopes(self) -> tuple[Float[Tensor, "*two n m"], float]:
        """By the logits, of the mean loss: up to a factor, which is cheaper to apply later."""
        of_rest = (self.rest_sum / self.total / self.own_sum).unsqueeze(-1)
        # Apart from the share that it has beyond its due, a positive loses what the rest has: of a single one the first
        # is 0 to the last digit.
        if self.due is None:
            values = self.rest / self.total.unsqueeze(-1)
        else:
            values = (self.own / self.own_sum.unsqueeze(-1)).sub_(self.due)
            values.addcdiv_(self.rest, self.total.unsqueeze(-1))
        values.addcmul_(self.own, of_rest, value=-1)
        part = self.setting.weights.part
        if part is None:
            return values, 1.0 / self.losses.numel()
        directions = 1.0 if self.losses.ndim == 1 else 0.5
        return values.mul_(part.unsqueeze(-1)), directions

    def along(
        self,
        values: Tensor,
        scale: Tensor | float,
        a: Tensor,
        by_a: Tensor,
        b: Tensor | None,
        by_b: Tensor | None,
    ) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "m 1"] | None]:
        """Each row's product with its derivative: from the logits, where these are fewer numbers than the rows."""
        if a.shape[1] < values.shape[1]:
            across = None if b is None else torch.linalg.vecdot(b, by_b).unsqueeze(1)
            return torch.linalg.vecdot(a, by_a).unsqueeze(1), across
        logits = self.logits[0] if self.setting.both else self.logits
        product = (values * logits).mul_(1.0 / scale)
        rows, columns = product.sum(1), product.sum(0)
        return (
            ((rows + columns).unsqueeze(1), None) if b is None else (rows.unsqueeze(1), columns.unsqueeze(1))
        )

    def gap_slopes(self) -> Float[Tensor, "*two n m"]:
        """By the logits, of the gap."""
        assert self.due is not None
        values = (self.logits + (1 - self.mean_logit).unsqueeze(-1)).mul_(self.powers)
        values.div_(self.total.unsqueeze(-1)).sub_(self.due)
        return values.div_(self.losses.numel())

    def directions(self) -> list[Direction]:
        """What the record needs."""
        weights, like = self.setting.weights, self.losses
        candidates = float(self.own.shape[-1] - self.setting.without_self)
        positives = weights.member.sum(-1).expand_as(like)
        floor = torch.zeros_like(like)
        if self.setting.binary and not self.setting.inside:
            floor = positives.clamp(min=1).log()
        elif not self.setting.binary and self.setting.inside:
            floor = -weights.weight.amax(-1).clamp(min=tiny(like)).log()
        elif not self.setting.binary and self.due is not None:
            floor = torch.special.entr(self.due).sum(-1)
        rows = (like, self.rest_sum.log(), self.rest.amax(-1).log(), positives, weights.mass, floor)
        return [
            Direction(losses, rest, Statistics(hardest, candidates, count, mass, least))
            for losses, rest, hardest, count, mass, least in zip(
                *(x.expand_as(like).reshape(-1, like.shape[-1]) for x in rows), strict=True
            )
        ]


def _directions(found: list[_Sums]) -> list[Direction]:
    return found[0].directions()


class _FewRows(torch.autograd.Function):
    """Normalising, product, losses and their mean; the sums are left in ``found``."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor | float,
        lengths: tuple[Tensor, Tensor] | None,
        setting: _Setting,
        found: list[_Sums],
    ) -> tuple[Tensor, Tensor | None]:
        if lengths is not None:
            a, b = a / lengths[0], None if b is None else b / lengths[1]
        with full_precision(a.device):
            logits = torch.mm(a, (a if b is None else b).T).mul_(scale)
        if setting.both:
            logits = torch.stack([logits, logits.T])
        sums = _Sums(logits, setting)
        found.append(sums)
        ctx.save_for_backward(a, b, scale if isinstance(scale, Tensor) else None)
        ctx.scale, ctx.lengths, ctx.sums = None if isinstance(scale, Tensor) else scale, lengths, sums
        ctx.set_materialize_grads(False)
        return sums.mean(), sums.gap() if setting.expected else None

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, by_gap: Tensor | None) -> Any:
        no_second_derivative()
        a, b, scale = ctx.saved_tensors
        scale = ctx.scale if scale is None else scale
        sums: _Sums = ctx.sums
        values: Tensor | None = None
        factor: Tensor | float = 1.0
        if by_loss is not None:
            values, factor = sums.slopes()
            factor = by_loss * factor
        if by_gap is not None and sums.setting.expected:
            by_gaps = sums.gap_slopes().mul_(by_gap)
            values, factor = by_gaps if values is None else by_gaps.add_(values.mul_(factor)), 1.0
        if values is None:
            return (None,) * 6
        if sums.setting.both:
            values = values[0].add_(values[1].T)
        with full_precision(a.device):  # a vecdot is a product too
            by_b = None
            if b is not None:
                by_a, by_b = values @ b, values.T @ a
            elif len(a) <= TURNED:
                by_a = (values + values.T) @ a
            else:
                by_a = (values @ a).addmm_(values.T, a)
            along, across = sums.along(values, scale, a, by_a, b, by_b)
        by_scale = along.sum() * (factor * (0.5 if b is None else 1.0)) if ctx.needs_input_grad[2] else None
        factor = factor * scale
        for x, by_x, dots, k in ((a, by_a, along, 0), (b, by_b, across, 1)):
            if by_x is not None and ctx.lengths is not None:
                by_x.addcmul_(x, dots, value=-1).mul_(factor / ctx.lengths[k])
            elif by_x is not None:
                by_x.mul_(factor)
        return by_a, by_b, by_scale, None, None, None
