"""How many of the mined negatives are answers after all: by labels, by copies, by a guide, and by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.labels import label_tensor
from nearfar.metrics.intervals import wilson
from nearfar.mining.candidates import groups_of, unit_rows
from nearfar.mining.mine import Mined, Rows, dots, weakest

__all__ = [
    "FalseNegatives",
    "count_false",
    "label_numbers",
    "measure_false_negatives",
    "read_marked",
    "sample_to_mark",
    "shares_of",
]

#: what a person writes beside a negative that is an answer, and beside one that is none
YES, NO = ("1", "yes", "true", "y", "x"), ("0", "no", "false", "n")


@dataclass(frozen=True)
class FalseNegatives:
    """A share of negatives that are answers: ``value`` in [0, 1] with its 95 % interval (Wilson), among ``n``, and how
    that is known (``by``)."""

    value: float
    low: float
    high: float
    n: int
    by: str

    def __str__(self) -> str:
        return f"false negatives {self.by}: {self.value:.2%} [{self.low:.2%}, {self.high:.2%}] of {self.n}"


def measure_false_negatives(
    mined: Mined,
    *,
    labels: tuple[Iterable[object], Iterable[object]] | None = None,
    texts: tuple[Column, Column] | None = None,
    guide: tuple[object, object] | None = None,
) -> list[FalseNegatives]:
    """The share of mined negatives that are answers, by everything that is known.

    ``labels`` of queries and corpus: negatives with the query's label, among those where both are known. ``texts`` of
    both: copies of the query's positives, or of the query itself. ``guide``, a second model's vectors of both:
    negatives that it scores as high as the weakest positive; a likely share, not a known one.

    >>> from nearfar.mining import mine_negatives
    >>> mined = mine_negatives(np.eye(4), np.eye(4) + 0.1, per_query=3)
    >>> print(measure_false_negatives(mined, labels=([0, 0, 1, 1], [0, 0, 1, 1]))[0])
    false negatives by label: 33.33% [13.81%, 60.94%] of 12
    """
    counts = count_false(
        mined,
        labels=None if labels is None else label_numbers(*labels),
        texts=None if texts is None else groups_of(texts[0], texts[1], len(texts[0]), len(texts[1])),
        guide=None
        if guide is None
        else (unit_rows("guide of the queries", guide[0]), unit_rows("guide of the corpus", guide[1])),
    )
    return shares_of(counts)


def count_false(
    mined: Mined,
    *,
    labels: tuple[np.ndarray, np.ndarray] | None = None,
    texts: tuple[np.ndarray | None, np.ndarray | None] | None = None,
    guide: tuple[Rows, Rows] | None = None,
) -> dict[str, tuple[int, int]]:
    """How many negatives are answers, and of how many that is known, by what it is known; counts of blocks add up.

    ``labels`` (below 0: none) and ``texts`` are numbers of these queries and of all documents.
    """
    asked, place = np.nonzero(mined.negatives >= 0)
    document = mined.negatives[asked, place]
    row, column = mined.pairs
    false: dict[str, np.ndarray] = {}
    if labels is not None:
        own, theirs = labels
        known = (own[asked] >= 0) & (theirs[document] >= 0)
        false["by label"] = (own[asked] == theirs[document])[known]
    if texts is not None:
        first, second = texts
        assert first is not None
        assert second is not None
        kinds = int(max(first.max(initial=0), second.max(initial=0))) + 1
        keys, answers = (
            at * kinds + second[of].astype(np.int64) for at, of in ((asked, document), (row, column))
        )
        false["by text"] = np.isin(keys, answers) | (first[asked] == second[document])
    if guide is not None:
        u, v = guide
        _, known_ = weakest(row, column, dots(u, v, row, column), len(mined.negatives))
        judged = dots(u, v, asked, document)
        answered = ~np.isnan(known_[asked])
        false["by the guide (likely)"] = (judged >= known_[asked] - 1e-6)[answered]
    return {by: (int(each.sum()), len(each)) for by, each in false.items()}


def shares_of(counts: Mapping[str, tuple[int, int]]) -> list[FalseNegatives]:
    """Shares with their intervals, of what anything is known of."""
    return [FalseNegatives(false / n, *wilson(false / n, n), n, by) for by, (false, n) in counts.items() if n]


def label_numbers(queries: Iterable[object], corpus: Iterable[object]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the labels of both, −1 where one is missing."""
    own, theirs = list(queries), list(corpus)
    numbers = label_tensor([*own, *theirs]).numpy()
    return numbers[: len(own)], numbers[len(own) :]


def sample_to_mark(
    mined: Mined, queries: Column, corpus: Column, rows: int = 50, seed: int = 0
) -> dict[str, list[object]]:
    """Negatives drawn at random, each beside its query and positive, with an empty column ``false_negative`` to be
    marked (1 or yes where the negative is an answer, 0 or no where not)."""
    asked, place = np.nonzero(mined.negatives >= 0)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(asked))[:rows])
    table: dict[str, list[object]] = {
        name: [] for name in ("query", "positive", "negative", "score", "false_negative")
    }
    for i, t in zip(asked[drawn].tolist(), place[drawn].tolist(), strict=True):
        own = int(mined.positive[i])
        cells = (
            queries[i],
            corpus[own] if own >= 0 else "",
            corpus[mined.negatives[i, t]],
            mined.scores[i, t],
            "",
        )
        for name, cell in zip(table, cells, strict=True):
            table[name].append(cell)
    return table


def read_marked(table: Mapping[str, Sequence[object]]) -> FalseNegatives:
    """The share of false negatives from a sample that somebody marked; rows that are not marked are left out.

    >>> print(read_marked({"false_negative": ["yes", "no", "", "0"]}))
    false negatives by hand: 33.33% [6.15%, 79.23%] of 3
    """
    if "false_negative" not in table:
        raise NearfarError("the marked sample has no column 'false_negative'")
    marks = []
    for number, cell in enumerate(table["false_negative"], start=1):
        marked = is_marked(cell, f"row {number} of the marked sample")
        if marked is not None:
            marks.append(marked)
    if not marks:
        raise NearfarError("no row of the sample is marked: write 1 or 0 into the column false_negative")
    return shares_of({"by hand": (sum(marks), len(marks))})[0]


def is_marked(cell: object, where: str) -> bool | None:
    """What a cell of the column ``false_negative`` says; None where it is empty.

    >>> is_marked("yes", "row 1"), is_marked(0.0, "row 2"), is_marked("", "row 3")
    (True, False, None)
    """
    word = "" if cell is None else str(cell).strip().casefold().removesuffix(".0")
    if word in YES or word in NO:
        return word in YES
    if word and word != "nan":
        raise NearfarError(f"{where} has {cell!r}; 1 or yes, 0 or no, or nothing is needed")
    return None
