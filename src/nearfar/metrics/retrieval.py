"""Retrieval metrics over the whole gallery: expected ranks, intervals and chance levels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypedDict, Unpack, overload

from torch import Tensor

from nearfar.arguments import choice, flag, instance
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

__all__ = ["rank_estimates", "retrieval_metrics", "retrieval_ranks"]


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
