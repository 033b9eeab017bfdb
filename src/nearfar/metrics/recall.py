"""Recall at k from a matrix of scores, as one has it for a batch in training."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from nearfar.errors import NearfarError
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.ranks import Ranks
from nearfar.metrics.retrieval import rank_estimates

__all__ = ["RecallAtK"]


class RecallAtK:
    """The share of rows whose target is among the ``k`` highest scores, ties counted by expectation.

    ``logits`` (n, m) score m candidates for each row; ``targets`` (n,) are the columns that are right, by
    default the diagonal. Only the order of scores within a row matters, not their sign or scale. ``k`` beyond
    the number of candidates is clamped to it; ``estimate`` marks the result as trivial.

    >>> recall = RecallAtK(1)
    >>> recall(torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]))
    tensor(0.5000)
    >>> recall(torch.zeros(4, 4))  # collapsed: chance, not 1
    tensor(0.2500)
    >>> RecallAtK(10).estimate(torch.eye(4)).trivial
    True
    """

    def __init__(self, k: int) -> None:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise NearfarError(f"k is {k!r}, but a cut-off is a whole number from 1 up")
        self.k = int(k)

    def __repr__(self) -> str:
        return f"RecallAtK({self.k})"

    @torch.no_grad()
    def __call__(
        self, logits: Float[Tensor, "n m"], targets: Int64[Tensor, " n"] | None = None
    ) -> Float[Tensor, ""]:
        """Expected recall as a 0-d float32 tensor on the device of ``logits``."""
        better, tied = _counts(logits, targets)
        k = min(self.k, logits.shape[1])
        hit = ((k - better).clamp(min=0) / (tied + 1).float()).clamp(max=1.0)
        return hit.mean()

    @torch.no_grad()
    def estimate(
        self,
        logits: Float[Tensor, "n m"],
        targets: Int64[Tensor, " n"] | None = None,
        *,
        confidence: float = 0.95,
        split: str | None = None,
    ) -> Estimate:
        """The same number with interval, chance level and gallery size."""
        better, tied = (count.cpu().numpy() for count in _counts(logits, targets))
        one = np.ones_like(better)
        ranks = Ranks(
            better, tied, one, one, np.arange(len(better)), logits.shape[1], direction="rows to columns"
        )
        return rank_estimates(ranks, (self.k,), confidence=confidence, split=split)[f"R@{self.k}"]


def _counts(logits: Tensor, targets: Tensor | None) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    if logits.ndim != 2 or 0 in logits.shape:
        raise NearfarError(
            f"logits have shape {tuple(logits.shape)}; recall takes a matrix (rows, candidates)"
        )
    n, m = logits.shape
    bad = logits.isnan().any(1).nonzero().flatten()
    if len(bad):
        raise NearfarError(f"logits hold NaN in {len(bad)} of {n} rows, the first is row {int(bad[0])}")
    if targets is None:
        if n > m:
            raise NearfarError(
                f"the diagonal of a {n} × {m} matrix has no target for every row; pass targets="
            )
        targets = torch.arange(n, device=logits.device)
    if targets.shape != (n,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise NearfarError(
            f"targets are {n} column indices, one for each row, not {tuple(targets.shape)} {targets.dtype}"
        )
    if bool(((targets < 0) | (targets >= m)).any()):
        raise NearfarError(
            f"targets lie between {int(targets.min())} and {int(targets.max())}, "
            f"but the columns between 0 and {m - 1}"
        )
    target = logits.gather(1, targets.long()[:, None])
    return (logits > target).sum(1), (logits == target).sum(1) - 1
