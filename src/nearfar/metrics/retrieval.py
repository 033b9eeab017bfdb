"""Retrieval metrics over the whole gallery: expected ranks, intervals and chance levels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypedDict, Unpack, overload

import numpy as np
from jaxtyping import Float
from torch import Tensor

from nearfar.arguments import (
    flag,
    instance,
    text,
    whole_number,
    whole_numbers,
)
from nearfar.errors import NearfarError
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import check_confidence, mean_interval, median_places
from nearfar.metrics.own_gallery import warn_of_own_keys
from nearfar.metrics.rank_kernel import TILE, Counts, Side, count_ranks
from nearfar.metrics.ranks import Ranks
from nearfar.metrics.relevance import ItemIds
from nearfar.metrics.relevance_forms import read_relevance

__all__ = ["rank_estimates", "retrieval_metrics", "retrieval_ranks"]


Embeddings = Float[Tensor, "_ d"] | np.ndarray
#: query i is key i, or the position of each query among the keys
LeaveOneOut = bool | Sequence[int] | np.ndarray | Tensor


class RankOptions(TypedDict, total=False):
    """What ``retrieval_metrics`` and ``retrieval_ranks`` both take; explained there."""

    normalize: bool
    leave_one_out: LeaveOneOut
    query_ids: Sequence[Hashable] | None
    key_ids: Sequence[Hashable] | None
    tile: tuple[int, int]


class MetricOptions(RankOptions, total=False):
    """What ``retrieval_metrics`` takes besides."""

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
    both: bool = False,
    normalize: bool = True,
    leave_one_out: LeaveOneOut = False,
    query_ids: Sequence[Hashable] | None = None,
    key_ids: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
    tile: tuple[int, int] = TILE,
) -> dict[str, Estimate] | tuple[dict[str, Estimate], dict[str, Estimate]]:
    """R@k for each of ``ks``, MRR and the median rank, as estimates with interval and chance level.

    ``queries`` (n, d) are ranked against all ``keys`` (m, d) by cosine, or by dot product with
    ``normalize=False``. ``both=True`` gives the pair (queries to keys, keys to queries) from one product.

    ``relevant`` states who belongs to whom: ``None`` pairs by position; a list of integers holds the index
    of each query's key (−1: none); a list of lists, sets or arrays the indices of each query's keys; a tuple
    ``(query_labels, key_labels)`` makes equal labels relevant (a missing one, −1, NaN or None, is equal to none);
    a (n, m) matrix of Booleans or of 0 and 1 may be dense, nested lists or sparse; a dictionary ``{query id: {key
    id: grade}}`` or ``{query id: key ids}`` needs ``query_ids`` and ``key_ids``, the ids in the order of the
    rows, with
    which lists hold ids too. The best relevant key decides. Queries without any are left out and counted in the
    protocol. What is none of these, or could be two of them, raises ``NearfarError``.

    ``leave_one_out=True`` is for one set of labelled items that are queries and keys at once: no query is a
    candidate of itself, and the chance level and the gallery are those of the others. Query i is key i, or the
    key of its
    id where there are ids; for queries that are part of the keys pass each one's position, −1 for one that is not
    among them. Without it a query that stands in its own gallery is warned of.

    Ties count by expectation, so that collapsed embeddings score chance. ``k >= gallery`` is marked trivial.
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
    wanted = _checked_ks(ks)
    confidence, bootstrap, seed, split = _interval_options(confidence, bootstrap, seed, split)
    ranks = _ranks_of(
        queries,
        keys,
        relevant,
        both,
        normalize=normalize,
        leave_one_out=leave_one_out,
        query_ids=query_ids,
        key_ids=key_ids,
        tile=tile,
    )
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
    return _ranks_of(
        queries,
        keys,
        relevant,
        both,
        normalize=normalize,
        leave_one_out=leave_one_out,
        query_ids=query_ids,
        key_ids=key_ids,
        tile=tile,
    )


def _ranks_of(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object,
    both: bool,
    *,
    normalize: bool,
    leave_one_out: LeaveOneOut,
    query_ids: Sequence[Hashable] | None,
    key_ids: Sequence[Hashable] | None,
    tile: tuple[int, int],
) -> Ranks | tuple[Ranks, Ranks]:
    flag("both", both)
    flag("normalize", normalize)
    tile = _checked_tile(tile)
    sides = Side(queries, "queries", normalize), Side(keys, "keys", normalize)
    if sides[0].rows.shape[1] != sides[1].rows.shape[1]:
        raise NearfarError(
            f"queries have {sides[0].rows.shape[1]} dimensions and keys {sides[1].rows.shape[1]}; a similarity "
            "needs both in one space"
        )
    if sides[0].rows.device != sides[1].rows.device:
        raise NearfarError(
            f"queries are on {sides[0].rows.device} and keys on {sides[1].rows.device}; move one of them"
        )
    ids = ItemIds(len(sides[0]), len(sides[1]), query_ids, key_ids)
    own = ids.own(leave_one_out)
    relevance = read_relevance(relevant, ids, sides[0].rows.device, own)
    numbers = relevance.counts()
    if not bool(numbers[0].any()):
        raise NearfarError(
            "no query has a relevant key"
            + ("" if own is None else " other than itself, which leave_one_out takes away")
            + ", so that there is nothing to score; check relevant="
        )
    warn_of_own_keys(sides[0].rows, sides[1].rows, relevance.own, relevant is None)
    counts = count_ranks(*sides, relevance, both=both, tile=tile)
    candidates = relevance.candidates()
    forward = _ranks(counts[0], numbers[0], candidates[0], "queries to keys", normalize)
    forward = replace(forward, leave_one_out=own is not None, without_label=relevance.without_label[0])
    if counts[1] is None:
        return forward
    backward = _ranks(counts[1], numbers[1], candidates[1], "keys to queries", normalize)
    return forward, replace(backward, leave_one_out=own is not None, without_label=relevance.without_label[1])


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
    wanted = _checked_ks(ks)
    confidence, bootstrap, seed, split = _interval_options(confidence, bootstrap, seed, split)
    if not len(instance("ranks", ranks, Ranks).better):
        raise NearfarError("ranks are of no query; there is nothing to estimate")
    guess = ranks.chance()
    per_query = {f"R@{k}": (ranks.hits(k), guess.hits(k)) for k in wanted}
    per_query["MRR"] = (ranks.reciprocal(), guess.reciprocal())
    most = int(ranks.relevant.max())
    protocol = {
        "direction": ranks.direction,
        "gallery": ranks.gallery,
        "relevant_per_query": 1 if most == 1 else round(float(ranks.relevant.mean()), 4),
        "without_relevant": ranks.without_relevant,
        "similarity": "cosine" if ranks.normalized else "dot",
        "ties": "expected",
        "split": split,
        "confidence": confidence,
    }
    # Only where they hold, so that estimates of before stay comparable with those that they equal.
    if ranks.leave_one_out:
        protocol["leave_one_out"] = True
    if ranks.without_label:
        protocol["without_label"] = ranks.without_label
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
    estimates["median_rank"] = _median_rank(ranks, guess, confidence, protocol)
    return estimates


def _median_rank(ranks: Ranks, guess: Ranks, confidence: float, protocol: dict[str, object]) -> Estimate:
    n = len(ranks.better)
    first, last = median_places(n, confidence)
    low = ranks.at_place(first) if first >= 1 else 1.0
    high = ranks.at_place(last) if last <= n else float((ranks.of_each() - ranks.relevant).max() + 1)
    trivial = bool((ranks.relevant == ranks.of_each()).all())
    own_protocol = {**protocol, "interval": "order statistics"}
    return Estimate(
        ranks.median(), low, high, guess.median(), n, trivial, "median_rank", own_protocol, False, "rank"
    )


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


def _checked_ks(ks: Iterable[int] | int) -> tuple[int, ...]:
    if isinstance(ks, (str, bytes, Mapping)):
        raise NearfarError(f"ks is {ks!r}; cut-offs are whole numbers, such as ks=(1, 5, 10)")
    if isinstance(ks, (Tensor, np.ndarray)):
        ks = whole_numbers("ks", ks).ravel().tolist()
    wanted = tuple(ks) if isinstance(ks, Iterable) else (ks,)
    return tuple(dict.fromkeys(whole_number("ks: a cut-off", k, 1) for k in wanted))


def _checked_tile(tile: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(tile, (tuple, list)) or len(tile) != 2:
        raise NearfarError(f"tile is {tile!r}; it is a pair of whole numbers (queries, keys)")
    return whole_number("tile: the number of queries", tile[0], 1), whole_number(
        "tile: the number of keys", tile[1], 1
    )


def _interval_options(
    confidence: float, bootstrap: int, seed: int, split: str | None
) -> tuple[float, int, int, str | None]:
    level, resamples = check_confidence(confidence), whole_number("bootstrap", bootstrap, 0)
    if 0 < resamples < 100:
        raise NearfarError(
            f"bootstrap is {bootstrap}; the ends of an interval need at least 100, and 0 means none"
        )
    return level, resamples, whole_number("seed", seed, 0), None if split is None else text("split", split)
