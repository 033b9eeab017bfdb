"""Any retrieval metric from one pass over the gallery: per query, with chance levels, and as estimates.

Names of retrieval metrics: which there are, what each counts, and how a cut-off is written.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.arguments import choice, flag, instance, mapping, numbers, shown
from nearfar.errors import NearfarError, nearest_name
from nearfar.metrics.estimate import Estimate
from nearfar.metrics.intervals import mean_intervals, median_places
from nearfar.metrics.place_kernel import place_relevant
from nearfar.metrics.rank_kernel import TILE
from nearfar.metrics.ranks import Places, Ranks
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

__all__ = [
    "KINDS",
    "NamedMetric",
    "RetrievalScores",
    "count_places",
    "median_estimate",
    "read_metrics",
    "score_of_places",
    "score_retrieval",
]


#: name without cut-off: whether it has one ("needed", "possible", "none"), and what it is
KINDS: dict[str, tuple[str, str]] = {
    "nDCG": ("possible", "discounted gain of graded relevance over that of the best order"),
    "MAP": ("possible", "mean average precision; of the first k: over all relevant keys, as trec_eval"),
    "MAP@R": ("none", "average precision of the first R, R the number of relevant keys"),
    "recall": ("needed", "share of the relevant keys that are among the first k"),
    "precision": ("needed", "share of the first k that are relevant"),
    "R-precision": ("none", "share of the first R that are relevant, R the number of relevant keys"),
    "hit": ("needed", "whether a relevant key is among the first k"),
    "R": ("needed", "the same under the name that retrieval_metrics gives it"),
    "MRR": ("possible", "reciprocal rank of the best relevant key; 0 beyond k"),
    "mean_rank": ("none", "rank of the best relevant key"),
    "median_rank": ("none", "rank of the best relevant key, its median"),
}
#: what else they are called
ALSO = {
    "p": "precision",
    "rprec": "R-precision",
    "success": "hit",
    "hit_rate": "hit",
    "hits": "hit",
    "accuracy": "hit",
    "rr": "MRR",
    "recip_rank": "MRR",
    "ap": "MAP",
}
_FORM = re.compile(r"(?P<name>[A-Za-z_-]+)(?:@(?P<cut>[0-9]+|k|K))?")


@dataclass(frozen=True)
class NamedMetric:
    """A kind of ``KINDS`` with its cut-off, None where it takes the whole ranking."""

    kind: str
    k: int | None = None

    def __str__(self) -> str:
        return self.kind if self.k is None else f"{self.kind}@{self.k}"

    @property
    def of_best(self) -> bool:
        """Whether the best relevant key decides."""
        return self.kind in ("hit", "R", "MRR", "mean_rank", "median_rank")


def read_metrics(metrics: Iterable[str] | str, ks: Iterable[int]) -> list[NamedMetric]:
    """Metrics by name, each once; ``@k`` stands for every one of ``ks``.

    >>> [str(each) for each in read_metrics(["nDCG@10", "recall@k", "map", "P@1"], (1, 5))]
    ['nDCG@10', 'recall@1', 'recall@5', 'MAP', 'precision@1']
    >>> read_metrics("recall", (1, 5))
    Traceback (most recent call last):
    nearfar.errors.NearfarError: metrics: recall needs a cut-off, such as recall@10, or recall@k for each of ks
    """
    names = [metrics] if isinstance(metrics, str) else metrics
    if (
        isinstance(names, (bytes, Mapping))
        or not isinstance(names, Iterable)
        or getattr(names, "shape", 1) == ()
    ):
        raise NearfarError(
            f"metrics is {shown(metrics)}; names are needed, such as ['nDCG@10', 'MAP', 'R@1']"
        )
    wanted: list[NamedMetric] = []
    ks = tuple(ks)
    for name in names:
        wanted += _read(name, ks)
    if not wanted:
        raise NearfarError(f"metrics names none; there are {', '.join(KINDS)}")
    return list(dict.fromkeys(wanted))


def _read(name: object, ks: tuple[int, ...]) -> list[NamedMetric]:
    if not isinstance(name, str):
        raise NearfarError(f"metrics holds {shown(name)}; names are needed, such as 'nDCG@10' or 'MAP'")
    if name.lower() == "map@r":
        return [NamedMetric("MAP@R")]
    form = _FORM.fullmatch(name.strip())
    by_small = {kind.lower(): kind for kind in KINDS}
    small = form["name"].lower() if form else ""
    kind = by_small.get(ALSO.get(small, small).lower())
    if form is None or kind is None:
        raise NearfarError(
            f"metrics: {name!r} is none of them: {nearest_name(name.split('@')[0], list(KINDS))} Cut-offs are "
            "written as in nDCG@10"
        )
    need = KINDS[kind][0]
    cut = form["cut"]
    if cut is None and need == "needed":
        raise NearfarError(f"metrics: {kind} needs a cut-off, such as {kind}@10, or {kind}@k for each of ks")
    if cut is not None and need == "none":
        raise NearfarError(f"metrics: {name!r}: {kind} has no cut-off")
    if cut is None:
        return [NamedMetric(kind)]
    if cut in "kK":
        return [NamedMetric(kind, k) for k in ks]
    if not 0 < int(cut) < 2**31:
        raise NearfarError(f"metrics: {name!r}: a cut-off is a whole number of at least 1")
    return [NamedMetric(kind, int(cut))]


TIES = ("expected", "optimistic", "pessimistic")
#: metrics that sum over the relevant keys of a query
_OF_SEVERAL = ("nDCG", "MAP", "recall", "precision", "R-precision")
GAINS = ("linear", "exponential")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """The least and the most that a metric can be, over all queries; trivial: every order scores the same."""

    low: float
    high: float
    trivial: bool

    def join(self, other: Bounds) -> Bounds:
        """Of the queries of both."""
        trivial = self.trivial and other.trivial
        return Bounds(min(self.low, other.low), max(self.high, other.high), trivial)


@dataclass(frozen=True)
class RetrievalScores(Mapping[str, Float64[ndarray, " n"]]):
    """The score of every query under each metric: ``scores["nDCG@10"]`` is what ``paired_difference`` takes.

    ``queries`` are the positions of the scored queries (those that have a relevant key), or their ids where there are
    ids; ``chances`` what guessing scores for each, in expectation. ``estimates`` gives values with intervals.

    >>> import torch
    >>> scores = score_retrieval(torch.eye(3), torch.eye(3)[[0, 0, 2]], metrics=["MRR", "nDCG"])
    >>> list(scores), scores["MRR"]
    (['MRR', 'nDCG'], array([0.75      , 0.61111111, 1.        ]))
    """

    scores: Mapping[str, Float64[ndarray, " n"]]
    chances: Mapping[str, Float64[ndarray, " n"]]
    queries: np.ndarray | Sequence[Hashable]
    protocol: Mapping[str, object] = field(default_factory=dict)
    ranks: Ranks | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = None
        for which in ("scores", "chances"):
            columns = {
                name: numbers(f"{which}[{name!r}]", column, finite=False)
                for name, column in mapping(which, getattr(self, which)).items()
            }
            for name, column in columns.items():
                n = len(column) if n is None and column.ndim == 1 else n
                if column.shape != (n,):
                    raise NearfarError(
                        f"{which}[{name!r}] has shape {column.shape}; one number for each query is needed"
                    )
            object.__setattr__(self, which, columns)
        if set(self.scores) != set(self.chances) or not self.scores:
            raise NearfarError("scores and chances are of the same metrics, of one at least")
        if not hasattr(self.queries, "__len__") or len(getattr(self.queries, "shape", (0,))) != 1:
            raise NearfarError(
                f"queries is {shown(self.queries)}; the position or id of each query is needed"
            )
        if len(self.queries) != n:
            raise NearfarError(
                f"queries has {len(self.queries)} entries for {n} scores; one for each is needed"
            )
        mapping("protocol", self.protocol)
        if self.ranks is not None:
            instance("ranks", self.ranks, Ranks)
        for name, bound in mapping("bounds", self.bounds).items():
            instance(f"bounds[{name!r}]", bound, Bounds)

    def __contains__(self, name: object) -> bool:
        return name in self.scores

    def __getitem__(self, name: str) -> Float64[ndarray, " n"]:
        try:
            return self.scores[name]
        except KeyError:
            raise NearfarError(
                f"{name!r} was not scored: {nearest_name(str(name), list(self.scores))}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def estimates(
        self, *, confidence: float = 0.95, bootstrap: int = 1000, seed: int = 0, split: str | None = None
    ) -> dict[str, Estimate]:
        """Value, interval and chance level of each metric; arguments as in ``retrieval_metrics``.

        Intervals are those of ``mean_interval``, all from the same resamples, after scores are put between 0 and 1 by
        the least and the most that they can be (three relevant keys among ten make .3 the most of precision@10). The
        median rank has order statistics.

        >>> import torch
        >>> scores = score_retrieval(torch.eye(3), torch.eye(3)[[0, 0, 2]], metrics="nDCG")
        >>> {name: round(each.value, 3) for name, each in scores.estimates().items()}
        {'nDCG': 0.842}
        """
        confidence, bootstrap, seed, split = check_interval_options(confidence, bootstrap, seed, split)
        named = self.protocol.get("split") if split is None else split
        shared = {**self.protocol, "split": named, "confidence": confidence}
        gain = shared.pop("gain", None)
        bounds = {name: self.bounds.get(name, Bounds(0.0, 1.0, False)) for name in self.scores}
        scaled = {
            name: (scores - bounds[name].low) / max(bounds[name].high - bounds[name].low, 1e-300)
            for name, scores in self.scores.items()
            if name != "median_rank"
        }
        graded = [name.split("@")[0] in _OF_SEVERAL for name in scaled]
        columns = list(scaled.values())
        intervals = mean_intervals(columns, confidence, resamples=bootstrap, seed=seed, graded=graded)
        ends = dict(zip(scaled, intervals, strict=True))
        estimates = {}
        for name, scores in self.scores.items():
            if name == "median_rank":
                assert self.ranks is not None
                estimates[name] = median_estimate(self.ranks, confidence, shared)
                continue
            bound, (low, high, method) = bounds[name], ends[name]
            low, high = (bound.low + end * (bound.high - bound.low) for end in (low, high))
            drawn = {"resamples": bootstrap, "seed": seed} if method.startswith("bootstrap") else {}
            gained = {"gain": gain} if gain is not None and name.startswith("nDCG") else {}
            estimates[name] = Estimate(
                float(scores.mean()),
                low,
                high,
                float(self.chances[name].mean()),
                len(scores),
                bound.trivial,
                name,
                {**shared, **gained, "interval": method, **drawn},
                unit="rank" if name == "mean_rank" else "",
            )
        return estimates


def score_retrieval(
    queries: Embeddings,
    keys: Embeddings,
    relevant: object = None,
    metrics: Iterable[str] | str = ("nDCG@10", "MAP", "recall@k", "MRR"),
    ks: Iterable[int] | int = (1, 5, 10),
    *,
    both: bool = False,
    normalize: bool = True,
    leave_one_out: LeaveOneOut = False,
    query_ids: Sequence[Hashable] | None = None,
    key_ids: Sequence[Hashable] | None = None,
    ties: str = "expected",
    gain: str = "linear",
    tile: tuple[int, int] = TILE,
) -> RetrievalScores | tuple[RetrievalScores, RetrievalScores]:
    """The score of each query under any of the metrics, from one pass; ``both=True``: of each key as well.

    ``metrics`` are names, in capitals or not: ``nDCG``, ``MAP``, ``MRR`` (of the whole ranking or, as ``nDCG@10``, of
    its first places), ``recall@10``, ``precision@10``, ``hit@10``, ``R-precision``, ``MAP@R``, ``mean_rank``,
    ``median_rank``. ``@k`` stands for each of ``ks``. Everything else is as in ``retrieval_metrics``.

    ``ties``: "expected" (every order within a tie is equally likely), or one end: "optimistic" puts the relevant keys
    of a tie first, "pessimistic" last. The chance level is an expectation in any case.

    ``gain`` of nDCG: "linear" takes the grades (Järvelin and Kekäläinen 2002, as trec_eval), "exponential" 2^grade − 1
    (Burges et al. 2005). Grades come from ``relevant={query: {key: grade}}`` or a list of ``{position: grade}``.

    >>> import torch
    >>> keys = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> scores = score_retrieval(keys[:1], keys[1:], [{0: 1, 1: 2}], metrics=["nDCG", "MAP", "recall@k"], ks=1)
    >>> {name: each.round(4).tolist() for name, each in scores.items()}
    {'nDCG': [0.8597], 'MAP': [1.0], 'recall@1': [0.5]}
    """
    wanted = check_cutoffs(ks)
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
    scored = count_places(inputs, metrics, wanted, both=both, ties=ties, gain=gain, tile=tile)
    return (scored[0], scored[1]) if both else scored[0]


def count_places(
    inputs: RetrievalInputs,
    metrics: Iterable[str] | str,
    ks: Iterable[int],
    *,
    both: bool,
    ties: str,
    gain: str,
    tile: tuple[int, int] = TILE,
    pairs: int | None = None,
) -> list[RetrievalScores]:
    """The scores of one direction or of both, block by block."""
    wanted = read_metrics(metrics, ks)
    choice("ties", ties, TIES)
    choice("gain", gain, GAINS)
    parts: list[list[tuple[NDArray[np.int64], RetrievalScores]]] = [[], []]

    def consume(direction: int, items: NDArray[np.int64], places: Places) -> None:
        parts[direction].append((items, score_of_places(places, wanted, ties, gain)))

    limit = {} if pairs is None else {"pairs": pairs}
    place_relevant(inputs.queries, inputs.keys, inputs.relevance, consume, both=both, tile=tile, **limit)
    relevance = inputs.relevance
    scored = []
    for direction in range(2 if both else 1):
        items = np.concatenate([each for each, _ in parts[direction]])
        ranks = _joined([each.ranks for _, each in parts[direction]])
        ranks = replace(
            ranks,
            queries=items,
            without_relevant=(relevance.queries, relevance.keys)[direction] - len(items),
            direction=DIRECTIONS[direction],
            normalized=inputs.normalized,
            leave_one_out=inputs.leave_one_out,
            without_label=relevance.without_label[direction],
        )
        columns = [
            {
                name: np.concatenate([getattr(each, which)[name] for _, each in parts[direction]])
                for name in parts[direction][0][1].scores
            }
            for which in ("scores", "chances")
        ]
        protocol = {**ranks.protocol(), "ties": ties, "gain": gain}
        bounds = {
            name: reduce(Bounds.join, (each.bounds[name] for _, each in parts[direction]))
            for name in columns[0]
        }
        scored.append(RetrievalScores(columns[0], columns[1], items, protocol, ranks, bounds))
    return scored


def score_of_places(
    places: Places, metrics: Sequence[NamedMetric], ties: str = "expected", gain: str = "linear"
) -> RetrievalScores:
    """The metrics of one block of queries."""
    at, guess = places.resolved(ties), places.chance()
    columns: list[dict[str, Floats]] = []
    of_best = []
    for each in (at, guess):
        placed, ranks = each.best()
        of_best.append(ranks)
        columns.append({str(metric): _score(each, placed, ranks, metric, gain) for metric in metrics})
    bounds = {str(metric): _bounds(places, metric, columns[1][str(metric)]) for metric in metrics}
    queries = np.arange(len(places.candidates))
    return RetrievalScores(columns[0], columns[1], queries, {}, of_best[0], bounds)


def _bounds(places: Places, metric: NamedMetric, chances: Floats) -> Bounds:
    relevant, k = places.relevant, metric.k
    if metric.kind == "mean_rank":
        worst = float((places.candidates - relevant).max() + 1)
        return Bounds(1.0, max(worst, 1.0), bool((chances <= 1 + 1e-12).all()))
    best = np.ones(len(relevant))
    if k is not None and metric.kind in ("recall", "MAP", "precision"):
        best = np.minimum(relevant, k) / (k if metric.kind == "precision" else relevant)
    return Bounds(0.0, float(best.max()), bool((chances >= best - 1e-12).all()))


def _score(places: Places, placed: NDArray[np.bool_], ranks: Ranks, metric: NamedMetric, gain: str) -> Floats:
    kind, k = metric.kind, metric.k
    if metric.of_best:
        of_placed = {
            "hit": lambda: ranks.hits(k or 1),
            "R": lambda: ranks.hits(k or 1),
            "MRR": lambda: ranks.reciprocal(k),
            "mean_rank": ranks.expected,
            "median_rank": ranks.expected,
        }[kind]()
        if placed.all():
            return of_placed
        scores = np.zeros(len(placed))
        scores[placed] = of_placed
        return scores
    relevant = places.relevant
    if kind == "nDCG":
        return places.ndcg(k, gain)
    if kind == "MAP":
        return places.average_precision(k)
    if kind == "MAP@R":
        return places.average_precision(relevant)
    if kind == "R-precision":
        return places.recall(relevant)
    assert k is not None
    return places.recall(k) if kind == "recall" else places.recall(k, of=k)


def _joined(blocks: Sequence[Ranks | None]) -> Ranks:
    every = [instance("ranks", each, Ranks) for each in blocks]
    candidates = np.concatenate([each.of_each() for each in every])
    gallery = int(candidates.max(initial=1))
    return Ranks(
        np.concatenate([each.better for each in every]),
        np.concatenate([each.tied for each in every]),
        np.concatenate([each.relevant_tied for each in every]),
        np.concatenate([each.relevant for each in every]),
        np.concatenate([each.queries for each in every]),
        gallery,
        candidates=None if (candidates == gallery).all() else candidates,
    )


def median_estimate(ranks: Ranks, confidence: float, protocol: Mapping[str, object]) -> Estimate:
    """The median rank with order statistics."""
    n = len(ranks.better)
    guess = ranks.chance()
    first, last = median_places(n, confidence)
    low = ranks.at_place(first) if first >= 1 else 1.0
    high = ranks.at_place(last) if last <= n else float((ranks.of_each() - ranks.relevant).max() + 1)
    trivial = bool((ranks.relevant == ranks.of_each()).all())
    own_protocol = {**protocol, "interval": "order statistics"}
    return Estimate(
        ranks.median(), low, high, guess.median(), n, trivial, "median_rank", own_protocol, False, "rank"
    )
