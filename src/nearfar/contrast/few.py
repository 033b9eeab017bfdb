"""The kernel for few rows: where calls cost more than products, one matrix of all pairs and as few calls as will do.

The same numbers as ``kernel``, by the same formula: with the sums of exponentials over the rest and over the positives,
a loss is log(1 + rest / positives) + excess, which keeps its digits near convergence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.one_matrix import one_matrix
from nearfar.contrast.reductions import tiny
from nearfar.contrast.small import small_batch
from nearfar.contrast.step import Direction, Step
from nearfar.contrast.sums import Statistics
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
) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None, Step] | None:
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
    with torch.inference_mode():
        weights = _Weights.of(target, a, both, without_self)
    if weights is None:
        return None
    sums = _Sums(weights, both, target.binary, without_self, inside, expected)
    loss, *gap = one_matrix(a, b, given, sums)
    return loss, gap[0] if expected else None, Step(loss.detach(), sums.directions, given.value, inside)


class _Weights(NamedTuple):
    """What the positives of each query weigh; of both directions (2, n, n) only where they are not the same matrix."""

    weight: Float[Tensor, "*two n m"]
    member: Float[Tensor, "*two n m"]  # 1 where there is a positive, else 0
    mass: Float[Tensor, "*two n 1"]
    part: Tensor | None  # of each query in the mean, 0 where it has no positive; None where all have one
    missing: Tensor | None  # 1 where a query has no positive, else 0; None likewise

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
        mass = weight.sum(-1, keepdim=True)
        part = missing = None
        if (without_self or not target.everybody) and not mass.min().item() > 0:
            missing = (mass == 0).to(mass)
            count = mass.shape[-2] - missing.sum(-2, keepdim=True)
            if not count.min().item() > 0:
                return None
            part = (1 - missing) / count
        return cls(weight, weight if target.binary else weight.sign(), mass, part, missing)


class _Sums:
    """Sums and losses of the queries, of one direction (n) or of both (2, n), and derivatives by their logits."""

    def __init__(
        self, weights: _Weights, both: bool, binary: bool, without_self: bool, inside: bool, expected: bool
    ) -> None:
        self.weights, self.both, self.binary = weights, both, binary
        self.without_self, self.inside, self.expected = without_self, inside, expected

    def take(self, logits: Float[Tensor, "n m"]) -> list[Float[Tensor, ""]]:
        """The mean loss of the queries that have a positive, averaged over the directions, and with ``expected`` the
        mean logit under the softmax over that under the target."""
        weights = self.weights
        self.logits = logits
        if self.both:
            logits = torch.stack([logits, logits.T])
        powers = logits.exp()
        if self.without_self:
            powers.diagonal(dim1=-2, dim2=-1).zero_()
        self.own = powers * weights.member
        # x - x and x - 0: nothing is rounded
        self.rest = powers - self.own if self.expected else powers.sub_(self.own)
        self.rest_sum, self.own_sum = self.rest.sum(-1, keepdim=True), self.own.sum(-1, keepdim=True)
        mass = weights.mass
        if weights.missing is not None:  # any numbers but 0 for who takes no part in the mean
            self.own_sum += weights.missing
            mass = mass + weights.missing
        self.total = self.rest_sum + self.own_sum
        self.odds = self.rest_sum / self.own_sum
        losses = self.odds.log1p()
        self.due: Tensor | None = None  # what each positive should have of the positives' probability
        if self.inside and not self.binary:
            self.due = self.own * weights.weight
            weighted = self.due.sum(-1, keepdim=True)
            if weights.missing is not None:
                weighted += weights.missing
            self.due /= weighted
            losses += (self.own_sum / weighted).log_()
        elif not self.inside:
            self.due = weights.weight / mass
            self.held = (self.due * logits).sum(-1, keepdim=True)
            losses += self.own_sum.log().sub_(self.held)
        self.losses = losses
        values = [self._mean(losses)]
        if self.expected:
            self.powers, self.stacked = powers, logits
            self.mean_logit = (powers * logits).sum(-1, keepdim=True) / self.total
            values.append((self.mean_logit - self.held).mean())
        return values

    def _mean(self, losses: Float[Tensor, "*two n 1"]) -> Float[Tensor, ""]:
        part = self.weights.part
        if part is None:
            return losses.mean()
        total = torch.dot(losses.flatten(), part.expand_as(losses).flatten())
        return total if losses.ndim == 2 else total * 0.5

    def slopes(
        self, by_loss: float | None, by_gap: float | None = None, /
    ) -> tuple[Float[Tensor, "n m"], float]:
        """By the logits, of both values, both directions added: up to a factor."""
        factor = 1.0
        if by_loss is None:
            values = self._slopes_of_gap().mul_(by_gap or 0.0)
        else:
            values, factor = self._slopes_of_loss()
            factor *= by_loss
            if by_gap is not None:
                values, factor = self._slopes_of_gap().mul_(by_gap).add_(values, alpha=factor), 1.0
        if self.both:
            rows, columns = values
            values = rows.add_(columns.T)
        return values, factor

    def _slopes_of_loss(self) -> tuple[Float[Tensor, "*two n m"], float]:
        of_rest = self.odds / self.total
        # With the sign turned. Apart from the share that it has beyond its due, a positive loses what the rest has: of
        # a single one the first is 0 to the last digit.
        if self.due is None:
            values = self.own * of_rest
        else:
            values = torch.addcdiv(self.due, self.own, self.own_sum, value=-1)
            values.addcmul_(self.own, of_rest)
        values.addcdiv_(self.rest, self.total, value=-1)
        part = self.weights.part
        if part is None:
            return values, -1.0 / self.losses.numel()
        return values.mul_(part), -1.0 if self.losses.ndim == 2 else -0.5

    def _slopes_of_gap(self) -> Float[Tensor, "*two n m"]:
        assert self.due is not None
        values = (self.stacked + (1 - self.mean_logit)).mul_(self.powers)
        values.div_(self.total).sub_(self.due)
        return values.div_(self.losses.numel())

    def products(self, slopes: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Slopes times logits."""
        return slopes * self.logits

    def directions(self) -> list[Direction]:
        """What the record needs."""
        weights, like = self.weights, self.losses.squeeze(-1)
        candidates = float(self.own.shape[-1] - self.without_self)
        positives = weights.member.sum(-1).expand_as(like)
        floor = torch.zeros_like(like)
        if self.binary and not self.inside:
            floor = positives.clamp(min=1).log()
        elif not self.binary and self.inside:
            floor = -weights.weight.amax(-1).clamp(min=tiny(like)).log()
        elif not self.binary and self.due is not None:
            floor = torch.special.entr(self.due).sum(-1)
        rest, mass = self.rest_sum.squeeze(-1), weights.mass.squeeze(-1)
        rows = (like, rest.log(), self.rest.amax(-1).log(), positives, mass, floor)
        return [
            Direction(losses, rest, Statistics(hardest, candidates, count, mass, least))
            for losses, rest, hardest, count, mass, least in zip(
                *(x.expand_as(like).reshape(-1, like.shape[-1]) for x in rows), strict=True
            )
        ]
