"""Which documents become negatives of which query, and what was left out for which reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray

from nearfar.arguments import choice, number, whole_number
from nearfar.batching.neighbors import SearchResult
from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.mining.candidates import groups_of, nearest_documents, pairs_of, unit_rows

__all__ = [
    "Mined",
    "Rows",
    "Rules",
    "dots",
    "groups_of",
    "mine_block",
    "mine_negatives",
    "summarize",
    "weakest",
]

#: candidates in place of positives: of all queries together, or of each where these are fewer
_CANDIDATES, _MOST = 1 << 29, 1000

#: scores of pairs: positions of queries and of documents, of one length, give as many scores
Rescore = Callable[[NDArray[np.int64], NDArray[np.int64]], ArrayLike]


class Rows(Protocol):
    """Vectors of unit length that are had by their positions: an array, or files."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.integer], /) -> NDArray[np.float32]: ...


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

    def with_pairs(self, which: NDArray[np.bool_]) -> Mined:
        """The same with some of the pairs of a query and its positive alone, which a table has rows of."""
        row, column = self.pairs
        return replace(self, pairs=(row[which], column[which]), pair_scores=self.pair_scores[which])

    def summary(self) -> list[str]:
        """What was mined and what was left out, in a few lines."""
        counts, wanted = self.counts, self.negatives.shape[1]
        how = "all pairs" if self.exact else f"{self.index}; recall {self.recall:.4f} on a sample"
        few = int((counts < wanted).sum()), int((counts == 0).sum())
        return summarize(len(counts), int(counts.sum()), how, self.left_out, wanted, few)


def summarize(
    queries: int, negatives: int, how: str, left_out: Mapping[str, int], wanted: int, few: tuple[int, int]
) -> list[str]:
    """What was mined in a few lines; ``few``: queries with fewer negatives than were wanted, and with none."""
    lines = [
        f"{queries} queries, {negatives} negatives ({how})",
        "left out: " + (", ".join(f"{count} {why}" for why, count in left_out.items() if count) or "none"),
    ]
    if few[0]:
        lines.append(
            f"{few[0]} queries have fewer than {wanted} negatives, {few[1]} of them none: widen rank_range, or lower "
            "the margins"
        )
    return lines


def mine_negatives(
    queries: Float[np.ndarray, "n d"],
    corpus: Float[np.ndarray, "m d"],
    positives: Sequence[object] | Int[np.ndarray, " n"] | None = None,
    *,
    per_query: int = 3,
    rank_range: tuple[int, int] = (0, 100),
    margin: float | None = None,
    margin_kind: Literal["absolute", "relative"] = "absolute",
    min_score: float | None = None,
    max_score: float | None = None,
    query_texts: Column | None = None,
    corpus_texts: Column | None = None,
    rescore: Rescore | None = None,
    guide: tuple[object, object] | None = None,
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
            query's own text, or with that of one of its positives, is no negative. None and NaN are equal to nothing.
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
    rules = Rules.checked(
        per_query, rank_range, margin, margin_kind, min_score, max_score, guide_margin, strategy, seed
    )
    own, documents = unit_rows("queries", queries), unit_rows("corpus", corpus)
    n, m = len(own), len(documents)
    row, column = pairs_of(positives, n, m)
    width = rules.width(np.bincount(row, minlength=n), m)
    nearest = nearest_documents(own, documents, width, min_recall, rules.seed)
    return mine_block(
        rules,
        nearest,
        own,
        documents,
        (row, column),
        texts=groups_of(query_texts, corpus_texts, n, m),
        rescore=rescore,
        guide=None if guide is None else _guide(guide, n, m),
        rng=rules.generator(),
    )


@dataclass(frozen=True)
class Rules:
    """Which candidates may be negatives, checked; see `mine_negatives`."""

    per_query: int
    ranks: tuple[int, int]
    margin: float | None
    margin_kind: str
    min_score: float | None
    max_score: float | None
    guide_margin: float
    strategy: str
    seed: int

    @classmethod
    def checked(
        cls,
        per_query: int,
        rank_range: tuple[int, int],
        margin: float | None,
        margin_kind: str,
        min_score: float | None,
        max_score: float | None,
        guide_margin: float,
        strategy: str,
        seed: int,
    ) -> Rules:
        """``NearfarError`` for what cannot be."""
        per_query, seed = whole_number("per_query", per_query, 1), whole_number("seed", seed, 0)
        ranks = _range(rank_range, per_query)
        choice("margin_kind", margin_kind, ("absolute", "relative"))
        choice("strategy", strategy, ("top", "random"))
        limits = {"margin": margin, "min_score": min_score, "max_score": max_score}
        bounds = {name: None if value is None else number(name, value) for name, value in limits.items()}
        guide_margin = number("guide_margin", guide_margin)
        return cls(
            per_query,
            ranks,
            margin_kind=margin_kind,
            guide_margin=guide_margin,
            strategy=strategy,
            seed=seed,
            **bounds,
        )

    def width(self, positives: NDArray[np.integer], documents: int) -> int:
        """Candidates of each query, of how many ``positives`` each has.

        Enough for the range, the positives, and some copies of texts; who has more copies has fewer negatives. All
        queries together have at most 2²⁹ candidates for their positives, or 1,000 each: a warning says so where a query
        has more.
        """
        most, enough = int(positives.max(initial=0)), max(_MOST, _CANDIDATES // max(1, len(positives)))
        if min(most, documents) > enough:
            warnings.warn(
                f"{int((positives > enough).sum())} queries have more than {enough} positives (up to {most}), and the "
                f"search looks at {self.ranks[1] + enough + 10} documents of each query: they may have fewer negatives "
                "or none. Leave out queries that are all alike, such as empty texts",
                stacklevel=3,
            )
        return min(documents, self.ranks[1] + min(most, enough) + 10)

    def generator(self) -> np.random.Generator:
        """What "random" draws with, over all queries in turn."""
        return np.random.default_rng(self.seed)


def mine_block(
    rules: Rules,
    nearest: SearchResult,
    own: NDArray[np.float32],
    documents: Rows,
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]],
    *,
    texts: tuple[NDArray[np.integer] | None, NDArray[np.integer] | None] = (None, None),
    rescore: Rescore | None = None,
    guide: tuple[Rows, Rows] | None = None,
    rng: np.random.Generator,
) -> Mined:
    """The negatives of some queries, of which the nearest documents are known.

    ``own`` are their vectors, of unit length, and ``documents[positions]`` those of the corpus; ``pairs`` are places of
    queries among these, and positions of their positives. ``texts`` are numbers of equal texts of these queries, and of
    all documents.
    """
    n, m, (row, column) = len(own), len(documents), pairs
    indices, scores = nearest.indices.astype(np.int64), nearest.similarities.astype(np.float64)
    asked = np.arange(n)[:, None]
    left = dict.fromkeys(REASONS, 0)
    alive = indices >= 0
    candidates = int(alive.sum())

    def leave_out(reason: str, which: NDArray[np.bool_]) -> None:
        gone = alive & which
        left[reason] += int(gone.sum())
        alive[gone] = False

    leave_out("positive", _among(asked * m + indices, row * m + column))
    query_texts, document_texts = texts
    if query_texts is not None and document_texts is not None:
        kinds = int(max(query_texts.max(initial=0), document_texts.max(initial=0))) + 1
        theirs = document_texts[indices].astype(np.int64)
        leave_out("own text", theirs == query_texts[:, None])
        leave_out("copy of a positive", _among(asked * kinds + theirs, row * kinds + document_texts[column]))
    rank = alive.cumsum(1) - 1
    leave_out("rank", (rank < rules.ranks[0]) | (rank >= rules.ranks[1]))
    pair_scores = dots(own, documents, row, column)
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
    positive, positive_score = weakest(row, column, pair_scores, n)
    if rules.margin is not None:
        gap = rules.margin * (np.abs(positive_score) if rules.margin_kind == "relative" else 1.0)
        # Where a query has no positive, there is nothing to be below of.
        leave_out(
            "margin", ~np.isnan(positive_score)[:, None] & (scores > (positive_score - gap)[:, None] + 1e-6)
        )
    if rules.min_score is not None:
        leave_out("score", scores < rules.min_score)
    if rules.max_score is not None:
        leave_out("score", scores > rules.max_score)
    if guide is not None:
        u, v = guide
        _, known = weakest(row, column, dots(u, v, row, column), n)
        at = np.nonzero(alive)
        judged = np.full(scores.shape, -np.inf)
        judged[at] = dots(u, v, at[0], indices[at])
        leave_out(
            "guide", ~np.isnan(known)[:, None] & (judged >= (known - rules.guide_margin)[:, None] - 1e-6)
        )
    order = scores if rules.strategy == "top" else rng.random(scores.shape)
    chosen, theirs_ = _best(alive, order, indices, scores, rules.per_query)
    if rules.strategy == "random":  # hardest first all the same
        again = np.argsort(np.where(chosen >= 0, -theirs_, np.inf), axis=1, kind="stable")
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
        nearest.exact,
        nearest.index,
        nearest.recall,
    )


def _best(
    alive: NDArray[np.bool_],
    order: NDArray[np.float64],
    indices: NDArray[np.int64],
    scores: NDArray[np.float64],
    count: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The first by ``order`` of those that are left, and their scores; -1 and NaN where there are fewer."""
    ranked = np.argsort(np.where(alive, -order, np.inf), axis=1, kind="stable")[:, :count]
    short = count - ranked.shape[1]
    real = np.pad(np.take_along_axis(alive, ranked, 1), ((0, 0), (0, short)))
    ranked = np.pad(ranked, ((0, 0), (0, short)))
    chosen = np.where(real, np.take_along_axis(indices, ranked, 1), -1)
    return chosen, np.where(real, np.take_along_axis(scores, ranked, 1), np.nan)


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


def _among(keys: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which keys are known ones; several times quicker than ``np.isin`` for few known ones of each row."""
    if not len(known):
        return np.zeros(keys.shape, bool)
    ordered = np.unique(known)
    at = np.searchsorted(ordered, keys.reshape(-1)).clip(max=len(ordered) - 1)
    return np.asarray(ordered[at].reshape(keys.shape) == keys)


def weakest(
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


def guide_sides(guide: object) -> tuple[object, object]:
    """A second model's vectors of the queries, and those of the corpus."""
    if not isinstance(guide, (tuple, list)) or len(guide) != 2:
        raise NearfarError("guide is a pair: a second model's vectors of the queries and of the corpus")
    return guide[0], guide[1]


def check_guide(queries: tuple[int, ...], corpus: tuple[int, ...], n: int, m: int) -> None:
    """``NearfarError`` for shapes of a guide that do not fit ``n`` queries and ``m`` documents, or each other."""
    if (queries[0], corpus[0]) != (n, m) or queries[1] != corpus[1]:
        raise NearfarError(f"guide holds vectors {queries} and {corpus}; ({n}, g) and ({m}, g) are needed")


def _guide(guide: object, n: int, m: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    queries, corpus = guide_sides(guide)
    u, v = unit_rows("guide of the queries", queries), unit_rows("guide of the corpus", corpus)
    check_guide(u.shape, v.shape, n, m)
    return u, v


def dots(u: Rows, v: Rows, row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cosines of listed pairs, some at a time."""
    out = np.empty(len(row))
    for begin in range(0, len(row), 1 << 18):
        part = slice(begin, begin + (1 << 18))
        out[part] = np.einsum("pd,pd->p", u[row[part]], v[column[part]])
    return out
