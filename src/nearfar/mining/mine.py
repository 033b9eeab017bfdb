"""Which documents become negatives of which query, and what was left out for which reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from nearfar.arguments import array, choice, number, whole_number
from nearfar.errors import NearfarError
from nearfar.mining.candidates import nearest_documents, unit_rows

__all__ = ["Mined", "mine_negatives"]

#: scores of pairs: positions of queries and of documents, of one length, give as many scores
Rescore = Callable[[NDArray[np.int64], NDArray[np.int64]], Any]

#: why a candidate is no negative, in the order in which it is asked
REASONS = ("positive", "own text", "copy of a positive", "rank", "no score", "margin", "score", "guide")


@dataclass(frozen=True, eq=False)
class Mined:
    """Negatives of each query, hardest first.

    ``negatives`` (n, per_query) are positions of documents, −1 where a query has no more, and ``scores`` theirs (NaN
    there). ``positive`` (n,) is the document that a query is compared with, the weakest of its positives, and
    ``positive_score`` its score. ``left_out`` counts candidates by reason; ``candidates`` is how many were looked at.
    ``index``, ``exact`` and ``recall`` say how candidates were found.
    """

    negatives: Int[np.ndarray, "n k"]
    scores: Float[np.ndarray, "n k"]
    positive: Int[np.ndarray, " n"]
    positive_score: Float[np.ndarray, " n"]
    pairs: tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]
    pair_scores: Float[np.ndarray, " p"]
    left_out: Mapping[str, int] = field(default_factory=dict)
    candidates: int = 0
    exact: bool = True
    index: str = "flat"
    recall: float | None = 1.0

    @property
    def counts(self) -> Int[np.ndarray, " n"]:
        """How many negatives each query has."""
        return np.asarray((self.negatives >= 0).sum(1))

    def summary(self) -> list[str]:
        """What was found and what was left out, in a few lines."""
        n, wanted = self.negatives.shape
        counts = self.counts
        how = "all pairs" if self.exact else f"{self.index}; recall {self.recall:.4f} on a sample"
        lines = [
            f"{n} queries, {int(counts.sum())} negatives ({how})",
            "left out: "
            + (", ".join(f"{count} {why}" for why, count in self.left_out.items() if count) or "none"),
        ]
        if (counts < wanted).any():
            lines.append(
                f"{int((counts < wanted).sum())} queries have fewer than {wanted} negatives, "
                f"{int((counts == 0).sum())} of them none: widen rank_range, or lower the margins"
            )
        return lines


def mine_negatives(
    queries: Float[np.ndarray, "n d"],
    corpus: Float[np.ndarray, "m d"],
    positives: Sequence[Any] | Int[np.ndarray, " n"] | None = None,
    *,
    per_query: int = 3,
    rank_range: tuple[int, int] = (0, 100),
    margin: float | None = None,
    margin_kind: Literal["absolute", "relative"] = "absolute",
    min_score: float | None = None,
    max_score: float | None = None,
    query_texts: Sequence[Any] | None = None,
    corpus_texts: Sequence[Any] | None = None,
    rescore: Rescore | None = None,
    guide: tuple[Any, Any] | None = None,
    guide_margin: float = 0.0,
    strategy: Literal["top", "random"] = "top",
    seed: int = 0,
    min_recall: float = 0.99,
) -> Mined:
    """Documents that a query is near to although they are no answers of it.

    Candidates are the nearest documents by cosine, without the query's positives, its own text, and copies of its
    positives. Of these, those of ``rank_range`` (from 0, the end not counted) are taken that lie below the own
    positive.

    Args:
        queries, corpus: vectors (n, d) and (m, d).
        positives: of each query its document, or several in a list; None: document i answers query i.
        per_query: how many are wanted of each.
        margin: a negative's score must be below the positive's by it; None: it need not be below. Of several positives
            the weakest counts, so that nothing that is mined is nearer than a known answer. ``margin_kind="relative"``
            takes it as a share of |score of the positive|, which is right for negative scores, too.
        min_score, max_score: bounds of a negative's score.
        query_texts, corpus_texts: anything that tells equal texts, such as the texts themselves: a document with the
            query's own text, or with that of one of its positives, is no negative.
        rescore: a cross-encoder, or a look-up of its scores: called with positions of queries and documents; its scores
            replace the cosines in margins, bounds and order. NaN for a candidate that it does not know, which is then
            left out; positives must have a score.
        guide: a second model's vectors of queries and corpus; a candidate that it scores as high as the weakest
            positive less ``guide_margin`` is a likely false negative and left out.
        strategy: the hardest ("top"), or any of those that pass ("random", by ``seed``).
        min_recall: of the search, where it is not exact.

    Raises ``NearfarError`` for vectors and positions that do not fit together.

    >>> corpus = np.array([[1.0, 0.0], [0.9, 0.1], [0.6, 0.8], [0.0, 1.0]])
    >>> mined = mine_negatives(corpus[:1], corpus, [0], per_query=2, margin=0.2)
    >>> mined.negatives.tolist(), mined.left_out["margin"]
    ([[2, 3]], 1)
    """
    per_query, seed = whole_number("per_query", per_query, 1), whole_number("seed", seed, 0)
    first, last = _range(rank_range, per_query)
    choice("margin_kind", margin_kind, ("absolute", "relative"))
    choice("strategy", strategy, ("top", "random"))
    limits = {"margin": margin, "min_score": min_score, "max_score": max_score}
    bounds = {name: None if value is None else number(name, value) for name, value in limits.items()}
    guide_margin = number("guide_margin", guide_margin)
    own, documents = unit_rows("queries", queries), unit_rows("corpus", corpus)
    n, m = len(own), len(documents)
    row, column = _pairs(positives, n, m)
    texts, document_texts = _groups(query_texts, corpus_texts, n, m)
    # Enough for the range, the positives, and some copies of texts; who has more copies has fewer negatives.
    most = int(np.bincount(row, minlength=n).max()) if len(row) else 0
    found = nearest_documents(own, documents, min(m, last + most + 10), min_recall, seed)
    indices, scores = found.indices.astype(np.int64), found.similarities.astype(np.float64)
    asked = np.arange(n)[:, None]
    left = dict.fromkeys(REASONS, 0)
    alive = indices >= 0
    candidates = int(alive.sum())

    def leave_out(reason: str, which: NDArray[np.bool_]) -> None:
        gone = alive & which
        left[reason] += int(gone.sum())
        alive[gone] = False

    leave_out("positive", _among(asked * m + indices, row * m + column))
    if texts is not None and document_texts is not None:
        kinds = int(max(texts.max(initial=0), document_texts.max(initial=0))) + 1
        theirs = document_texts[indices]
        leave_out("own text", theirs == texts[:, None])
        leave_out("copy of a positive", _among(asked * kinds + theirs, row * kinds + document_texts[column]))
    rank = alive.cumsum(1) - 1
    leave_out("rank", (rank < first) | (rank >= last))
    pair_scores = np.einsum("pd,pd->p", own[row], documents[column]).astype(np.float64)
    if rescore is not None:
        at = np.nonzero(alive)
        scores[at] = _scores(rescore, at[0], indices[at])
        leave_out("no score", np.isnan(scores))
        pair_scores = _scores(rescore, row, column)
        if np.isnan(pair_scores).any():
            first_at = int(np.isnan(pair_scores).argmax())
            raise NearfarError(
                f"rescore has no score for {int(np.isnan(pair_scores).sum())} of {len(row)} positives (first: query "
                f"{row[first_at]} with document {column[first_at]}), which negatives are compared with: score them, too"
            )
    positive, positive_score = _weakest(row, column, pair_scores, n)
    if bounds["margin"] is not None:
        gap = bounds["margin"] * (np.abs(positive_score) if margin_kind == "relative" else 1.0)
        # Where a query has no positive, there is nothing to be below of.
        leave_out(
            "margin", ~np.isnan(positive_score)[:, None] & (scores > (positive_score - gap)[:, None] + 1e-6)
        )
    if bounds["min_score"] is not None:
        leave_out("score", scores < bounds["min_score"])
    if bounds["max_score"] is not None:
        leave_out("score", scores > bounds["max_score"])
    if guide is not None:
        u, v = _guide(guide, n, m)
        _, known = _weakest(row, column, np.einsum("pd,pd->p", u[row], v[column]).astype(np.float64), n)
        at = np.nonzero(alive)
        judged = np.full(scores.shape, -np.inf)
        judged[at] = _dots(u, v, at[0], indices[at])
        leave_out("guide", ~np.isnan(known)[:, None] & (judged >= (known - guide_margin)[:, None] - 1e-6))
    order = scores if strategy == "top" else np.random.default_rng(seed).random(scores.shape)
    ranked = np.argsort(np.where(alive, -order, np.inf), axis=1, kind="stable")[:, :per_query]
    if ranked.shape[1] < per_query:
        ranked = np.pad(ranked, ((0, 0), (0, per_query - ranked.shape[1])))
        real = np.take_along_axis(alive, ranked, 1) & (np.arange(per_query) < indices.shape[1])
    else:
        real = np.take_along_axis(alive, ranked, 1)
    chosen = np.where(real, np.take_along_axis(indices, ranked, 1), -1)
    theirs_ = np.where(real, np.take_along_axis(scores, ranked, 1), np.nan)
    if strategy == "random":  # hardest first all the same
        again = np.argsort(np.where(real, -theirs_, np.inf), axis=1, kind="stable")
        chosen, theirs_ = np.take_along_axis(chosen, again, 1), np.take_along_axis(theirs_, again, 1)
    return Mined(
        chosen,
        theirs_,
        positive,
        positive_score,
        (row, column),
        pair_scores,
        left,
        candidates,
        found.exact,
        found.index,
        found.recall,
    )


def _range(rank_range: object, per_query: int) -> tuple[int, int]:
    if not isinstance(rank_range, (tuple, list)) or len(rank_range) != 2:
        raise NearfarError(
            f"rank_range is {rank_range!r}; the first rank and the end are needed, such as (10, 50)"
        )
    first, last = (whole_number("rank_range", each, 0) for each in rank_range)
    if last - first < per_query:
        raise NearfarError(
            f"rank_range=({first}, {last}) has {max(0, last - first)} ranks, and per_query is {per_query}"
        )
    return first, last


def _pairs(positives: Any, n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Queries and documents of all positives, by query."""
    if positives is None:
        if n != m:
            raise NearfarError(
                f"{n} queries and {m} documents: without positives document i answers query i; give them"
            )
        every = np.arange(n)
        return every, every
    if len(positives) != n:
        raise NearfarError(f"positives are of {len(positives)} queries, but there are {n}")
    if isinstance(positives, np.ndarray) and positives.ndim == 1 and positives.dtype != object:
        row, column = (
            np.arange(n),
            array("positives", positives, "positions of documents", "iu").astype(np.int64),
        )
    else:
        lists = [
            np.atleast_1d(np.asarray(each if each is not None else [], dtype=object)) for each in positives
        ]
        row = np.repeat(np.arange(n), [len(each) for each in lists])
        flat = [value for each in lists for value in each.tolist()]
        column = np.array(
            [whole_number("an entry of positives", value, -1) for value in flat], dtype=np.int64
        )
    known = column >= 0  # -1: none
    row, column = row[known], column[known]
    if len(column) and int(column.max()) >= m:
        raise NearfarError(
            f"positives name document {int(column.max())}, but there are {m}: positions count from 0"
        )
    return row, column


def _groups(
    queries: Any, corpus: Any, n: int, m: int
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Numbers that are equal where texts are."""
    if queries is None and corpus is None:
        return None, None
    if queries is None or corpus is None:
        raise NearfarError("query_texts and corpus_texts are compared with each other: give both, or neither")
    if len(queries) != n or len(corpus) != m:
        raise NearfarError(
            f"query_texts are {len(queries)} and corpus_texts {len(corpus)}; {n} and {m}, one for each, are needed"
        )
    numbers: dict[str, int] = {}
    out = [
        np.array(
            [numbers.setdefault(" ".join(str(text).split()), len(numbers)) for text in texts], dtype=np.int64
        )
        for texts in (queries, corpus)
    ]
    return out[0], out[1]


def _among(keys: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which keys are known ones; several times quicker than ``np.isin`` for few known ones of each row."""
    if not len(known):
        return np.zeros(keys.shape, bool)
    ordered = np.unique(known)
    at = np.searchsorted(ordered, keys.reshape(-1)).clip(max=len(ordered) - 1)
    return np.asarray(ordered[at].reshape(keys.shape) == keys)


def _weakest(
    row: NDArray[np.int64], column: NDArray[np.int64], scores: NDArray[np.float64], n: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The positive of lowest score of each query, and that score; −1 and NaN where it has none."""
    order = np.lexsort((-scores, row))  # the last of each query is its lowest
    positive, score = np.full(n, -1, np.int64), np.full(n, np.nan)
    positive[row[order]], score[row[order]] = column[order], scores[order]
    return positive, score


def _scores(rescore: Rescore, row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.float64]:
    given = np.asarray(rescore(row, column), dtype=np.float64).reshape(-1)
    if given.shape != row.shape or np.isinf(given).any():
        raise NearfarError(
            f"rescore gave {given.shape[0]} scores for {len(row)} pairs, {int(np.isinf(given).sum())} of them "
            "infinite; one number for each pair is needed, NaN where there is none"
        )
    return given


def _guide(guide: Any, n: int, m: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if not isinstance(guide, (tuple, list)) or len(guide) != 2:
        raise NearfarError("guide is a pair: a second model's vectors of the queries and of the corpus")
    u, v = unit_rows("guide of the queries", guide[0]), unit_rows("guide of the corpus", guide[1])
    if (len(u), len(v)) != (n, m) or u.shape[1] != v.shape[1]:
        raise NearfarError(f"guide holds vectors {u.shape} and {v.shape}; ({n}, g) and ({m}, g) are needed")
    return u, v


def _dots(
    u: NDArray[np.float32], v: NDArray[np.float32], row: NDArray[np.int64], column: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Cosines of listed pairs, some at a time."""
    out = np.empty(len(row))
    for begin in range(0, len(row), 1 << 18):
        part = slice(begin, begin + (1 << 18))
        out[part] = np.einsum("pd,pd->p", u[row[part]], v[column[part]])
    return out
