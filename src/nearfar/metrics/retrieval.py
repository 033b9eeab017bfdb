"""Retrieval metrics over the whole gallery, and recall at k: expected ranks, intervals and chance levels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nearfar.arguments import check_dense, choice, flag, instance, numbers, shown, whole_number, whole_numbers
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import mean_interval
from nearfar.metrics.rank_kernel import TILE, Counts, count_ranks
from nearfar.metrics.ranks import Ranks
from nearfar.metrics.retrieval_inputs import (
    DIRECTIONS,
    Embeddings,
    LeaveOneOut,
    RetrievalInputs,
    check_cutoffs,
    check_interval_options,
    check_tile,
    read_inputs,
)
from nearfar.metrics.retrieval_scores import TIES, count_places, median_estimate

__all__ = ["RecallAtK", "rank_estimates", "retrieval_metrics", "retrieval_ranks"]


class RankOptions(TypedDict, total=False):
    """What ``retrieval_metrics`` and ``retrieval_ranks`` both take; explained there."""

    normalize: bool
    leave_one_out: LeaveOneOut
    query_ids: Sequence[Hashable] | None
    key_ids: Sequence[Hashable] | None
    tile: tuple[int, int]


class MetricOptions(RankOptions, total=False):
    """What ``retrieval_metrics`` takes besides."""

    metrics: Iterable[str] | str | None
    ties: str
    gain: str
    confidence: float
    bootstrap: int
    seed: int
    split: str | None


@overload
def retrieval_metrics(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    ks: Iterable[int] | int = (1, 5, 10),
    *,
    both: Literal[False] = False,
    **options: Unpack[MetricOptions],
) -> dict[str, Estimate]: ...


@overload
def retrieval_metrics(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    ks: Iterable[int] | int = (1, 5, 10),
    *,
    both: Literal[True],
    **options: Unpack[MetricOptions],
) -> tuple[dict[str, Estimate], dict[str, Estimate]]: ...


def retrieval_metrics(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    ks: Iterable[int] | int = (1, 5, 10),
    *,
    metrics: Iterable[str] | str | None = None,
    both: bool = False,
    normalize: bool = True,
    leave_one_out: LeaveOneOut = False,
    query_ids: Sequence[Hashable] | None = None,
    key_ids: Sequence[Hashable] | None = None,
    ties: str = "expected",
    gain: str = "linear",
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
    tile: tuple[int, int] = TILE,
) -> dict[str, Estimate] | tuple[dict[str, Estimate], dict[str, Estimate]]:
    """R@k for each of ``ks``, MRR and the median rank, or any ``metrics``, with interval and chance level.

    ``queries`` (n, d) are ranked against all ``keys`` (m, d) by cosine, or by dot product with
    ``normalize=False``. ``both=True`` gives the pair (queries to keys, keys to queries) from one product.

    ``relevant`` states who belongs to whom: ``None`` pairs by position; a list of integers holds the index
    of each query's key (−1: none); a list of lists, sets or arrays the indices of each query's keys; a tuple
    ``(query_labels, key_labels)`` makes equal labels relevant (a missing one, −1, NaN or None, is equal to none);
    a (n, m) matrix of Booleans or of 0 and 1 may be dense, nested lists or sparse; a dictionary ``{query id: {key
    id: grade}}`` or ``{query id: key ids}`` needs ``query_ids`` and ``key_ids``, the ids in the order of the
    rows, with which lists hold ids too; a list of ``{position: grade}`` needs none. The best relevant key decides
    R@k, MRR and the ranks. Queries without any are left out and counted in the
    protocol. What is none of these, or could be two of them, raises ``NearfarError``.

    ``leave_one_out=True`` is for one set of labelled items that are queries and keys at once: no query is a
    candidate of itself, and the chance level and the gallery are those of the others. Query i is key i, or the
    key of its id where there are ids; for queries that are part of the keys pass each one's position, −1 for one
    that is not among them. Without it a query that stands in its own gallery is warned of.

    ``metrics`` asks for others, by name: ``metrics=["nDCG@10", "MAP", "recall@k", "mean_rank"]``; which there are, and
    ``gain`` of nDCG: ``score_retrieval``, which gives the scores of single queries.

    Ties count by expectation, so that collapsed embeddings score chance (``ties="optimistic"`` and ``"pessimistic"``
    are the two ends). ``k >= gallery`` is marked trivial.
    Intervals at level ``confidence`` are Wilson's for R@k, from ``bootstrap`` resamples of the queries (BCa) for
    the MRR where that is valid and Wilson's near 0 and 1, and from order statistics for the median rank; they
    speak of new queries, not of new trainings. ``split`` (see ``split_hash``) names the evaluated items;
    estimates without it are not comparable.

    Half precision inputs are scored in float32; memory is a few tiles, whatever n and m. Embeddings with NaN
    or infinite numbers raise ``NearfarError`` with their rows.

    >>> import torch
    >>> keys = torch.eye(4)
    >>> queries = torch.tensor([[2.0, 1, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    >>> scores = retrieval_metrics(queries, keys, ks=(1,))
    >>> scores["R@1"].value, scores["MRR"].value, scores["R@1"].chance
    (0.75, 0.875, 0.25)
    >>> birds, species = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), torch.arange(50) // 5
    >>> alone = retrieval_metrics(birds, birds, (species, species), ks=(1,), leave_one_out=True)["R@1"]
    >>> alone.protocol["gallery"], round(alone.chance, 4)
    (49, 0.0816)
    """
    wanted = check_cutoffs(ks)
    confidence, bootstrap, seed, split = check_interval_options(confidence, bootstrap, seed, split)
    flag("both", both)
    tile = check_tile(tile)
    inputs = read_inputs(
        queries,
        keys,
        relevant,
        normalize=normalize,
        leave_one_out=leave_one_out,
        query_ids=query_ids,
        key_ids=key_ids,
    )
    if metrics is not None or choice("ties", ties, TIES) != "expected":
        metrics = ("R@k", "MRR", "median_rank") if metrics is None else metrics
        scored = count_places(inputs, metrics, wanted, both=both, ties=ties, gain=gain, tile=tile)
        answers = [
            each.estimates(confidence=confidence, bootstrap=bootstrap, seed=seed, split=split)
            for each in scored
        ]
        return (answers[0], answers[1]) if both else answers[0]
    ranks = _ranks_of(inputs, both, tile)
    estimates = [
        rank_estimates(r, wanted, confidence=confidence, bootstrap=bootstrap, seed=seed, split=split)
        for r in (ranks if isinstance(ranks, tuple) else (ranks,))
    ]
    return (estimates[0], estimates[1]) if both else estimates[0]


@overload
def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    *,
    both: Literal[False] = False,
    **options: Unpack[RankOptions],
) -> Ranks: ...


@overload
def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    *,
    both: Literal[True],
    **options: Unpack[RankOptions],
) -> tuple[Ranks, Ranks]: ...


@overload
def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    *,
    both: bool,
    **options: Unpack[RankOptions],
) -> Ranks | tuple[Ranks, Ranks]: ...


def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    *,
    both: bool = False,
    normalize: bool = True,
    leave_one_out: LeaveOneOut = False,
    query_ids: Sequence[Hashable] | None = None,
    key_ids: Sequence[Hashable] | None = None,
    tile: tuple[int, int] = TILE,
) -> Ranks | tuple[Ranks, Ranks]:
    """Per query counts behind every rank metric; arguments as in ``retrieval_metrics``.

    ``ranks.reciprocal()`` and ``ranks.hits(k)`` are the per-query scores that ``paired_difference`` takes.

    >>> import torch
    >>> retrieval_ranks(torch.eye(3), torch.eye(3)[[0, 0, 2]]).expected()
    array([1.5, 2. , 1. ])
    """
    flag("both", both)
    tile = check_tile(tile)
    inputs = read_inputs(
        queries,
        keys,
        relevant,
        normalize=normalize,
        leave_one_out=leave_one_out,
        query_ids=query_ids,
        key_ids=key_ids,
    )
    return _ranks_of(inputs, both, tile)


def _ranks_of(inputs: RetrievalInputs, both: bool, tile: tuple[int, int]) -> Ranks | tuple[Ranks, Ranks]:
    relevance = inputs.relevance
    numbers, candidates = relevance.counts(), relevance.candidates()
    counts = count_ranks(inputs.queries, inputs.keys, relevance, both=both, tile=tile)
    of_each = []
    for direction, counted in enumerate(counts):
        if counted is not None:
            ranks = _ranks(
                counted, numbers[direction], candidates[direction], DIRECTIONS[direction], inputs.normalized
            )
            of_each.append(
                replace(
                    ranks,
                    leave_one_out=inputs.leave_one_out,
                    without_label=relevance.without_label[direction],
                )
            )
    return (of_each[0], of_each[1]) if both else of_each[0]


def rank_estimates(
    ranks: Ranks,
    ks: Iterable[int] | int = (1, 5, 10),
    *,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
) -> dict[str, Estimate]:
    """The estimates of ``retrieval_metrics`` from counted ranks.

    >>> scores = rank_estimates(Ranks.of([0, 1, 4], tied=[0, 0, 0], gallery=5), ks=(1, 5))
    >>> {name: round(score.value, 3) for name, score in scores.items()}
    {'R@1': 0.333, 'R@5': 1.0, 'MRR': 0.567, 'median_rank': 2.0}
    >>> scores["R@5"].trivial, scores["median_rank"].chance
    (True, 3.0)
    """
    wanted = check_cutoffs(ks)
    confidence, bootstrap, seed, split = check_interval_options(confidence, bootstrap, seed, split)
    if not len(instance("ranks", ranks, Ranks).better):
        raise NearfarError("ranks are of no query; there is nothing to estimate")
    guess = ranks.chance()
    per_query = {f"R@{k}": (ranks.hits(k), guess.hits(k)) for k in wanted}
    per_query["MRR"] = (ranks.reciprocal(), guess.reciprocal())
    protocol = {**ranks.protocol(), "ties": "expected", "split": split, "confidence": confidence}
    n = len(ranks.better)
    estimates = {}
    for name, (scores, chances) in per_query.items():
        low, high, method = mean_interval(scores, confidence, resamples=bootstrap, seed=seed)
        drawn = {"resamples": bootstrap, "seed": seed} if method.startswith("bootstrap") else {}
        value, chance = float(scores.mean()), float(chances.mean())
        own_protocol = {**protocol, "interval": method, **drawn}
        estimates[name] = Estimate(
            value, low, high, chance, n, bool((chances == 1).all()), name, own_protocol
        )
    estimates["median_rank"] = median_estimate(ranks, confidence, protocol)
    return estimates


def _ranks(counts: Counts, relevant: Tensor, candidates: Tensor, direction: str, normalize: bool) -> Ranks:
    scored = relevant.nonzero().flatten()
    columns = (counts.better, counts.tied, counts.relevant_tied, relevant, candidates)
    better, tied, relevant_tied, of_all, most = (column[scored].cpu().numpy() for column in columns)
    left_out = len(relevant) - len(scored)
    gallery = int(most.max()) if len(most) else 1
    ranks = Ranks(
        better, tied, relevant_tied, of_all, scored.cpu().numpy(), gallery, left_out, direction, normalize
    )
    return ranks if (most == gallery).all() else replace(ranks, candidates=most)


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
