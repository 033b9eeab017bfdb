"""Where the relevant keys of a query stand, and every metric of ranks in closed form.

The outcome of a query with one thing to find is three counts: irrelevant keys strictly more similar than the best
relevant one (``better``), irrelevant keys tied with it (``tied``), and relevant keys tied with it, itself included
(``relevant_tied``). Graded metrics and those of several relevant keys take every tie: t candidates, r of them relevant,
below s others, c of them relevant; a relevant key of it is at each of the places s + 1 … s + t with probability 1 / t.

Within a tie every order is taken as equally likely, and each metric is its expectation over those orders. Guessing is
the case in which everything is tied, so that collapsed embeddings score chance by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from numpy.typing import NDArray
from torch import digamma, from_numpy

from nearfar.arguments import flag, number, text, whole_number, whole_numbers
from nearfar.errors import NearfarError

__all__ = ["NOWHERE", "Places", "Ranks"]


@dataclass(frozen=True)
class Ranks:
    """Counts for each query that has a relevant key; ``queries`` holds the positions of those queries.

    ``relevant`` is the number of relevant keys, ``gallery`` that of all keys, ``without_relevant`` counts the
    queries that were left out, ``direction`` says which side asked, ``normalized`` whether the scores are
    cosines.

    With ``leave_one_out`` no query is a candidate of itself. ``gallery`` is then the number of others, and where only
    some queries are among the keys, ``candidates`` holds each one's number. ``without_label`` of the queries
    that were
    left out have no label.

    >>> ranks = Ranks.of([0, 3], tied=[0, 0], gallery=10)
    >>> ranks.hits(1), ranks.reciprocal(), ranks.median()
    (array([1., 0.]), array([1. , 0.25]), 2.5)
    >>> collapsed = Ranks.of([0], tied=[9], gallery=10)
    >>> collapsed.hits(1), collapsed.median()
    (array([0.1]), 5.5)
    """

    better: Int64[ndarray, " n"]
    tied: Int64[ndarray, " n"]
    relevant_tied: Int64[ndarray, " n"]
    relevant: Int64[ndarray, " n"]
    queries: Int64[ndarray, " n"]
    gallery: int
    without_relevant: int = 0
    direction: str = "queries to keys"
    normalized: bool = True
    candidates: Int64[ndarray, " n"] | None = None
    leave_one_out: bool = False
    without_label: int = 0

    def __post_init__(self) -> None:
        n = None
        for name in ("better", "tied", "relevant_tied", "relevant", "queries", "candidates"):
            if getattr(self, name) is None and name == "candidates":
                continue
            counts = whole_numbers(name, getattr(self, name))
            n = len(counts) if n is None and counts.ndim == 1 else n
            if counts.shape != (n,) or (counts < 0).any():
                raise NearfarError(
                    f"{name} has shape {counts.shape} and begins with {counts.ravel()[:3].tolist()}; it holds "
                    f"a count from 0 up for each query, in one dimension, and better has {n} of them"
                )
            object.__setattr__(self, name, counts)
        for name, least in (("gallery", 1), ("without_relevant", 0), ("without_label", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        text("direction", self.direction)
        flag("normalized", self.normalized)
        flag("leave_one_out", self.leave_one_out)
        most = self.of_each()
        wrong = np.flatnonzero(
            (self.relevant_tied > self.relevant)
            | (self.better + self.tied + self.relevant > most)
            | (most > self.gallery)
        )
        if len(wrong):
            i = int(wrong[0])
            raise NearfarError(
                f"better {self.better[i]}, tied {self.tied[i]}, relevant_tied {self.relevant_tied[i]} and "
                f"relevant {self.relevant[i]} of query {i} do not fit a gallery of {most[i]} keys"
            )

    def of_each(self) -> Int64[ndarray, " n"]:
        """How many keys each query could be given."""
        return np.full(len(self.better), self.gallery) if self.candidates is None else self.candidates

    @classmethod
    def of(cls, better: list[int], *, tied: list[int], gallery: int) -> Ranks:
        """Ranks with one relevant key per query, from plain lists of counts."""
        counts = whole_numbers("better", better), whole_numbers("tied", tied)
        ones = np.ones(counts[0].size, dtype=np.int64)
        return cls(*counts, ones, ones, np.arange(counts[0].size), gallery)

    def protocol(self) -> dict[str, object]:
        """How the ranks were measured, as an ``Estimate`` states it."""
        most = int(self.relevant.max(initial=0))
        stated: dict[str, object] = {
            "direction": self.direction,
            "gallery": self.gallery,
            "relevant_per_query": 1 if most == 1 else round(float(self.relevant.mean()), 4),
            "without_relevant": self.without_relevant,
            "similarity": "cosine" if self.normalized else "dot",
        }
        # Only where they hold, so that estimates of before stay comparable with those that they equal.
        if self.leave_one_out:
            stated["leave_one_out"] = True
        if self.without_label:
            stated["without_label"] = self.without_label
        return stated

    def chance(self) -> Ranks:
        """The same queries before a scorer that cannot tell the keys apart."""
        irrelevant = self.of_each() - self.relevant
        return replace(self, better=np.zeros_like(irrelevant), tied=irrelevant, relevant_tied=self.relevant)

    def hits(self, k: int) -> Float64[ndarray, " n"]:
        """Probability that a relevant key is among the first ``k``: 0 or 1 where no tie straddles the cut."""
        k = whole_number("k", k, 1)
        drawn = np.minimum(np.maximum(k - self.better, 0), self.tied + self.relevant_tied)
        certain = drawn > self.tied
        hit = certain.astype(np.float64)
        open_ = ~certain & (drawn > 0)
        single = open_ & (self.relevant_tied == 1)
        hit[single] = drawn[single] / (self.tied[single] + 1)
        several = open_ & (self.relevant_tied > 1)
        hit[several] = _some_drawn(self.tied[several], self.relevant_tied[several], drawn[several])
        return hit

    def reciprocal(self, k: int | None = None) -> Float64[ndarray, " n"]:
        """Expected reciprocal rank of the best relevant key, 0 beyond the first ``k`` places where that is given."""
        cut = np.inf if k is None else float(whole_number("k", k, 1))
        value = np.where(self.better < cut, 1.0 / (self.better + 1.0), 0.0)
        single = (self.tied > 0) & (self.relevant_tied == 1)
        # The mean of 1/(b+1) … 1/(b+t+1) is a difference of harmonic numbers.
        above, tied = self.better[single].astype(np.float64), self.tied[single].astype(np.float64)
        last = np.maximum(np.minimum(above + tied + 1.0, cut), above)
        harmonic = digamma(from_numpy(last + 1.0)) - digamma(from_numpy(above + 1.0))
        value[single] = harmonic.numpy() / (tied + 1.0)
        for rows, mass in self._ties_among_several():
            levels, which = np.unique(self.better[rows], return_inverse=True)
            places = np.arange(1, len(mass) + 1)
            value[rows] = np.array(
                [(mass / (level + places))[level + places <= cut].sum() for level in levels]
            )[which]
        return value

    def expected(self) -> Float64[ndarray, " n"]:
        """Expected rank of the best relevant key; the first is 1."""
        return 1.0 + self.better + self.tied / (self.relevant_tied + 1.0)

    def distribution(self) -> Float64[ndarray, " gallery"]:
        """Expected number of queries at each rank 1 … gallery."""
        clear = self.tied == 0
        counts = np.bincount(self.better[clear], minlength=self.gallery).astype(np.float64)
        single = (self.tied > 0) & (self.relevant_tied == 1)
        if single.any():
            share = 1.0 / (self.tied[single] + 1.0)
            edges = np.zeros(self.gallery + 1)
            np.add.at(edges, self.better[single], share)
            np.add.at(edges, self.better[single] + self.tied[single] + 1, -share)
            counts += np.cumsum(edges)[:-1]
        for rows, mass in self._ties_among_several():
            for level, queries in zip(*np.unique(self.better[rows], return_counts=True), strict=True):
                counts[level : level + len(mass)] += queries * mass
        return counts

    def order_statistic(self, place: float) -> float:
        """The rank of the query at ``place`` (1 … n) when queries are sorted by rank."""
        place = number("place", place, 1, max(len(self.better), 1))
        cumulated = np.cumsum(self.distribution())
        return float(np.searchsorted(cumulated, (place - 0.5) * (1 - 1e-12)) + 1)

    def at_place(self, place: float) -> float:
        """The rank at a place that may lie between two queries, interpolated."""
        place = number("place", place, 1, max(len(self.better), 1))
        below = int(place)
        low = self.order_statistic(below)
        return low if below == place else low + (place - below) * (self.order_statistic(below + 1) - low)

    def median(self) -> float:
        """The median rank over queries and over the orders within ties."""
        cumulated = np.cumsum(self.distribution())
        half = 0.5 * len(self.better)
        slack = 1e-9 * len(self.better)  # sums of shares such as 1/3 miss the half by rounding
        lower = int(np.searchsorted(cumulated, half - slack)) + 1
        upper = min(int(np.searchsorted(cumulated, half + slack, side="right")) + 1, self.gallery)
        return (lower + upper) / 2

    def _ties_among_several(self) -> Iterator[tuple[Int64[ndarray, " rows"], Float64[ndarray, " places"]]]:
        """For each kind of tie with several relevant keys: its queries, and the law of the best one's place."""
        rows = np.flatnonzero((self.tied > 0) & (self.relevant_tied > 1))
        kinds, which = np.unique(
            np.stack([self.tied[rows], self.relevant_tied[rows]]), axis=1, return_inverse=True
        )
        for kind, (tied, relevant) in enumerate(kinds.T):
            # The best place exceeds j with probability Π (t − l + 1) / (t + r − l + 1) over l ≤ j.
            step = np.arange(1, tied + 1)
            survival = np.concatenate(
                [[1.0], np.cumprod((tied - step + 1) / (tied + relevant - step + 1)), [0.0]]
            )
            yield rows[which.reshape(-1) == kind], -np.diff(survival)


def _some_drawn(tied: ndarray, relevant: ndarray, drawn: ndarray) -> ndarray:
    """Probability that ``drawn`` items of tied + relevant ones hold a relevant one: 1 − C(t, s) / C(t + r, s)."""
    t, r, s = (from_numpy(x.astype(np.float64)) for x in (tied, relevant, drawn))
    log_none = (t + 1).lgamma() - (t - s + 1).lgamma() + (t + r - s + 1).lgamma() - (t + r + 1).lgamma()
    return (-log_none.expm1()).numpy()


#: instead of a number of keys above: a relevant document that a run does not list
NOWHERE = -1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Places:
    """The ties of ``n`` queries that hold relevant keys, from the best down; ``starts`` (n + 1) are each query's first.

    Of each tie: ``above`` irrelevant keys stand before it, ``level`` are in it, with ``size`` relevant ones. Documents
    that were not retrieved are a last tie with ``above`` = ``NOWHERE``: they count as relevant and are at no place.
    ``grades`` of the relevant keys, tie after tie, falling within each; ``None`` where all are 1. ``candidates``: how
    many keys each query could be given.
    """

    starts: Int64[ndarray, " boundaries"]
    above: Int64[ndarray, " ties"]
    level: Int64[ndarray, " ties"]
    size: Int64[ndarray, " ties"]
    candidates: Int64[ndarray, " n"]
    grades: Float64[ndarray, " keys"] | None = None

    # -- what follows from the counts ------------------------------------------------------------------------------
    @property
    def owner(self) -> NDArray[np.int64]:
        """The query of each tie."""
        return np.repeat(np.arange(len(self.candidates)), np.diff(self.starts))

    @property
    def relevant(self) -> Int64[ndarray, " n"]:
        """How many keys are relevant to each query."""
        return self._sum(self.size.astype(np.float64)).astype(np.int64)

    def _sum(self, of_ties: Floats) -> Floats:
        return np.bincount(self.owner, weights=of_ties, minlength=len(self.candidates)).astype(np.float64)

    def _before(self) -> tuple[Floats, Floats, Floats, Floats]:
        """c, s, r and t of each tie."""
        whole = np.cumsum(self.size) - self.size
        relevant_before = (whole - whole[self.starts[:-1]][self.owner]).astype(np.float64)
        return (
            relevant_before,
            relevant_before + self.above,
            self.size.astype(np.float64),
            (self.level + self.size).astype(np.float64),
        )

    def chance(self) -> Places:
        """The same queries before a scorer that cannot tell the keys apart."""
        n, relevant = len(self.candidates), self.relevant
        return replace(
            self,
            starts=np.arange(n + 1),
            above=np.zeros(n, dtype=np.int64),
            level=self.candidates - relevant,
            size=relevant,
        )

    def resolved(self, ties: str) -> Places:
        """Ties broken: "optimistic" puts relevant keys first, high grades before low ones, "pessimistic" last."""
        if ties == "expected":
            return self
        tie = np.repeat(np.arange(len(self.size)), self.size)
        grades = self.grades
        above = self.above[tie]
        if ties == "pessimistic":
            above = np.where(above == NOWHERE, NOWHERE, above + self.level[tie])
            if grades is not None:  # falling within each tie: turned round they rise
                ends = np.cumsum(self.size)
                within = np.arange(len(tie)) - (ends - self.size)[tie]
                grades = grades[ends[tie] - 1 - within]
        # documents that were not retrieved may share their last tie
        keys = np.concatenate([[0], np.cumsum(self.size)])
        return replace(
            self,
            starts=keys[self.starts],
            above=above,
            level=np.zeros(len(tie), dtype=np.int64),
            size=np.ones(len(tie), dtype=np.int64),
            grades=grades,
        )

    # -- metrics -----------------------------------------------------------------------------------------------------
    def recall(self, k: int | NDArray[np.int64], of: int | NDArray[np.int64] | None = None) -> Floats:
        """Expected share of the relevant keys that are among the first ``k``, or their number over ``of``."""
        _, s, r, t = self._before()
        cut = np.broadcast_to(k, len(self.candidates))[self.owner]
        inside = np.where(self.above == NOWHERE, 0.0, r * np.clip((cut - s) / t, 0.0, 1.0))
        return self._sum(inside) / (self.relevant if of is None else of)

    def average_precision(self, k: int | NDArray[np.int64] | None = None) -> Floats:
        """Expected average precision, of the first ``k`` places: Σ of the precision at relevant keys, over all of them.

        In a tie the i-th place holds a relevant key with probability r / t, and then c + 1 + (i − 1) a of them are at
        or above it, a = (r − 1) / (t − 1). The sum over i is harmonic.
        """
        c, s, r, t = self._before()
        inside = t
        if k is not None:
            inside = np.clip(np.broadcast_to(k, len(self.candidates))[self.owner] - s, 0.0, t)
        rate = (r - 1) / np.maximum(t - 1, 1)
        total = r / t * ((c + 1 - rate * (s + 1)) * _harmonic(s, inside) + rate * inside)
        return self._sum(np.where(self.above == NOWHERE, 0.0, total)) / self.relevant

    def ndcg(self, k: int | None = None, gain: str = "linear") -> Floats:
        """Expected discounted gain 1 / log2(1 + place) of the first ``k``, over that of the best order.

        ``gain``: the grade ("linear", as trec_eval) or 2^grade − 1 ("exponential").
        """
        _, s, r, t = self._before()
        cut = self.candidates if k is None else np.minimum(k, np.maximum(self.candidates, self.relevant))
        at = cut[self.owner].astype(np.float64)
        ends = np.minimum(s + t, at), np.minimum(s, at)
        several = (t > 1) & (self.above != NOWHERE)
        longest = int(max(ends[0][several].max(initial=0), np.minimum(cut, self.relevant).max(initial=0)))
        sums = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, longest + 2)), dtype=np.longdouble)])
        discount = np.where(s < at, 1 / np.log2(np.maximum(s, 0) + 2), 0.0)
        for_several = sums[ends[0][several].astype(np.int64)] - sums[ends[1][several].astype(np.int64)]
        discount[several] = (for_several / t[several]).astype(np.float64)
        discount[self.above == NOWHERE] = 0.0
        best = np.minimum(cut, self.relevant)
        if self.grades is None:
            return self._sum(r * discount) / sums[best].astype(np.float64)
        gains = _gains(self.grades, gain)
        of_tie = np.add.reduceat(gains, np.cumsum(self.size) - self.size)
        first = np.concatenate([[0], np.cumsum(self.relevant)])
        query = np.repeat(np.arange(len(best)), self.relevant)
        ordered = gains[np.lexsort((-gains, query))]
        place = np.arange(len(gains)) - first[query]
        ideal = np.where(place < best[query], ordered / np.log2(place + 2.0), 0.0)
        return self._sum(of_tie * discount) / np.bincount(query, weights=ideal, minlength=len(best))

    def best(self, direction: str = "queries to keys") -> tuple[NDArray[np.bool_], Ranks]:
        """The ranks of each query's best relevant key, and which queries have one at a place."""
        first = self.starts[:-1]
        placed = self.above[first] != NOWHERE
        at = first[placed]
        of_all = self.relevant[placed]
        listed = (of_all, self.candidates[placed])
        gallery = int(listed[1].max(initial=1))
        return placed, Ranks(
            self.above[at],
            self.level[at],
            self.size[at],
            *(listed[0], np.flatnonzero(placed)),
            gallery,
            direction=direction,
            candidates=None if (listed[1] == gallery).all() else listed[1],
        )


def _gains(grades: Floats, gain: str) -> Floats:
    if gain == "linear":
        return grades
    if grades.max() > 500:
        raise NearfarError(
            f"gain='exponential' takes 2^grade, and a grade is {grades.max():g}; pass gain='linear'"
        )
    return np.exp2(grades) - 1


def _harmonic(s: Floats, number: Floats) -> Floats:
    """1 / (s + 1) + … + 1 / (s + number)."""
    s = np.maximum(s, 0.0)
    total = np.where(number >= 1, 1 / (s + 1), 0.0)
    several = number > 1
    high, low = (from_numpy(s[several] + more) for more in (number[several] + 1, 1.0))
    total[several] = (digamma(high) - digamma(low)).numpy()
    return total
