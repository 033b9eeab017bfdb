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
from nearfar.contrast.small import small_batch
from nearfar.contrast.step import Direction, Step
from nearfar.contrast.sums import Statistics, tiny
from nearfar.contrast.targets import Target

__all__ = ["few_rows"]


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
    weights = [_Weights.of(target.dense(a), target.binary, 1, without_self)]
    if both:
        turned = target.turned()
        weights.append(
            weights[0].turned(target.symmetric)
            if turned is target
            else _Weights.of(turned.dense(a).T.contiguous(), target.binary, 0, without_self)
        )
    if not all(each.rows for each in weights):
        return None
    found: list[_Side] = []
    setting = _Setting(weights, target.binary, without_self, inside, expected)
    loss, gap = _FewRows.apply(a, b, given.scale, given.lengths, setting, found)
    return loss, gap, Step(loss.detach(), partial(_directions, found), given.value, inside)


def _directions(sides: list[_Side]) -> list[Direction]:
    return [side.direction() for side in sides]


class _Weights(NamedTuple):
    """What the positives weigh for the queries in the rows (``axis`` 1) or the columns (0), as a matrix (n, m)."""

    weight: Float[Tensor, "n m"]
    member: Float[Tensor, "n m"]  # 1 where there is a positive, else 0
    mass: Float[Tensor, " n"]
    valid: Tensor | None  # which queries have a positive; None where all do
    rows: int
    axis: int

    @classmethod
    def of(cls, weight: Tensor, binary: bool, axis: int, without_self: bool) -> _Weights:
        if without_self:
            weight.diagonal().zero_()  # not fill_diagonal_, which is slow
        mass = weight.sum(axis)
        valid = mass > 0
        count = int(valid.sum())
        member = weight if binary else weight.sign()
        return cls(weight, member, mass, None if count == len(mass) else valid, count, axis)

    def turned(self, symmetric: bool) -> _Weights:
        """The same for the queries in the columns."""
        if symmetric:
            return self._replace(axis=0)
        return self._replace(weight=self.weight.T.contiguous(), member=self.member.T.contiguous(), axis=0)


class _Setting(NamedTuple):
    weights: list[_Weights]
    binary: bool
    without_self: bool
    inside: bool
    expected: bool


class _Side:
    """One direction: its sums and losses, and the derivatives of their mean by the logits."""

    def __init__(self, weights: _Weights, logits: Tensor, powers: Tensor, setting: _Setting) -> None:
        self.weights, self.setting = weights, setting
        axis, least = weights.axis, tiny(powers)
        self.own = powers * weights.member
        self.rest = powers - self.own  # x - x and x - 0: nothing is rounded
        self.rest_sum, own_sum = self.rest.sum(axis), self.own.sum(axis)
        self.own_sum = own_sum if weights.valid is None else own_sum.clamp_(min=least)
        self.total = self.rest_sum + self.own_sum
        losses = (self.rest_sum / self.own_sum).log1p_()
        self.due: Tensor | None = None  # what each positive should have of the positives' probability
        if setting.inside and not setting.binary:
            self.due = self.own * weights.weight
            weighted = self.due.sum(axis).clamp_(min=least)
            self.due /= weighted.unsqueeze(axis)
            losses += (self.own_sum / weighted).log_()
        elif not setting.inside:
            self.due = weights.weight / weights.mass.clamp(min=least).unsqueeze(axis)
            self.held = (self.due * logits).sum(axis)
            losses += self.own_sum.log().sub_(self.held)
        self.losses = losses if weights.valid is None else torch.where(weights.valid, losses, 0.0)
        if setting.expected:
            self.mean = (powers * logits).sum(axis) / self.total

    def slopes(self) -> Float[Tensor, "n m"]:
        """By the logits, of the sum of the losses."""
        axis = self.weights.axis
        share = self.own / self.own_sum.unsqueeze(axis)
        # Apart from the share that it has beyond its due, a positive loses what the rest has: of a single one the first
        # is 0 to the last digit.
        values = share.clone() if self.due is None else share - self.due
        if self.due is None:
            values.mul_((-self.rest_sum / self.total).unsqueeze(axis))
        else:
            values.addcmul_(share, (self.rest_sum / self.total).unsqueeze(axis), value=-1)
        each = self.total.reciprocal()
        if self.weights.valid is not None:
            each = torch.where(self.weights.valid, each, 0.0)
        return values.addcmul_(self.rest, each.unsqueeze(axis))

    def gap_slopes(self, logits: Tensor, powers: Tensor) -> Float[Tensor, "n m"]:
        """By the logits, of the sum of the gaps between the mean logits under softmax and target."""
        assert self.due is not None
        axis = self.weights.axis
        values = (logits + (1 - self.mean).unsqueeze(axis)).mul_(powers).div_(self.total.unsqueeze(axis))
        return values.sub_(self.due)

    def direction(self) -> Direction:
        """What the record needs."""
        weights, axis = self.weights, self.weights.axis
        candidates = float(self.own.shape[axis] - self.setting.without_self)
        positives = weights.member.sum(axis)
        floor: Tensor | float = 0.0
        if self.setting.binary and not self.setting.inside:
            floor = positives.clamp(min=1).log()
        elif not self.setting.binary and self.setting.inside:
            floor = -weights.weight.amax(axis).clamp(min=tiny(self.own)).log()
        elif not self.setting.binary and self.due is not None:
            floor = torch.special.entr(self.due).sum(axis)
        hardest = self.rest.amax(axis).log()
        statistics = Statistics(hardest, candidates, positives, weights.mass, floor)
        return Direction(self.losses, self.rest_sum.log(), statistics)


class _FewRows(torch.autograd.Function):
    """Normalising, product, losses and their mean; the sides are left in ``found``."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor | float,
        lengths: tuple[Tensor, Tensor] | None,
        setting: _Setting,
        found: list[_Side],
    ) -> tuple[Tensor, Tensor]:
        if lengths is not None:
            a, b = a / lengths[0], None if b is None else b / lengths[1]
        with full_precision(a.device):
            logits = torch.mm(a, (a if b is None else b).T).mul_(scale)
        powers = logits.exp()
        if setting.without_self:
            powers.diagonal().zero_()
        found += [_Side(weights, logits, powers, setting) for weights in setting.weights]
        ctx.save_for_backward(a, b, scale if isinstance(scale, Tensor) else None)
        ctx.scale, ctx.lengths, ctx.sides = None if isinstance(scale, Tensor) else scale, lengths, found
        ctx.expected = (logits, powers) if setting.expected else None
        ctx.set_materialize_grads(False)
        means = [side.losses.sum() / side.weights.rows for side in found]
        mean = means[0] if len(means) == 1 else (means[0] + means[1]) * 0.5
        gap = a.new_zeros(())
        if setting.expected:
            gap = torch.stack([side.mean - side.held for side in found]).mean()
        return mean, gap

    @staticmethod
    def backward(ctx: Any, by_loss: Tensor | None, by_gap: Tensor | None) -> Any:
        no_second_derivative()
        a, b, scale = ctx.saved_tensors
        scale = ctx.scale if scale is None else scale
        sides: list[_Side] = ctx.sides
        values: Tensor | None = None
        factor: Tensor | float = 1.0
        if by_loss is not None:
            values, factor = sides[0].slopes(), by_loss / (sides[0].weights.rows * len(sides))
            for side in sides[1:]:
                values.add_(side.slopes(), alpha=sides[0].weights.rows / side.weights.rows)
        if by_gap is not None and ctx.expected is not None:
            gaps = [side.gap_slopes(*ctx.expected) for side in sides]
            total = gaps[0] if len(gaps) == 1 else gaps[0].add_(gaps[1])
            total.mul_(by_gap / (len(a) * len(sides)))
            values, factor = total if values is None else total.add_(values.mul_(factor)), 1.0
        if values is None:
            return (None,) * 6
        with full_precision(a.device):  # a vecdot is a product too
            by_a = values @ (a if b is None else b)
            by_b = None
            if b is None:
                by_a.addmm_(values.T, a)
            else:
                by_b = values.T @ a
            along = torch.linalg.vecdot(a, by_a).unsqueeze(1)
            across = None if b is None else torch.linalg.vecdot(b, by_b).unsqueeze(1)
        by_scale = along.sum() * (factor * (0.5 if b is None else 1.0)) if ctx.needs_input_grad[2] else None
        factor = factor * scale
        for x, by_x, dots, k in ((a, by_a, along, 0), (b, by_b, across, 1)):
            if by_x is not None:
                if ctx.lengths is not None:
                    by_x.addcmul_(x, dots, value=-1).div_(ctx.lengths[k])
                by_x.mul_(factor)
        return by_a, by_b, by_scale, None, None, None
