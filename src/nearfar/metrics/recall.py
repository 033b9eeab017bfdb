"""Recall at k from a matrix of scores."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nearfar.arguments import check_dense, flag, numbers, shown, whole_number, whole_numbers
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.ranks import Ranks
from nearfar.metrics.retrieval import rank_estimates

__all__ = ["RecallAtK"]


class RecallAtK:
    """The share of rows whose target is among the ``k`` highest scores, ties counted by expectation.

    ``logits`` (n, m) score m candidates for each row; ``targets`` (n,) are the columns that are right, by
    default the diagonal, or a Boolean matrix (n, m), of which the best decides and rows without any are left out.
    ``leave_one_out``: row i is column i, as in the scores of one labelled batch, and no candidate of itself.

    Only the order of scores within a row matters, not their sign or scale. ``k`` beyond the
    number of candidates is clamped to it; ``estimate`` marks the result as trivial.

    >>> recall = RecallAtK(1)
    >>> recall(torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]))
    tensor(0.5000)
    >>> recall(torch.zeros(4, 4))  # collapsed: chance, not 1
    tensor(0.2500)
    >>> RecallAtK(10).estimate(torch.eye(4)).trivial
    True
    >>> x, labels = torch.tensor([[1.0, 0.1], [0.2, 0.9], [0.8, 0.9], [0.1, 1.0]]), torch.tensor([0, 0, 1, 1])
    >>> RecallAtK(1)(x @ x.T, labels[:, None] == labels, leave_one_out=True)
    tensor(0.5000)
    """

    def __init__(self, k: int) -> None:
        self.k = whole_number("k (a cut-off)", k, 1)

    def __repr__(self) -> str:
        return f"RecallAtK({self.k})"

    @torch.no_grad()
    def __call__(
        self,
        logits: Float[Tensor, "n m"],
        targets: Int64[Tensor, " n"] | Bool[Tensor, "n m"] | None = None,
        *,
        leave_one_out: bool = False,
    ) -> Float[Tensor, ""]:
        """Expected recall as a 0-d float32 tensor on the device of ``logits``."""
        logits, right, others = _checked(logits, targets, leave_one_out)
        if right.dtype != torch.bool:
            better, tied = _single_counts(logits, right, others)
            hit = ((min(self.k, logits.shape[1]) - better).clamp(min=0) / (tied + 1).float()).clamp(max=1.0)
            return hit.mean()
        hits = _score_ranks(logits, right, others).hits(self.k)
        return torch.tensor(hits.mean(), dtype=torch.float32, device=logits.device)

    @torch.no_grad()
    def estimate(
        self,
        logits: Float[Tensor, "n m"],
        targets: Int64[Tensor, " n"] | Bool[Tensor, "n m"] | None = None,
        *,
        leave_one_out: bool = False,
        confidence: float = 0.95,
        split: str | None = None,
    ) -> Estimate:
        """The same number with interval, chance level and gallery size."""
        ranks = _score_ranks(*_checked(logits, targets, leave_one_out))
        return rank_estimates(ranks, (self.k,), confidence=confidence, split=split)[f"R@{self.k}"]


Candidates = Bool[Tensor, "n m"] | None


def _single_counts(
    logits: Tensor, targets: Tensor, others: Candidates
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Candidates above the target and level with it."""
    target = logits.gather(1, targets[:, None])
    above, level = logits > target, logits == target
    if others is not None:
        above, level = above & others, level & others
    return above.sum(1), level.sum(1) - 1


def _score_ranks(logits: Tensor, right: Tensor, others: Candidates) -> Ranks:
    gallery = logits.shape[1] if others is None else logits.shape[1] - 1
    kind: Json = {"direction": "rows to columns", "leave_one_out": others is not None}
    if right.dtype != torch.bool:
        better, tied = (count.cpu().numpy() for count in _single_counts(logits, right, others))
        one = np.ones_like(better)
        return Ranks(better, tied, one, one, np.arange(len(better)), gallery, **kind)
    n, wrong = len(right), ~right if others is None else ~right & others
    scored = right.any(1).nonzero().flatten()
    logits, right, wrong = logits[scored], right[scored], wrong[scored]
    best = logits.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    counts = ((logits > best) & wrong, (logits == best) & wrong, (logits == best) & right, right)
    above, level, right_level, all_right = (count.sum(1).cpu().numpy() for count in counts)
    return Ranks(above, level, right_level, all_right, scored.cpu().numpy(), gallery, n - len(scored), **kind)


def _checked(logits: object, targets: object, leave_one_out: object) -> tuple[Tensor, Tensor, Candidates]:
    """Scores, what is right (a column for each row, or a Boolean for each entry), and who is a candidate."""
    if not isinstance(logits, Tensor):
        logits = torch.from_numpy(numbers("logits", logits, finite=False))
    if logits.ndim != 2 or 0 in logits.shape or logits.layout != torch.strided or logits.is_complex():
        raise NearfarError(f"logits are {shown(logits)}; recall takes a matrix of scores (rows, candidates)")
    check_dense("logits", logits)
    n, m = logits.shape
    if not logits.is_floating_point():
        logits = logits.double()
    bad = logits.isnan().any(1).nonzero().flatten()
    if len(bad):
        raise NearfarError(f"logits hold NaN in {len(bad)} of {n} rows, the first is row {int(bad[0])}")
    others = None
    if flag("leave_one_out", leave_one_out):
        if n > m or m < 2:
            raise NearfarError(f"leave_one_out takes row i as column i, but logits are {n} × {m}")
        others = ~torch.eye(n, m, dtype=torch.bool, device=logits.device)
    return logits, _right(targets, n, m, others, logits.device), others


def _right(targets: object, n: int, m: int, others: Candidates, device: torch.device) -> Tensor:
    if targets is None:
        if n > m:
            raise NearfarError(
                f"the diagonal of a {n} × {m} matrix has no target for every row; pass targets="
            )
        if others is not None:
            raise NearfarError(
                "leave_one_out takes the diagonal away, which is right by default: pass targets=, such as the "
                "Boolean matrix labels[:, None] == labels"
            )
        return torch.arange(n, device=device)
    if not isinstance(targets, Tensor):
        boolean = isinstance(targets, np.ndarray) and targets.dtype == bool
        targets = torch.tensor(targets) if boolean else torch.from_numpy(whole_numbers("targets", targets))
    if targets.dtype == torch.bool and targets.shape == (n, m):
        right = targets.to(device) if others is None else targets.to(device) & others
        if not bool(right.any()):
            raise NearfarError("targets have no right column in any row, so that there is nothing to score")
        return right
    if (
        targets.shape != (n,)
        or targets.is_floating_point()
        or targets.is_complex()
        or targets.dtype == torch.bool
    ):
        raise NearfarError(
            f"targets of logits ({n}, {m}) are {n} column indices, one for each row, or a Boolean matrix of "
            f"their shape, not {tuple(targets.shape)} {targets.dtype}"
        )
    targets = targets.to(device).long()
    if bool(((targets < 0) | (targets >= m)).any()):
        raise NearfarError(
            f"targets lie between {int(targets.min())} and {int(targets.max())}, but the columns between 0 and "
            f"{m - 1}"
        )
    if others is not None and bool((targets == torch.arange(n, device=device)).any()):
        raise NearfarError("targets name a row's own column, which leave_one_out takes away")
    return targets
