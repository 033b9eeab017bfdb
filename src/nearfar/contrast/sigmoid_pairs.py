"""The pairwise sigmoid of few pairs: one matrix, few calls. See ``sigmoid`` for the tiled one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.contrast.one_matrix import one_matrix
from nearfar.contrast.small import small_batch
from nearfar.contrast.step import Direction
from nearfar.contrast.sums import Statistics

__all__ = ["few_sigmoid_pairs"]


def few_sigmoid_pairs(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "n d"],
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

    def slopes(self, by_loss: float | None, _: float | None = None, /) -> tuple[Float[Tensor, "n n"], float]:
        """By the logits, up to a factor."""
        values = self.logits.sigmoid()
        values.diagonal().neg_()
        return values, (by_loss or 0.0) / len(values)

    def products(self, slopes: Tensor) -> None:
        """The bias and the signs have changed the logits."""

    def directions(self) -> list[Direction]:
        """What the record needs: in place of the log-sum of the rest, the sum of its probabilities."""
        rest, others = self.logits.sigmoid(), self.logits.clone()
        rest.diagonal().zero_()
        others.diagonal().fill_(-torch.inf)
        losses = torch.nn.functional.softplus(self.logits.diagonal(), threshold=50.0)
        statistics = Statistics(others.amax(1), float(len(others)), 1.0, 1.0, 0.0)
        return [Direction(losses, rest.sum(1), statistics)]
