"""How far above each query's best relevant key the others stand, and every rank metric in closed form.

A query's outcome is three counts: irrelevant keys strictly more similar than the best relevant one
(``better``), irrelevant keys tied with it (``tied``), and relevant keys tied with it, itself included
(``relevant_tied``). Within a tie every order is taken as equally likely, and each metric is its expectation
over those orders. Guessing is the case in which everything is tied, so that collapsed embeddings score chance
by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from torch import digamma, from_numpy

from nearfar.errors import NearfarError

__all__ = ["Ranks"]


@dataclass(frozen=True)
class Ranks:
    """Counts for each query that has a relevant key; ``queries`` holds the positions of those queries.

    ``relevant`` is the number of relevant keys, ``gallery`` that of all keys, ``without_relevant`` counts the
    queries that were left out, ``direction`` says which side asked, ``normalized`` whether the scores are
    cosines.

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

    @classmethod
    def of(cls, better: list[int], *, tied: list[int], gallery: int) -> Ranks:
        """Ranks with one relevant key per query, from plain lists of counts."""
        ones = np.ones(len(better), dtype=np.int64)
        positions = np.arange(len(better), dtype=np.int64)
        counts = (np.array(better, dtype=np.int64), np.array(tied, dtype=np.int64))
        return cls(*counts, ones, ones, positions, gallery)

    def chance(self) -> Ranks:
        """The same queries before a scorer that cannot tell the keys apart."""
        irrelevant = self.gallery - self.relevant
        return Ranks(
            np.zeros_like(irrelevant),
            irrelevant,
            self.relevant,
            self.relevant,
            self.queries,
            self.gallery,
            self.without_relevant,
            self.direction,
            self.normalized,
        )

    def hits(self, k: int) -> Float64[ndarray, " n"]:
        """Probability that a relevant key is among the first ``k``: 0 or 1 where no tie straddles the cut."""
        if k < 1:
            raise NearfarError(f"k is {k}, but the first place is k=1")
        drawn = np.minimum(np.maximum(k - self.better, 0), self.tied + self.relevant_tied)
        certain = drawn > self.tied
        hit = certain.astype(np.float64)
        open_ = ~certain & (drawn > 0)
        single = open_ & (self.relevant_tied == 1)
        hit[single] = drawn[single] / (self.tied[single] + 1)
        several = open_ & (self.relevant_tied > 1)
        hit[several] = _some_drawn(self.tied[several], self.relevant_tied[several], drawn[several])
        return hit

    def reciprocal(self) -> Float64[ndarray, " n"]:
        """Expected reciprocal rank of the best relevant key."""
        value = 1.0 / (self.better + 1.0)
        single = (self.tied > 0) & (self.relevant_tied == 1)
        # The mean of 1/(b+1) … 1/(b+t+1) is a difference of harmonic numbers.
        above, tied = self.better[single].astype(np.float64), self.tied[single].astype(np.float64)
        harmonic = digamma(from_numpy(above + tied + 2.0)) - digamma(from_numpy(above + 1.0))
        value[single] = harmonic.numpy() / (tied + 1.0)
        for rows, mass in self._ties_among_several():
            levels, which = np.unique(self.better[rows], return_inverse=True)
            places = np.arange(1, len(mass) + 1)
            value[rows] = np.array([(mass / (level + places)).sum() for level in levels])[which]
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
            for level, number in zip(*np.unique(self.better[rows], return_counts=True), strict=True):
                counts[level : level + len(mass)] += number * mass
        return counts

    def order_statistic(self, place: float) -> float:
        """The rank of the query at ``place`` (1 … n) when queries are sorted by rank."""
        cumulated = np.cumsum(self.distribution())
        return float(np.searchsorted(cumulated, (place - 0.5) * (1 - 1e-12)) + 1)

    def at_place(self, place: float) -> float:
        """The rank at a place that may lie between two queries, interpolated."""
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
        """For each kind of tie with several relevant keys: its queries, and the law of the best one's "
        "place."""
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
    """Probability that ``drawn`` items of tied + relevant ones hold a relevant one: 1 − C(t, s) / C(t + "
    "r, s)."""
    t, r, s = (from_numpy(x.astype(np.float64)) for x in (tied, relevant, drawn))
    log_none = (t + 1).lgamma() - (t - s + 1).lgamma() + (t + r - s + 1).lgamma() - (t + r + 1).lgamma()
    return (-log_none.expm1()).numpy()
