"""How far above each query's best relevant key the others stand, and every rank metric in closed form.

A query's outcome is three counts: irrelevant keys strictly more similar than the best relevant one
(``better``), irrelevant keys tied with it (``tied``), and relevant keys tied with it, itself included
(``relevant_tied``). Within a tie every order is taken as equally likely, and each metric is its expectation
over those orders. Guessing is the case in which everything is tied, so that collapsed embeddings score chance
by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from torch import digamma, from_numpy

from nearfar.arguments import flag, number, text, whole_number, whole_numbers
from nearfar.errors import NearfarError

__all__ = ["Ranks"]


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
