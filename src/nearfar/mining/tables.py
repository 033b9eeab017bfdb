"""Tables of mined negatives as sentence-transformers writes them, and of a cross-encoder's scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nearfar.arguments import choice
from nearfar.data.items import Column
from nearfar.data.rankings import read_ranking
from nearfar.errors import NearfarError
from nearfar.mining.mine import Mined

if TYPE_CHECKING:
    import pyarrow

__all__ = ["FORMATS", "ScoredPairs", "by_place", "column_names", "columns_of", "mined_table", "table_schema"]


FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")


def mined_table(
    mined: Mined,
    queries: Column,
    corpus: Column,
    form: Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"] = "n-tuple",
    *,
    names: tuple[str, str] = ("anchor", "positive"),
    scores: bool = False,
) -> dict[str, list[object]]:
    """Columns by name, for a data frame, ``datasets.Dataset.from_dict``, or a file.

    ``queries`` and ``corpus`` are what stands in the cells, texts or ids. "triplet": a row for each negative.
    "n-tuple": a row for each positive with all its negatives, ``negative_1``, …; queries with fewer are left out (their
    number is ``(mined.counts < k).sum()``). "labeled-pair": a row for each document with ``label`` 1 or 0.
    "labeled-list": a row for each query with lists of both. ``names`` are the first two columns; where both have one
    name, the second is that with ``_document``.

    With ``scores``, "triplet" has a column ``margin`` and "n-tuple" ``margin_1``, …: the score of the positive less
    that of the negative, which ``margins=`` of experiment=pairs and MarginMSELoss take; the labelled forms have
    ``score``.

    >>> import numpy as np
    >>> from nearfar.mining import mine_negatives
    >>> mined = mine_negatives(np.eye(3), np.eye(3) + [[0, 0, 0], [0.2, 0, 0], [0.1, 0.1, 0]], per_query=2)
    >>> table = mined_table(mined, ["a", "b", "c"], ["A", "B", "C"])
    >>> {name: column[:1] for name, column in table.items()}
    {'anchor': ['a'], 'positive': ['A'], 'negative_1': ['B'], 'negative_2': ['C']}
    """
    names = column_names(names, form, mined.negatives.shape[1], scores)
    queries, corpus = by_place(queries), by_place(corpus)
    n = len(mined.negatives)
    if len(queries) != n or int(mined.negatives.max(initial=-1)) >= len(corpus):
        raise NearfarError(
            f"{len(queries)} queries and {len(corpus)} documents; what was mined is of {n} queries and more"
        )
    table = columns_of(mined, queries, corpus, form, names=names, scores=scores)
    if not table:
        raise NearfarError(
            "no query has as many negatives as were asked for: widen rank_range, or lower the margins"
        )
    return table


def by_place(values: Any) -> Any:
    """Values that are had by their places; a pandas Series is read by its index, so that its array is taken."""
    return values.to_numpy(dtype=object) if hasattr(values, "iloc") else values


def column_names(names: tuple[str, str], form: str, per_query: int, scores: bool) -> tuple[str, str]:
    """The columns of queries and documents; ``NearfarError`` for those that the form has of its own.

    >>> column_names(("text", "text"), "n-tuple", 3, False)
    ('text', 'text_document')
    """
    choice("form", form, FORMATS)
    first, second = names
    listed = form.startswith("labeled")
    if first == second and not listed:
        second = f"{first}_document"
    own = [*(["document"] if listed else []), *_added(form, per_query, scores)]
    for name in [first] if listed else [first, second]:
        if name in own:
            raise NearfarError(
                f"'{name}' is a column that form={form} adds to those of queries and documents ({first}, {second}): "
                "give that of the table a different name, or take a different form"
            )
    return first, second


def _added(form: str, per_query: int, scores: bool) -> list[str]:
    """The columns beside those of queries and documents."""
    if form.startswith("labeled"):
        return ["label", *(["score"] if scores else [])]
    places = [f"_{t + 1}" for t in range(per_query)] if form == "n-tuple" else [""]
    return [f"{name}{place}" for name in ("negative", *(["margin"] if scores else [])) for place in places]


def table_schema(
    form: str,
    names: tuple[str, str],
    per_query: int,
    scores: bool,
    queries: pyarrow.DataType,
    documents: pyarrow.DataType,
) -> pyarrow.Schema:
    """Columns of the table with their types, of values of both sides of these types."""
    import pyarrow

    def type_of(name: str) -> pyarrow.DataType:
        kind = name.split("_")[0]
        known = {"label": pyarrow.int64(), "score": pyarrow.float64(), "margin": pyarrow.float64()}
        return known.get(kind, documents)

    whole = pyarrow.list_ if form == "labeled-list" else lambda each: each
    second = "document" if form.startswith("labeled") else names[1]
    added = [(name, whole(type_of(name))) for name in _added(form, per_query, scores)]
    return pyarrow.schema([(names[0], queries), (second, whole(documents)), *added])


def columns_of(
    mined: Mined,
    queries: Column,
    corpus: Column | Mapping[int, object],
    form: str,
    *,
    names: tuple[str, str],
    scores: bool,
) -> dict[str, list[object]]:
    """As `mined_table`, of a corpus of which the documents that occur are enough; empty where there is no row."""
    n, k = mined.negatives.shape
    first, second = names
    row, column = (each.tolist() for each in mined.pairs)
    counts, negatives, values = mined.counts.tolist(), mined.negatives.tolist(), mined.scores.tolist()
    own_scores = mined.pair_scores.tolist()
    table: dict[str, list[object]] = {}

    def add(cells: Mapping[str, object], **more: object) -> None:
        for name, cell in (*cells.items(), *more.items()):
            table.setdefault(name, []).append(cell)

    if form == "n-tuple":
        for i, j, own in zip(row, column, own_scores, strict=True):
            if counts[i] == k:
                cells = {f"negative_{t + 1}": corpus[negatives[i][t]] for t in range(k)}
                gaps = {f"margin_{t + 1}": own - values[i][t] for t in range(k)} if scores else {}
                add({first: queries[i], second: corpus[j]}, **cells, **gaps)
    elif form == "triplet":
        for i, j, own in zip(row, column, own_scores, strict=True):
            for t in range(counts[i]):
                more = {"margin": own - values[i][t]} if scores else {}
                add({first: queries[i], second: corpus[j]}, negative=corpus[negatives[i][t]], **more)
    elif form == "labeled-pair":
        for i, j, own in zip(row, column, own_scores, strict=True):
            add(
                {first: queries[i]},
                document=corpus[j],
                label=1,
                **({"score": own} if scores else {}),
            )
        for i in range(n):
            for t in range(counts[i]):
                more = {"score": values[i][t]} if scores else {}
                add({first: queries[i]}, document=corpus[negatives[i][t]], label=0, **more)
    else:
        theirs: list[list[tuple[int, float]]] = [[] for _ in range(n)]
        for i, j, own in zip(row, column, own_scores, strict=True):
            theirs[i].append((j, own))
        for i in range(n):
            listed = theirs[i] + [(negatives[i][t], values[i][t]) for t in range(counts[i])]
            labels = [1] * len(theirs[i]) + [0] * counts[i]
            more = {"score": [score for _, score in listed]} if scores else {}
            add({first: queries[i]}, document=[corpus[j] for j, _ in listed], label=labels, **more)
    return table


@dataclass
class ScoredPairs:
    """Scores of pairs that a file has by id, or the pairs that are still to be scored."""

    queries: list[str]
    documents: list[str]
    known: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    asked: list[tuple[int, int]] = field(default_factory=list)

    def read(self, path: Path) -> None:
        """Take the scores of a file (`nearfar.data.rankings.read_ranking`), which goes by ids."""
        self.known = read_ranking(path)
        if not any(query in self.known for query in self.queries):
            raise NearfarError(
                f"{path} has scores of {len(self.known)} queries, none of which is one of these (first here: "
                f"'{self.queries[0]}', there: '{next(iter(self.known))}'): it goes by the ids of the embeddings."
            )

    def look_up(self, query: np.ndarray, document: np.ndarray) -> list[float]:
        """The known scores of pairs of positions, NaN where there is none: a ``rescore``."""
        none: dict[str, float] = {}
        return [
            self.known.get(self.queries[i], none).get(self.documents[j], math.nan)
            for i, j in zip(query.tolist(), document.tolist(), strict=True)
        ]

    def record(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """Note the pairs that are asked for, and give each 0: a ``rescore``."""
        self.asked += zip(query.tolist(), document.tolist(), strict=True)
        return np.zeros(len(query))

    def rows(self, queries: Sequence[object], documents: Sequence[object]) -> list[dict[str, object]]:
        """A row for each pair that was asked for, by id, with the values of both."""
        return [
            {
                "query_id": self.queries[i],
                "doc_id": self.documents[j],
                "query": queries[i],
                "document": documents[j],
            }
            for i, j in sorted(set(self.asked))
        ]
