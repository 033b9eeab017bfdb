"""Where all relevant keys of a query stand, and every graded or several-relevant metric in closed form.

The relevant keys of a query fall into ties: a tie of t candidates, r of them relevant, below s others, c of them
relevant. Every order within a tie is taken as equally likely, and each metric is its expectation over those orders: a
relevant key of the tie is at each of the places s + 1 … s + t with probability 1 / t. Guessing is one tie of all
candidates, so that collapsed embeddings score chance by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from numpy.typing import NDArray
from torch import digamma, from_numpy

from nearfar.errors import NearfarError
from nearfar.metrics.ranks import Ranks

__all__ = ["NOWHERE", "Places"]

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
