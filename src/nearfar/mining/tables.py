"""What was mined as tables: those of sentence-transformers' mine_hard_negatives, which pairs read as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from nearfar.arguments import choice
from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.mining.mine import Mined

__all__ = ["FORMATS", "columns_of", "mined_table"]

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
    "labeled-list": a row for each query with lists of both. ``names`` are the first two columns.

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
    choice("form", form, FORMATS)
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

    def add(**cells: object) -> None:
        for name, cell in cells.items():
            table.setdefault(name, []).append(cell)

    if form == "n-tuple":
        for i, j, own in zip(row, column, own_scores, strict=True):
            if counts[i] == k:
                cells = {f"negative_{t + 1}": corpus[negatives[i][t]] for t in range(k)}
                gaps = {f"margin_{t + 1}": own - values[i][t] for t in range(k)} if scores else {}
                add(**{first: queries[i], second: corpus[j]}, **cells, **gaps)
    elif form == "triplet":
        for i, j, own in zip(row, column, own_scores, strict=True):
            for t in range(counts[i]):
                more = {"margin": own - values[i][t]} if scores else {}
                add(**{first: queries[i], second: corpus[j]}, negative=corpus[negatives[i][t]], **more)
    elif form == "labeled-pair":
        for i, j, own in zip(row, column, own_scores, strict=True):
            add(
                **{first: queries[i]},
                document=corpus[j],
                label=1,
                **({"score": own} if scores else {}),
            )
        for i in range(n):
            for t in range(counts[i]):
                more = {"score": values[i][t]} if scores else {}
                add(**{first: queries[i]}, document=corpus[negatives[i][t]], label=0, **more)
    else:
        theirs: list[list[tuple[int, float]]] = [[] for _ in range(n)]
        for i, j, own in zip(row, column, own_scores, strict=True):
            theirs[i].append((j, own))
        for i in range(n):
            listed = theirs[i] + [(negatives[i][t], values[i][t]) for t in range(counts[i])]
            labels = [1] * len(theirs[i]) + [0] * counts[i]
            more = {"score": [score for _, score in listed]} if scores else {}
            add(**{first: queries[i]}, document=[corpus[j] for j, _ in listed], label=labels, **more)
    return table
