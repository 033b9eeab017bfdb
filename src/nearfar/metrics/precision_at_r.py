"""MAP@R: how purely the nearest items of a labelled set are of the query's class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.arguments import check_dense, whole_number
from nearfar.errors import NearfarError
from nearfar.labels import MISSING, whole_labels
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import check_confidence, mean_interval

__all__ = ["average_precision_at_r", "map_at_r", "map_estimate"]

_TILE = 1 << 24  # similarities in memory at a time


def map_at_r(
    embeddings: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"] | Int[Tensor, "n labels"],
    *,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
) -> Estimate:
    """Mean average precision at R of one labelled set (Musgrave et al. 2020), each item a query for all others.

    Of a query whose class has R other items, the R nearest by cosine are looked at: 1/R Σ_{i ≤ R} of the precision
    among the first i, where the i-th is of its class. It is 1 only where all R come first.

    ``labels`` are whole numbers, −1 where one is missing (such an item is relevant to none), or multi-hot rows, of
    which a label in common makes relevant. Queries without a relevant item are left out and counted in the protocol.
    Ties count by expectation, so that collapsed embeddings score chance.

    Source: Musgrave, Belongie and Lim, "A Metric Learning Reality Check", ECCV 2020.

    >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> map_at_r(rows, torch.tensor([0, 0, 1, 1])).value, map_at_r(rows, torch.tensor([0, 1, 0, 1])).value
    (1.0, 0.0)
    """
    scores, chances = average_precision_at_r(embeddings, labels)
    return map_estimate(scores, chances, confidence=confidence, bootstrap=bootstrap, seed=seed, split=split)


def map_estimate(
    scores: Float[np.ndarray, " n"],
    chances: Float[np.ndarray, " n"],
    *,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
) -> Estimate:
    """The estimate of ``map_at_r`` from what ``average_precision_at_r`` gives."""
    kept = ~np.isnan(scores)
    if not kept.any():
        raise NearfarError("labels: no two items have one in common; there is nothing to estimate")
    confidence, bootstrap = check_confidence(confidence), whole_number("bootstrap", bootstrap, 0)
    low, high, method = mean_interval(scores[kept], confidence, resamples=bootstrap, seed=seed)
    drawn = {"resamples": bootstrap, "seed": seed} if method.startswith("bootstrap") else {}
    protocol = {
        "gallery": len(scores) - 1,
        "without_relevant": int((~kept).sum()),
        "similarity": "cosine",
        "leave_one_out": True,
        "ties": "expected",
        "split": split,
        "confidence": confidence,
        "interval": method,
        **drawn,
    }
    chance = float(chances[kept].mean())
    trivial = bool((chances[kept] == 1).all())
    return Estimate(
        float(scores[kept].mean()), low, high, chance, int(kept.sum()), trivial, "MAP@R", protocol
    )


@torch.no_grad()
def average_precision_at_r(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"] | Int[Tensor, "n labels"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The score of each query and what it is by chance, in float64; NaN where no other item is relevant."""
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise NearfarError("embeddings: a tensor of rows (n, d) of floating point is needed")
    check_dense("embeddings", embeddings)
    if isinstance(labels, Tensor):
        check_dense("labels", labels)
    labels = whole_labels(labels, "labels")
    n = len(embeddings)
    if labels.ndim not in (1, 2) or len(labels) != n:
        raise NearfarError(
            f"labels are {tuple(labels.shape)} for {n} rows of embeddings; one each, or a multi-hot row, is needed"
        )
    if not bool(embeddings.isfinite().all()):
        raise NearfarError("embeddings are not finite")
    rows = torch.nn.functional.normalize(embeddings.float(), dim=1)
    labels = labels.to(rows.device)
    scores, chances = [], []
    for start, relevant in _relevant(labels, n):
        part = slice(start, start + len(relevant))
        counts = relevant.sum(1)
        most = int(counts.max())
        if not most:
            scores.append(torch.full((len(relevant),), torch.nan, dtype=torch.float64))
            chances.append(scores[-1])
            continue
        similar = rows[part] @ rows.T
        similar[torch.arange(len(relevant)), torch.arange(start, start + len(relevant))] = -torch.inf
        scores.append(_expected(similar, relevant, counts, most))
        level = torch.arange(1, most + 1, dtype=torch.float64)
        share = ((counts - 1) / max(n - 2, 1)).double().cpu()[:, None]
        at = (1 + (level - 1) * share) / level / (n - 1)
        chances.append(torch.where(level <= counts.cpu()[:, None], at, 0).sum(1))
        chances[-1][counts.cpu() == 0] = torch.nan
    return torch.cat(scores).numpy(), torch.cat(chances).numpy()


def _relevant(labels: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """Which items are relevant to some queries, a tile of them at a time; no item is to itself."""
    size = max(1, _TILE // max(n, 1))
    for start in range(0, n, size):
        own = labels[start : start + size]
        if labels.ndim == 1:
            relevant = (own[:, None] == labels) & (own != MISSING)[:, None]
        else:
            relevant = ((own == 1).float() @ (labels == 1).float().T) > 0
        relevant[torch.arange(len(own)), torch.arange(start, start + len(own))] = False
        yield start, relevant


def _expected(
    similar: Float[Tensor, "q n"], relevant: Tensor, counts: Int[Tensor, " q"], most: int
) -> Float[Tensor, " q"]:
    """Average precision at R of each query, the mean over the orders that equal similarities may stand in.

    In a run of t equal ones, r of them relevant, after c relevant ones in s places, the i-th place is relevant with
    probability r/t, and then holds c + 1 + (i − s − 1)(r − 1)/(t − 1) of them so far.
    """
    values, order = similar.topk(most, dim=1)
    right = relevant.gather(1, order).double()
    place = torch.arange(1, most + 1, device=values.device)
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    run = begins.cumsum(1) - 1
    size = torch.zeros_like(right).scatter_add_(1, run, torch.ones_like(right))
    hits = torch.zeros_like(right).scatter_add_(1, run, right)
    last, worst = run[:, -1:], values[:, -1:]  # a run may go on beyond the first R
    tied = similar == worst
    size.scatter_(1, last, tied.sum(1, keepdim=True).double())
    hits.scatter_(1, last, (tied & relevant).sum(1, keepdim=True).double())
    first = torch.where(begins, place - 1, 0).cummax(1).values
    before = (right.cumsum(1) - right).gather(1, first)
    t, r = size.gather(1, run), hits.gather(1, run)
    within = (place - first - 1) * (r - 1) / (t - 1).clamp(min=1)
    terms = r / t * (before + 1 + within) / place
    total = torch.where(place <= counts[:, None], terms, 0).sum(1)
    return torch.where(counts > 0, total / counts, torch.nan).cpu()
