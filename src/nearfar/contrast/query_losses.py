"""From the kernel's sums to the loss of each query: what a positive is told apart from.

The denominator holds "all" candidates (InfoNCE, SupCon); of each positive on its "own" the negatives and itself
(NT-Xent with several positives); or the "negatives" alone (decoupled contrastive learning).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.contrast.listed import listed_logits
from nearfar.contrast.precision import full_precision
from nearfar.contrast.sums import Statistics
from nearfar.errors import NearfarError

__all__ = [
    "DENOMINATORS",
    "REDUCTIONS",
    "Sums",
    "as_recorded",
    "check_denominator",
    "check_reduction",
    "each_alone",
    "partners",
]

DENOMINATORS = ("all", "own", "negatives")
REDUCTIONS = ("mean", "sum", "none")


def check_denominator(denominator: str) -> str:
    """``NearfarError`` unless it is known."""
    if denominator not in DENOMINATORS:
        raise NearfarError(
            f"denominator is {denominator!r}; it holds 'all' candidates, the positive's 'own' "
            "negatives and itself, or the 'negatives' alone"
        )
    return denominator


def check_reduction(reduction: str) -> str:
    """``NearfarError`` unless it is known."""
    if reduction not in REDUCTIONS:
        raise NearfarError(f"reduction is {reduction!r}; it is 'mean', 'sum' or 'none'")
    return reduction


class Sums(NamedTuple):
    """What the kernel says of each query of one direction; ``nearfar.contrast.kernel`` defines the fields."""

    rest: Float[Tensor, " n"]
    positive: Float[Tensor, " n"]
    excess: Float[Tensor, " n"] | None
    expected: Float[Tensor, " n"] | None
    statistics: Statistics

    def mean_logit(self) -> Float[Tensor, " n"]:
        """The mean logit under the softmax, which ``expected=True`` asks for."""
        if self.expected is None:
            raise NearfarError("the mean logit was not computed: call log_sums with expected=True")
        return self.expected

    def losses(self, denominator: str = "all") -> Float[Tensor, " n"]:
        """The loss of each query; 0, without a gradient, where it has no positive.

        Of the ``denominator`` "negatives" also where it has no negative: nothing is there to be told apart from.
        """
        gap = self.rest - self.positive
        if denominator == "negatives":
            there = (self.rest > -torch.inf) & (torch.zeros_like(gap) + self.statistics.positives > 0)
            value = torch.where(there, gap, 0.0)
            return value if self.excess is None else value + torch.where(there, self.excess, 0.0)
        if not isinstance(self.statistics.positives, float):
            gap = torch.where(self.statistics.positives > 0, gap, -torch.inf)
        # Beyond the threshold softplus gives its argument: at 50 that is exact in float64 too.
        value = torch.nn.functional.softplus(gap, threshold=50.0)
        return value if self.excess is None else value + self.excess


def partners(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], scale: Tensor) -> Sums:
    """The sums of queries whose only candidate in the batch is their partner."""
    with full_precision(a.device):
        logits = torch.linalg.vecdot(a, b) * scale
    nothing = torch.full_like(logits, -torch.inf).detach()
    return Sums(nothing, logits, None, None, Statistics(nothing, 1.0, 1.0, 1.0, 0.0))


def each_alone(
    sums: Sums,
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    scale: Tensor,
    positives: tuple[Int[Tensor, " p"], Int[Tensor, " p"], Float[Tensor, " p"]],
) -> Float[Tensor, " n"]:
    """The loss of queries each of whose positives is told apart from the negatives on its own: their weighted mean."""
    row, column, weight = (each.to(queries.device) for each in positives)
    logits = listed_logits(queries, keys, row, column) * scale
    each = torch.nn.functional.softplus(sums.rest[row] - logits, threshold=50.0)
    weight, nothing = weight.to(each), torch.zeros_like(sums.rest)
    mass = nothing.index_add(0, row, weight)
    return nothing.index_add(0, row, each * weight / mass[row])


def as_recorded(sums: Sums, denominator: str, inside: bool, scale: Tensor, unit: bool) -> Sums:
    """The sums with the candidates and the floor of their denominator.

    Told apart from negatives alone, no loss is below that of a positive at cosine 1 and negatives at -1.
    """
    if denominator == "all":
        return sums
    old, like = sums.statistics, torch.zeros_like(sums.rest)
    positives = like + old.positives
    negatives = old.candidates - positives
    if denominator == "own":
        return sums._replace(statistics=replace(old, candidates=negatives + 1.0, floor=0.0))
    floor = negatives.log() - (2.0 * scale.detach().to(like) if unit else torch.inf)
    if inside:
        floor = floor - (like + old.mass).log()
    floor = torch.where((negatives > 0) & (positives > 0), floor, 0.0)
    return sums._replace(statistics=replace(old, candidates=negatives, floor=floor))
