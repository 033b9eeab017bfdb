"""Retrieval scored honestly: the whole gallery, expected ranks, intervals, and the score of guessing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.errors import NearfarError
from nearfar.metrics.counting import TILE, Counts, Side, count_ranks
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import mean_interval, median_places
from nearfar.metrics.ranks import Ranks
from nearfar.metrics.relevance import read_relevance

__all__ = ["rank_estimates", "retrieval_metrics", "retrieval_ranks"]

Embeddings = Float[Tensor, "n d"] | np.ndarray


@overload
def retrieval_metrics(
    queries: Embeddings,
    keys: Embeddings,
    relevant: Any = None,
    ks: Iterable[int] = (1, 5, 10),
    *,
    both: Literal[False] = False,
    normalize: bool = True,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
    tile: tuple[int, int] = TILE,
) -> dict[str, Estimate]: ...


@overload
def retrieval_metrics(
    queries: Embeddings,
    keys: Embeddings,
    relevant: Any = None,
    ks: Iterable[int] = (1, 5, 10),
    *,
    both: Literal[True],
    normalize: bool = True,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
    tile: tuple[int, int] = TILE,
) -> tuple[dict[str, Estimate], dict[str, Estimate]]: ...


def retrieval_metrics(
    queries: Embeddings,
    keys: Embeddings,
    relevant: Any = None,
    ks: Iterable[int] = (1, 5, 10),
    *,
    both: bool = False,
    normalize: bool = True,
    confidence: float = 0.95,
    bootstrap: int = 1000,
    seed: int = 0,
    split: str | None = None,
    tile: tuple[int, int] = TILE,
) -> dict[str, Estimate] | tuple[dict[str, Estimate], dict[str, Estimate]]:
    """R@k for each of ``ks``, MRR and the median rank, as estimates with interval and chance level.

    ``queries`` (n, d) are ranked against all ``keys`` (m, d) by cosine, or by dot product with
    ``normalize=False``. ``both=True`` gives the pair (queries to keys, keys to queries) from one product.

    ``relevant`` states who belongs to whom: ``None`` pairs by position; a 1-d integer tensor holds the index
    of each query's key (−1: none); a list of lists the indices of each query's keys; a tuple ``(query_labels,
    key_labels)`` makes equal labels relevant, which is how duplicates of the positive are declared; a Boolean
    (n, m) matrix may be dense or sparse. The best relevant key decides. Queries without any are left out and
    counted in the protocol.

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
    """
    wanted = _checked_ks(ks)
    options: dict[str, Any] = {"confidence": confidence, "bootstrap": bootstrap, "seed": seed, "split": split}
    ranks = retrieval_ranks(queries, keys, relevant, both=both, normalize=normalize, tile=tile)
    if isinstance(ranks, tuple):
        return rank_estimates(ranks[0], wanted, **options), rank_estimates(ranks[1], wanted, **options)
    return rank_estimates(ranks, wanted, **options)


@overload
def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: Any = None,
    *,
    both: Literal[False] = False,
    normalize: bool = True,
    tile: tuple[int, int] = TILE,
) -> Ranks: ...


@overload
def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: Any = None,
    *,
    both: Literal[True],
    normalize: bool = True,
    tile: tuple[int, int] = TILE,
) -> tuple[Ranks, Ranks]: ...


@overload
def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: Any = None,
    *,
    both: bool,
    normalize: bool = True,
    tile: tuple[int, int] = TILE,
) -> Ranks | tuple[Ranks, Ranks]: ...


def retrieval_ranks(
    queries: Embeddings,
    keys: Embeddings,
    relevant: Any = None,
    *,
    both: bool = False,
    normalize: bool = True,
    tile: tuple[int, int] = TILE,
) -> Ranks | tuple[Ranks, Ranks]:
    """Per query counts behind every rank metric; arguments as in ``retrieval_metrics``.

    ``ranks.reciprocal()`` and ``ranks.hits(k)`` are the per-query scores that ``paired_difference`` takes.

    >>> import torch
    >>> retrieval_ranks(torch.eye(3), torch.eye(3)[[0, 0, 2]]).expected()
    array([1.5, 2. , 1. ])
    """
    sides = _side(queries, "queries", normalize), _side(keys, "keys", normalize)
    if sides[0].rows.shape[1] != sides[1].rows.shape[1]:
        raise NearfarError(
            f"queries have {sides[0].rows.shape[1]} dimensions and keys {sides[1].rows.shape[1]}; "
            "a similarity needs both in one space"
        )
    if sides[0].rows.device != sides[1].rows.device:
        raise NearfarError(
            f"queries are on {sides[0].rows.device} and keys on {sides[1].rows.device}; move one of them"
        )
    relevance = read_relevance(relevant, len(sides[0]), len(sides[1]), sides[0].rows.device)
    numbers = relevance.counts()
    if not bool(numbers[0].any()):
        raise NearfarError("no query has a relevant key, so that there is nothing to score; check relevant=")
    counts = count_ranks(*sides, relevance, both=both, tile=tile)
    forward = _ranks(counts[0], numbers[0], len(sides[1]), "queries to keys", normalize)
    if counts[1] is None:
        return forward
    return forward, _ranks(counts[1], numbers[1], len(sides[0]), "keys to queries", normalize)


def rank_estimates(
    ranks: Ranks,
    ks: Iterable[int] = (1, 5, 10),
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
    guess = ranks.chance()
    per_query = {f"R@{k}": (ranks.hits(k), guess.hits(k)) for k in _checked_ks(ks)}
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


def _median_rank(ranks: Ranks, guess: Ranks, confidence: float, protocol: dict[str, Any]) -> Estimate:
    n = len(ranks.better)
    first, last = median_places(n, confidence)
    low = ranks.at_place(first) if first >= 1 else 1.0
    high = ranks.at_place(last) if last <= n else float(ranks.gallery - int(ranks.relevant.min()) + 1)
    trivial = bool((ranks.relevant == ranks.gallery).all())
    own_protocol = {**protocol, "interval": "order statistics"}
    return Estimate(ranks.median(), low, high, guess.median(), n, trivial, "median_rank", own_protocol)


def _ranks(counts: Counts, relevant: Tensor, gallery: int, direction: str, normalize: bool) -> Ranks:
    scored = relevant.nonzero().flatten()
    columns = (counts.better, counts.tied, counts.relevant_tied, relevant)
    better, tied, relevant_tied, of_all = (column[scored].cpu().numpy() for column in columns)
    left_out = len(relevant) - len(scored)
    positions = scored.cpu().numpy()
    return Ranks(better, tied, relevant_tied, of_all, positions, gallery, left_out, direction, normalize)


def _side(rows: Embeddings, name: str, normalize: bool) -> Side:
    return Side(torch.as_tensor(rows), name, normalize)


def _checked_ks(ks: Iterable[int]) -> tuple[int, ...]:
    wanted = tuple(ks)
    for k in wanted:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise NearfarError(f"ks holds {k!r}, but a cut-off is a whole number from 1 up")
    return tuple(int(k) for k in wanted)
