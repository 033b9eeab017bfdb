"""The kernel for few pairs: where a batch is so small that calls cost more than products, one matrix and few calls.

The same numbers as ``softmax_loss`` with ``OwnPair``. With the odds of the rest, Σ exp(s_ij) / exp(s_ii), a loss is
log(1 + odds), which keeps its digits near convergence as well.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.masks import Mask
from nearfar.contrast.one_matrix import one_matrix
from nearfar.contrast.small import small_batch
from nearfar.contrast.step import Direction, Step
from nearfar.contrast.sums import Statistics

__all__ = ["few_pairs"]


def few_pairs(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
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

    def slopes(self, by_loss: float | None, _: float | None = None, /) -> tuple[Float[Tensor, "n m"], float]:
        """By the logits, both directions added, up to a factor."""
        each = 1.0 / (self.total + self.own)
        factor = each[0].unsqueeze(1) + each[1] if self.both else each[0].unsqueeze(1)
        values = self.powers * factor
        values.diagonal().copy_((self.total * each).sum(0).neg_())
        return values, (by_loss or 0.0) / self.total.numel()

    def products(self, slopes: Tensor) -> None:
        """The powers stand where the logits were."""

    def directions(self) -> list[Direction]:
        """What the record needs."""
        found = []
        for k, axis in enumerate((1, 0)[: len(self.odds)]):
            candidates: Tensor | float = float(self.powers.shape[axis])
            if self.mask is not None:
                candidates = (self.powers > 0).sum(axis).to(self.odds.dtype) + 1.0
            statistics = Statistics(self.powers.amax(axis).log(), candidates, 1.0, 1.0, 0.0)
            found.append(Direction(self.odds[k].log1p(), self.total[k].log(), statistics))
        return found
