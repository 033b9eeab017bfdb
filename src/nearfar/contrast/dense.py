"""Dense path for small batches, where the overhead of calls exceeds the cost of the products: one matrix of all
logits.

The same numbers as the tiled kernels, by the same formulas: with the sums of exponentials over the negatives and over
the positives, a loss is log(1 + negatives / positives) + excess, which keeps its digits near convergence. What the
losses share is the way from embeddings to logits and from logit gradients back to embeddings; ``Scores`` is what
differs.

All of it runs in inference mode: there is no graph to record, and a call without that bookkeeping takes three
quarters of the time. Nothing that is returned is an inference tensor, which could not be changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.masks import Mask
from nearfar.contrast.numerics import ORDINARY, Context, full_precision, no_second_derivative
from nearfar.contrast.running_sums import Direction, Statistics, Step
from nearfar.contrast.targets import Target
from nearfar.contrast.tiles import DENSE_MAX_PAIRS, bounded, times, tiny

__all__ = [
    "Scores",
    "SmallBatch",
    "dense_own_pairs",
    "dense_sigmoid",
    "dense_softmax",
    "one_matrix",
    "small_batch",
]


class SmallBatch(NamedTuple):
    """The scale, its value, and the lengths of the rows of ``a`` and ``b`` where they are to be normalised."""

    scale: float | Tensor
    value: float
    lengths: tuple[Float[Tensor, "n 1"], Float[Tensor, "m 1"]] | None


def small_batch(
    a: Tensor,
    b: Tensor | None,
    scale: float | Tensor,
    normalize: bool,
    any_logit: bool = False,
) -> SmallBatch | None:
    """None where the pairs are many, or a short way would not be exact: on a different device or in half precision, for
    rows that are zero or far out of scale, and (but for ``any_logit``) for logits whose exponentials, or the quotients
    of these, are out of range. Whatever is wrong with the arguments is left to the long way to say.
    """
    b = a if b is None else b
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.dtype != b.dtype
        or a.dtype not in (torch.float32, torch.float64)
        or a.shape[1] != b.shape[1]
        or a.shape[1] == 0
        or not 0 < len(a) * len(b) <= DENSE_MAX_PAIRS
        or a.device.type != "cpu"
        or b.device.type != "cpu"
    ):
        return None
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return None
    value = scale.detach().item() if isinstance(scale, Tensor) else float(scale)
    lengths: list[Tensor] = []
    largest = 1.0 if normalize else 1.001
    with torch.inference_mode():
        for x in (a,) if b is a else (a, b):
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            shortest, longest = (end.item() for end in torch.aminmax(length))
            if not (shortest > ORDINARY and longest < 1.0 / ORDINARY):  # NaN is neither
                return None
            largest *= 1.001 if normalize else longest ** (2 if b is a else 1)
            lengths.append(length)
    if not (0 < value < math.inf and (any_logit or bounded(2 * value * largest, len(a), len(b), a.dtype))):
        return None
    if isinstance(scale, Tensor):
        scale = scale.reshape(()).to(a)
    return SmallBatch(scale, value, (lengths[0], lengths[-1]) if normalize else None)


#: up to so many rows, adding the transposed derivatives is quicker than a second product with them
TURNED = 512


class Scores(Protocol):
    """What a loss makes of the logits, and what its record needs of that."""

    def take(self, logits: Float[Tensor, "n m"]) -> Sequence[Float[Tensor, ""]]:
        """The values; the logits may be overwritten."""

    def logit_grads(
        self, by_first: float | None, by_second: float | None = None, /
    ) -> tuple[Float[Tensor, "n m"], float]:
        """Derivatives with respect to the logits, up to a factor that is applied later; None: an unused value."""

    def products(self, logit_grads: Float[Tensor, "n m"]) -> Float[Tensor, "n m"] | None:
        """Logit gradients times logits; None where the logits are gone."""


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


class _MatrixContext(Context):
    given: SmallBatch
    scores: Scores
    unit: tuple[Tensor, Tensor | None] | None  # rows of unit length, where this function made them


class _OneMatrix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _MatrixContext,
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
            ctx.save_for_backward(a, b)  # the caller's own, which must not change until backward
        ctx.set_materialize_grads(False)
        return tuple([value.clone() for value in values])

    @staticmethod
    def backward(ctx: _MatrixContext, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        no_second_derivative()
        if all(value is None for value in upstream):
            return (None,) * 6
        given, scores = ctx.given, ctx.scores
        a, b = ctx.saved_tensors if ctx.unit is None else ctx.unit
        by_a, by_b = torch.empty_like(a), None if b is None else torch.empty_like(b)
        by_scale = by_bias = None
        with torch.inference_mode(), full_precision(a.device):  # a vecdot is a product too
            logit_grads, factor = scores.logit_grads(
                *[None if value is None else value.item() for value in upstream]
            )
            if ctx.needs_input_grad[3]:
                by_bias = logit_grads.sum() * factor
            twice = b is None and len(a) > TURNED
            if b is None and not twice:
                logit_grads = logit_grads + logit_grads.T
            times(logit_grads, a if b is None else b, factor * given.value, out=by_a)
            if twice:
                by_a.addmm_(logit_grads.T, a, alpha=factor * given.value)
            if by_b is not None:
                times(logit_grads.T, a, factor * given.value, out=by_b)
            if ctx.needs_input_grad[2] or given.lengths is not None:
                dots, share = _dots(logit_grads, scores, a, by_a, b, by_b, twice, factor)
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
    logit_grads: Tensor,
    scores: Scores,
    a: Tensor,
    by_a: Tensor,
    b: Tensor | None,
    by_b: Tensor | None,
    twice: bool,
    factor: float,
) -> tuple[list[Tensor], float]:
    """Each row's product with its derivative, up to a factor: from the logits where these are fewer numbers."""
    products = None if a.shape[1] < logit_grads.shape[1] else scores.products(logit_grads)
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


def dense_softmax(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"] | None,
    scale: float | Tensor,
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
    if given is None or len(a) * len(a if b is None else b) > target.dense_limit:
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
            transposed = target.transposed()
            if transposed is not target:
                weight = torch.stack([weight, transposed.dense(like)])
        if without_self:
            weight.diagonal(dim1=-2, dim2=-1).zero_()  # not fill_diagonal_, which is slow
        mass = weight.sum(-1, keepdim=True)
        part = missing = None
        if (without_self or not target.every_row_has_positive) and not mass.min().item() > 0:
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
            self.target_logit = (self.due * logits).sum(-1, keepdim=True)
            losses += self.own_sum.log().sub_(self.target_logit)
        self.losses = losses
        values = [self._mean(losses)]
        if self.expected:
            self.powers, self.stacked = powers, logits
            self.mean_logit = (powers * logits).sum(-1, keepdim=True) / self.total
            values.append((self.mean_logit - self.target_logit).mean())
        return values

    def _mean(self, losses: Float[Tensor, "*two n 1"]) -> Float[Tensor, ""]:
        part = self.weights.part
        if part is None:
            return losses.mean()
        total = torch.dot(losses.flatten(), part.expand_as(losses).flatten())
        return total if losses.ndim == 2 else total * 0.5

    def logit_grads(
        self, by_loss: float | None, by_gap: float | None = None, /
    ) -> tuple[Float[Tensor, "n m"], float]:
        """By the logits, of both values, both directions added: up to a factor."""
        factor = 1.0
        if by_loss is None:
            values = self._gap_logit_grads().mul_(by_gap or 0.0)
        else:
            values, factor = self._loss_logit_grads()
            factor *= by_loss
            if by_gap is not None:
                values, factor = self._gap_logit_grads().mul_(by_gap).add_(values, alpha=factor), 1.0
        if self.both:
            rows, columns = values
            values = rows.add_(columns.T)
        return values, factor

    def _loss_logit_grads(self) -> tuple[Float[Tensor, "*two n m"], float]:
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

    def _gap_logit_grads(self) -> Float[Tensor, "*two n m"]:
        assert self.due is not None
        values = (self.stacked + (1 - self.mean_logit)).mul_(self.powers)
        values.div_(self.total).sub_(self.due)
        return values.div_(self.losses.numel())

    def products(self, logit_grads: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """LogitGrads times logits."""
        return logit_grads * self.logits

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


def dense_own_pairs(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    both: bool,
    normalize: bool,
    mask: Mask | None = None,
) -> tuple[Float[Tensor, ""], Step] | None:
    """The mean loss of partners i and i, and what its record is made of; None where this is not the place for it."""
    given = small_batch(a, b, scale, normalize)
    if given is None:
        return None
    left_out = None if mask is None else mask.tile(slice(0, len(a)), slice(0, len(b)))
    odds = _Odds(both, left_out)
    (loss,) = one_matrix(a, b, given, odds)
    return loss, Step(loss.detach(), odds.directions, given.value)


class _Odds:
    """The odds of the rest for each query, (1, n), or (2, n) in both directions."""

    def __init__(self, both: bool, mask: Tensor | None) -> None:
        self.both, self.mask = both, mask

    def take(self, logits: Float[Tensor, "n m"]) -> list[Float[Tensor, ""]]:
        """The mean loss."""
        powers = logits.exp_()
        diagonal = powers.diagonal()
        self.own = diagonal.clone()
        diagonal.zero_()
        if self.mask is not None:
            powers.mul_(self.mask.logical_not().to(powers))
        sums = [powers.sum(axis) for axis in (1, 0)[: 1 + self.both]]
        self.powers, self.total = powers, torch.stack(sums)
        self.odds = self.total / self.own
        return [self.odds.log1p().mean()]

    def logit_grads(
        self, by_loss: float | None, _: float | None = None, /
    ) -> tuple[Float[Tensor, "n m"], float]:
        """By the logits, both directions added, up to a factor."""
        each = 1.0 / (self.total + self.own)
        factor = each[0].unsqueeze(1) + each[1] if self.both else each[0].unsqueeze(1)
        values = self.powers * factor
        values.diagonal().copy_((self.total * each).sum(0).neg_())
        return values, (by_loss or 0.0) / self.total.numel()

    def products(self, logit_grads: Tensor) -> None:
        """The powers stand where the logits were."""

    def directions(self) -> list[Direction]:
        """What the record needs."""
        directions = []
        for k, axis in enumerate((1, 0)[: len(self.odds)]):
            candidates: Tensor | float = float(self.powers.shape[axis])
            left_out: Tensor | float = 0.0
            if self.mask is not None:
                candidates = (self.powers > 0).sum(axis).to(self.odds.dtype) + 1.0
                left_out = float(self.powers.shape[axis]) - candidates
            statistics = Statistics(self.powers.amax(axis).log(), candidates, 1.0, 1.0, 0.0, left_out)
            directions.append(Direction(self.odds[k].log1p(), self.total[k].log(), statistics))
        return directions


def dense_sigmoid(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    bias: Float[Tensor, ""],
    normalize: bool,
) -> tuple[Float[Tensor, ""], Callable[[], list[Direction]]] | None:
    """1/n Σ_ij softplus(t_ij (s_ij + bias)), t = -1 for own pairs and 1 for others, and what gives the numbers of its
    record; None for batches that are not small."""
    given = small_batch(a, b, scale, normalize, any_logit=True)
    if given is None or len(a) != len(b):
        return None
    signed = _Signed()
    (loss,) = one_matrix(a, b, given, signed, bias)
    return loss, signed.directions


class _Signed:
    """What stands under the softplus."""

    def take(self, logits: Float[Tensor, "n n"]) -> list[Float[Tensor, ""]]:
        """The loss."""
        logits.diagonal().neg_()
        self.logits = logits
        return [torch.nn.functional.softplus(logits, threshold=50.0).sum() / len(logits)]

    def logit_grads(
        self, by_loss: float | None, _: float | None = None, /
    ) -> tuple[Float[Tensor, "n n"], float]:
        """By the logits, up to a factor."""
        values = self.logits.sigmoid()
        values.diagonal().neg_()
        return values, (by_loss or 0.0) / len(values)

    def products(self, logit_grads: Tensor) -> None:
        """The bias and the signs have changed the logits."""

    def directions(self) -> list[Direction]:
        """What the record needs: in place of the log-sum of the rest, the sum of its probabilities."""
        rest, others = self.logits.sigmoid(), self.logits.clone()
        rest.diagonal().zero_()
        others.diagonal().fill_(-torch.inf)
        losses = torch.nn.functional.softplus(self.logits.diagonal(), threshold=50.0)
        statistics = Statistics(others.amax(1), float(len(others)), 1.0, 1.0, 0.0)
        return [Direction(losses, rest.sum(1), statistics)]
