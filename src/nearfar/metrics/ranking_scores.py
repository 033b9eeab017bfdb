"""Scores of rankings that others made: lists of documents for each query, against judgments."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from heapq import nlargest

import numpy as np
from numpy.typing import NDArray

from nearfar.arguments import choice, shown, whole_number
from nearfar.data.files import Json
from nearfar.data.rankings import RankedLists
from nearfar.errors import NearfarError
from nearfar.ids import split_hash
from nearfar.metrics.ranks import NOWHERE, Places
from nearfar.metrics.retrieval_inputs import check_cutoffs
from nearfar.metrics.retrieval_scores import (
    GAINS,
    TIES,
    Bounds,
    RetrievalScores,
    read_metrics,
    score_of_places,
)

__all__ = ["RANKING_METRICS", "describe_ranking", "score_ranking"]

#: what is scored unless metrics are named
RANKING_METRICS = ("nDCG@10", "MAP", "MRR@10", "recall@100", "precision@10")

#: the documents of a query with their numbers, or alone, where each counts 1; and these by query
Documents = Mapping[str, float] | Mapping[int, float] | Collection[str | int]
Lists = RankedLists | Mapping[str, Documents] | Mapping[int, Documents]


def score_ranking(
    ranking: Lists,
    qrels: Lists,
    metrics: Iterable[str] | str = RANKING_METRICS,
    ks: Iterable[int] | int = (1, 5, 10),
    *,
    documents: int | Collection[str] | None = None,
    missing: str = "zero",
    ties: str = "expected",
    gain: str = "linear",
) -> RetrievalScores:
    """The score of each judged query under any of the metrics, from a ranking and qrels.

    Args:
        ranking: ``{query: {document: score}}``, or what ``nearfar.data.rankings.read_ranking`` gives. Documents are in
            the order of their scores; equal scores are a tie, whatever the order of the lines.
        qrels: ``{query: {document: grade}}``; grades above 0 are relevant, and what is not judged is not.
        metrics, ks, ties, gain: as in ``score_retrieval``. The mean and the median rank need complete rankings, and are
            refused. Relevant documents that are not listed count as found nowhere.
        documents: how many documents there are, or their ids: the chance level is that of a random order of them.
            Without it the chance level is unknown (NaN), since lists are cut off.
        missing: queries that are judged and not ranked score 0 ("zero", as ``trec_eval -c``) or are left out ("skip").

    Queries without a relevant document are left out and counted in the protocol.

    >>> qrels = {"q1": {"d1": 2, "d2": 1}, "q2": {"d3": 1}}
    >>> scores = score_ranking({"q1": {"d9": 3.0, "d1": 2.0}}, qrels, ["MRR", "recall@k"], 10, documents=100)
    >>> scores.queries, scores["MRR"], scores["recall@10"], scores.chances["recall@10"]
    (['q1', 'q2'], array([0.5, 0. ]), array([0.5, 0. ]), array([0.1, 0.1]))
    """
    wanted = read_metrics(metrics, check_cutoffs(ks))
    choice("ties", ties, TIES)
    choice("gain", gain, GAINS)
    choice("missing", missing, ("zero", "skip"))
    lists, judged = RankedLists.of(ranking, "ranking"), RankedLists.of(qrels, "qrels")
    refused = [str(each) for each in wanted if each.kind in ("mean_rank", "median_rank")]
    if refused:
        raise NearfarError(
            f"metrics: {', '.join(refused)} of a ranking: lists are cut off, and the rank of what they do not hold is "
            "unknown; MRR and recall@k take that into account"
        )
    number = _number_of(documents)
    relevant = {q: _positive(grades) for q, grades in judged.items()}
    scored = [q for q, grades in relevant.items() if grades and (missing == "zero" or q in lists)]
    common = [q for q in relevant if q in lists]
    if not common:
        raise NearfarError(
            f"ranking and qrels have no query in common: {_some(lists)} and {_some(judged)}; ids are compared as texts"
        )
    if not scored:
        raise NearfarError("qrels: no query that is ranked has a relevant document (a grade above 0)")
    places = _places([(lists.lists.get(q, {}), relevant[q], q) for q in scored], number)
    result = score_of_places(places, wanted, ties, gain)
    chances, bounds = dict(result.chances), dict(result.bounds)
    if number is None:
        chances = {name: np.full(len(scored), np.nan) for name in chances}
        bounds = {name: Bounds(each.low, each.high, False) for name, each in bounds.items()}
    per_query = float(places.relevant.mean())
    protocol: Json = {
        "ranked": "lists",
        "relevant_per_query": 1 if places.relevant.max() == 1 else round(per_query, 4),
        "without_relevant": sum(not grades for grades in relevant.values()),
        "missing": missing,
        "judgments": split_hash(f"{q}\t{d}\t{g:g}" for q in scored for d, g in relevant[q].items()),
        "split": split_hash(scored),
        "ties": ties,
        "gain": gain,
    }
    if number is not None:
        protocol["gallery"] = number
    return RetrievalScores(result.scores, chances, scored, protocol, None, bounds)


def _number_of(documents: object) -> int | None:
    if documents is None:
        return None
    if isinstance(documents, (Mapping, set, frozenset, list, tuple)):
        if not documents:
            raise NearfarError("documents is empty; their number or their ids are needed")
        if not all(isinstance(each, str) for each in documents):
            raise NearfarError(f"documents is {shown(documents)}; their ids are texts")
        return len(documents)
    return whole_number("documents", documents, 1)


def _positive(grades: Mapping[str, float]) -> dict[str, float]:
    return {document: grade for document, grade in grades.items() if grade > 0}


def _some(lists: Mapping[str, object]) -> str:
    return f"{shown(next(iter(lists)))} …" if lists else "none"


def _places(queries: list[tuple[Mapping[str, float], dict[str, float], str]], number: int | None) -> Places:
    starts, candidates = [0], []
    above: list[NDArray[np.int64]] = []
    level: list[NDArray[np.int64]] = []
    size: list[NDArray[np.int64]] = []
    grades: list[NDArray[np.float64]] = []
    for listed, relevant, query in queries:
        right = [(score, relevant[d]) for d, score in listed.items() if d in relevant]
        wrong = np.sort(
            np.array([score for d, score in listed.items() if d not in relevant], dtype=np.float64)
        )
        least = len(wrong) + len(relevant)
        if number is not None and least > number:
            raise NearfarError(
                f"documents: query {query!r} lists or judges {least} of them, more than the {number} that there are"
            )
        candidates.append(least if number is None else number)
        ties = len(above)
        if right:
            scores, own = np.array(right, dtype=np.float64).T
            order = np.lexsort((-own, -scores))
            levels, counts = np.unique(-scores, return_counts=True)
            low, high = (np.searchsorted(wrong, -levels, side=side) for side in ("left", "right"))
            above.append(len(wrong) - high)
            level.append(high - low)
            size.append(counts)
            grades.append(own[order])
        nowhere = sorted((g for d, g in relevant.items() if d not in listed), reverse=True)
        if nowhere:
            above.append(np.array([NOWHERE]))
            level.append(np.array([0]))
            size.append(np.array([len(nowhere)]))
            grades.append(np.array(nowhere))
        starts.append(starts[-1] + sum(map(len, above[ties:])))
    graded = np.concatenate(grades)
    return Places(
        np.array(starts),
        np.concatenate(above),
        np.concatenate(level),
        np.concatenate(size),
        np.array(candidates),
        None if (graded == 1).all() else graded,
    )


def describe_ranking(
    ranking: Lists, qrels: Lists, documents: int | Collection[str] | None = None, depth: int = 10
) -> list[str]:
    """What a reader has to know of a ranking and its judgments: in sentences, each with its number.

    Lines that were not used, judged queries without a list, lists without judgments, documents that nobody judged,
    relevant ones that are not listed, ids that the collection does not have, equal scores.

    >>> for line in describe_ranking({"q1": {"d9": 3.0, "d1": 2.0}}, {"q1": {"d1": 1}, "q2": {"d3": 1}}):
    ...     print(line)
    ranking: 1 query, 2 documents each.
    ranking: 1 of 2 judged queries are not ranked (q2).
    ranking: 50 % of the first 10 of each list are judged; the others count as not relevant.
    ranking: 1 of 2 relevant documents are not listed.
    """
    lists, judged = RankedLists.of(ranking, "ranking"), RankedLists.of(qrels, "qrels")
    _number_of(documents)
    depth = whole_number("depth", depth, 1)
    return list(_sentences(lists, judged, documents, depth))


def _sentences(lists: RankedLists, judged: RankedLists, documents: object, depth: int) -> Iterator[str]:
    name = lists.source
    for each in (lists, judged):
        if len(each.rejections):
            yield f"{each.source}: {each.rejections.summary()}."
    depths = [len(own) for own in lists.values()]
    if depths:
        span = str(min(depths)) if min(depths) == max(depths) else f"{min(depths)} to {max(depths)}"
        yield f"{name}: {len(depths)} {'query' if len(depths) == 1 else 'queries'}, {span} documents each."
    relevant = {q: _positive(grades) for q, grades in judged.items()}
    unranked = [q for q, grades in relevant.items() if grades and q not in lists]
    with_relevant = sum(bool(grades) for grades in relevant.values())
    if unranked:
        yield f"{name}: {len(unranked)} of {with_relevant} judged queries are not ranked ({_names(unranked)})."
    strangers = [q for q in lists if q not in judged]
    if strangers:
        yield f"{name}: {len(strangers)} of {len(lists)} ranked queries are not judged ({_names(strangers)})."
    none = len(relevant) - with_relevant
    if none:
        yield f"{judged.source}: {none} of {len(relevant)} judged queries have no relevant document, and are left out."
    first = known = listed = equal = 0
    for q, grades in judged.items():
        own = lists.lists.get(q, {})
        top = nlargest(depth, own, key=own.__getitem__)
        first += len(top)
        known += sum(d in grades for d in top)
        listed += sum(d in own for d in relevant[q])
        equal += len(set(own.values())) < len(own)
    if first and known < first:
        yield (
            f"{name}: {100 * known / first:.0f} % of the first {depth} of each list are judged; the others count as "
            "not relevant."
        )
    total = sum(map(len, relevant.values()))
    if listed < total:
        yield f"{name}: {total - listed} of {total} relevant documents are not listed."
    if equal:
        yield f"{name}: {equal} lists hold equal scores; every order of these counts alike."
    if isinstance(documents, (Mapping, set, frozenset, list, tuple)):
        collection = documents if isinstance(documents, (Mapping, set, frozenset)) else set(documents)
        for each, what in ((lists, "ranked"), (judged, "judged")):
            outside = sorted({d for own in each.values() for d in own if d not in collection})
            if outside:
                yield f"{each.source}: {len(outside)} {what} documents are not in the collection ({_names(outside)})."


def _names(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
