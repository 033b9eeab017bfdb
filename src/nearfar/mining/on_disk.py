"""Hard negatives from corpora that memory does not hold: queries in blocks, an index on disk, a table in stretches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nearfar.arguments import number, shown
from nearfar.batching.mapped_neighbors import MappedNeighbors
from nearfar.data.files import write_atomically
from nearfar.data.mapped import MappedColumn
from nearfar.data.vector_shards import VectorShards
from nearfar.errors import NearfarError
from nearfar.labels import is_missing
from nearfar.mining.candidates import Answers, Positives, text_numbers, unit_rows
from nearfar.mining.false_negatives import FalseNegatives, count_false, shares_of
from nearfar.mining.mine import Mined, Rescore, Rules, check_guide, guide_sides, mine_block, summarize
from nearfar.mining.tables import by_place, column_names, columns_of, table_schema

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

__all__ = ["MinedOnDisk", "mine_negatives_on_disk"]

#: candidates of a block of queries, and the queries of one
_CANDIDATES, _QUERIES = 1 << 20, 8192
#: values of which the type is asked at once
_STRETCH = 65_536
#: queries on which the search is tuned, half of them, and its recall measured
_SAMPLE = 1000


class ByPosition(Protocol):
    """What stands in the cells of one side, had by positions: an array, or a column of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: NDArray[np.integer], /) -> Iterable[object]: ...


#: what stands in the cells of one side
Cells: TypeAlias = ByPosition | list[Any] | tuple[object, ...]


@dataclass(frozen=True)
class MinedOnDisk:
    """What was mined into a table: how many rows it has, and what a `Mined` tells.

    ``unanswered`` queries have no positive and were left out; ``short`` ones have fewer negatives than were wanted,
    ``empty`` ones none. ``recall`` was measured on ``sampled`` queries (0: taken over from the lists).
    """

    path: Path
    rows: int
    columns: list[str]
    queries: int
    negatives: int
    unanswered: int
    short: int
    empty: int
    per_query: int
    candidates: int
    left_out: Mapping[str, int]
    index: str
    recall: float
    sampled: int
    false_negatives: list[FalseNegatives] = field(default_factory=list)

    def summary(self) -> list[str]:
        """What was mined and what was left out, in a few lines."""
        how = f"{self.index}; recall {self.recall:.4f} on a sample"
        lines = summarize(
            self.queries, self.negatives, how, self.left_out, self.per_query, (self.short, self.empty)
        )
        if self.unanswered:
            lines.append(f"{self.unanswered} queries have no answer and are left out")
        return [*lines, *map(str, self.false_negatives)]


def mine_negatives_on_disk(
    queries: object,
    corpus: MappedNeighbors | str | Path,
    output: str | Path,
    positives: Answers = None,
    *,
    per_query: int = 3,
    rank_range: tuple[int, int] = (0, 100),
    margin: float | None = None,
    margin_kind: Literal["absolute", "relative"] = "absolute",
    min_score: float | None = None,
    max_score: float | None = None,
    query_texts: Iterable[object] | None = None,
    corpus_texts: Iterable[object] | None = None,
    labels: tuple[Iterable[object], Iterable[object]] | None = None,
    rescore: Rescore | None = None,
    guide: tuple[object, object] | None = None,
    guide_margin: float = 0.0,
    strategy: Literal["top", "random"] = "top",
    seed: int = 0,
    min_recall: float = 0.95,
    form: Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"] = "n-tuple",
    names: tuple[str, str] = ("anchor", "positive"),
    scores: bool = False,
    query_values: Cells | None = None,
    corpus_values: Cells | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> MinedOnDisk:
    """`mine_negatives` for millions of rows, by the same rules: the table is written a stretch at a time.

    Memory: the codes of the index (about 40 bytes for each document, d = 128), 40 bytes for each query and document
    of positions, positives and texts, and a block of candidates; vectors are mapped.

    Args:
        queries: vectors (n, d): ``.npy`` shards (float16 or float32), a folder of them, or an array.
        corpus: the folder that `nearest_neighbors_on_disk` or ``nearfar neighbors`` wrote of the documents.
        output: the Parquet file, which appears when it is complete; its forms are those of `mined_table`.
        positives: sparse: pairs (p, 2) of positions of a query and of a document that answers it, an array or a
            ``.npy`` file; a SciPy matrix (n, m); or as of `mine_negatives`, where a list has an entry for each query,
            of documents. Queries without one are left out.
        query_texts, corpus_texts: read once, in order; equal texts are told by 64 bits of a hash.
        labels: of queries and corpus, a text or a number each, which measures false negatives; missing ones (None, NaN,
            "", −1) are left out.
        guide: a second model's vectors of queries and corpus, in shards.
        rescore: is called with the positions of a block of queries.
        min_recall: of the search for these queries: its width is chosen on 500 of them, and the recall that is stated
            was measured on 500 others, against all documents.
        query_values, corpus_values: what stands in the cells, by ``values[positions]``, of one type on each side; None:
            positions of queries, and ids of documents where the folder has them.
        advance: is told the queries of every block that is done.
        per_query, rank_range, margin, margin_kind, min_score, max_score, guide_margin, strategy, seed, form, names,
            scores: as of `mine_negatives` and `mined_table`.

    Raises ``NearfarError`` for folders, vectors and positions that do not fit together.

    >>> import tempfile
    >>> from nearfar.batching import nearest_neighbors_on_disk
    >>> rng = np.random.default_rng(0)
    >>> documents = rng.standard_normal((40, 16))[rng.integers(40, size=2000)] + 0.5 * rng.standard_normal((2000, 16))
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = nearest_neighbors_on_disk(documents, 10, folder / "near")
    >>> pairs = np.stack([np.arange(500), np.arange(500)], 1)  # query and document
    >>> mined = mine_negatives_on_disk(documents[:500] + 0.1, folder / "near", folder / "mined.parquet", pairs)
    >>> mined.rows, mined.columns, mined.recall > 0.95
    (500, ['anchor', 'positive', 'negative_1', 'negative_2', 'negative_3'], True)
    """
    rules = Rules.checked(
        per_query, rank_range, margin, margin_kind, min_score, max_score, guide_margin, strategy, seed
    )
    names = column_names(names, form, rules.per_query, scores)
    min_recall = number("min_recall", min_recall, above=0, most=1)
    output = Path(output).expanduser()
    if output.suffix.lower() != ".parquet":
        raise NearfarError(f"{output}: a table in stretches is written as Parquet; name it .parquet")
    source = VectorShards.of(queries)
    near = corpus if isinstance(corpus, MappedNeighbors) else MappedNeighbors(corpus)
    n, m = source.n, near.n
    if near.metric != "cosine":
        raise NearfarError(
            f"{near.folder} goes by the dot product, and mining by cosines; make the neighbours with metric='cosine'"
        )
    if source.dim != near.head["dim"]:
        raise NearfarError(
            f"queries have {source.dim} dimensions, and {near.folder} was made of vectors of {near.head['dim']}: one "
            "model has to embed both"
        )
    answers = Positives.given(positives, n, m)
    counts = answers.counts
    rows = np.flatnonzero(counts)
    if not len(rows):
        raise NearfarError("no query has a positive: nothing can be mined")
    width = rules.width(counts[rows], m)
    texts = text_numbers(query_texts, corpus_texts, n, m)
    groups = None if labels is None else _labels(labels, n, m)
    guides = None if guide is None else _guides(guide, n, m)
    cells = (
        _Cells("query_values", query_values, np.arange(n)),
        _Cells("corpus_values", corpus_values, np.arange(m) if near.ids is None else near.ids),
    )
    schema = table_schema(form, names, rules.per_query, scores, cells[0].type, cells[1].type)
    rng, recall, sampled = rules.generator(), near.recall or 0.0, 0
    if len(rows) > 1:
        drawn = np.random.default_rng([seed, 2]).choice(rows, min(_SAMPLE, len(rows)), replace=False)
        recall, sampled = near.tune_search(_unit("queries", source, np.sort(drawn)), width, min_recall, seed)
        if recall < min_recall:
            warnings.warn(
                f"candidates are found with recall {recall:.3f} on {sampled} queries, below min_recall={min_recall:g}, "
                "as widely as the index can be searched",
                stacklevel=2,
            )
    state = _Totals()

    def tables() -> Iterator[dict[str, list[object]]]:
        size = max(1, min(_QUERIES, _CANDIDATES // width))
        for begin in range(0, len(rows), size):
            some = rows[begin : begin + size]
            own = _unit("queries", source, some)
            mined = mine_block(
                rules,
                near.search(own, width),
                own,
                near.directions,
                answers.among(some),
                texts=(None, None) if texts is None else (texts[0][some], texts[1]),
                rescore=None if rescore is None else _shifted(rescore, some),
                guide=None if guides is None else (guides[0].only(some), guides[1]),
                rng=rng,
            )
            state.add(
                mined,
                count_false(
                    mined,
                    labels=None if groups is None else (groups[0][some], groups[1]),
                    texts=None if texts is None else (texts[0][some], texts[1]),
                    guide=None if guides is None else (guides[0].only(some), guides[1]),
                ),
            )
            kept = mined
            if answers.own is not None:
                kept = mined.with_pairs(mined.pairs[1] == answers.own[some[mined.pairs[0]]])
            documents = np.unique(np.concatenate([kept.pairs[1], kept.negatives[kept.negatives >= 0]]))
            yield columns_of(
                kept,
                cells[0].at(some),
                dict(zip(documents.tolist(), cells[1].at(documents), strict=True)),
                form,
                names=names,
                scores=scores,
            )
            advance(len(some))

    written, columns = _write(tables(), output, schema)
    return MinedOnDisk(
        output,
        written,
        columns,
        len(rows),
        unanswered=n - len(rows),
        per_query=per_query,
        index=state.index,
        recall=recall,
        sampled=sampled,
        false_negatives=shares_of(state.false),
        negatives=state.negatives,
        short=state.short,
        empty=state.empty,
        candidates=state.candidates,
        left_out=state.left_out,
    )


def _labels(
    labels: tuple[Iterable[object], Iterable[object]], n: int, m: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Numbers of the labels of both sides, which are read once in order; -1 where one is missing."""
    known: dict[str, int] = {}

    def numbers(side: str, values: Iterable[object]) -> Iterator[int]:
        for row, value in enumerate(values):
            if isinstance(value, (list, tuple, dict, set, np.ndarray)):
                raise NearfarError(
                    f"labels of the {side}: row {row} has {shown(value)}; one label, a text or a number, is needed"
                )
            if is_missing(value):
                yield -1
                continue
            if isinstance(value, (float, np.floating)) and float(value).is_integer():
                value = int(value)
            yield known.setdefault(str(value), len(known))

    own, theirs = (
        np.fromiter(numbers(side, _plain(each)), np.int32)
        for side, each in zip(("queries", "corpus"), labels, strict=True)
    )
    if (len(own), len(theirs)) != (n, m):
        raise NearfarError(f"labels are {len(own)} and {len(theirs)}; {n} and {m}, one for each, are needed")
    return own, theirs


def _plain(values: Iterable[object]) -> Iterable[object]:
    return values.tolist() if hasattr(values, "tolist") else values


def _unit(name: str, shards: VectorShards, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows at rising positions, of unit length."""
    given = shards.take(rows)
    bad = ~np.isfinite(given).all(1)
    if bad.any():
        raise NearfarError(f"{name}: row {rows[bad.argmax()]} holds numbers that are not finite")
    return unit_rows(name, given)


def _shifted(rescore: Rescore, rows: NDArray[np.int64]) -> Rescore:
    return lambda query, document: rescore(rows[query], document)


@dataclass(frozen=True)
class _UnitShards:
    """Rows of unit length from shards, at any positions; ``of`` are the positions that are meant by 0, 1, …"""

    name: str
    shards: VectorShards
    of: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self.shards.n if self.of is None else len(self.of)

    def __getitem__(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        wanted, back = np.unique(rows if self.of is None else self.of[rows], return_inverse=True)
        return _unit(self.name, self.shards, wanted)[back]

    def only(self, rows: NDArray[np.int64]) -> _UnitShards:
        return _UnitShards(self.name, self.shards, rows)


def _guides(guide: object, n: int, m: int) -> tuple[_UnitShards, _UnitShards]:
    u, v = (VectorShards.of(each) for each in guide_sides(guide))
    check_guide((u.n, u.dim), (v.n, v.dim), n, m)
    return _UnitShards("guide of the queries", u), _UnitShards("guide of the corpus", v)


class _Cells:
    """What stands in the cells of one side, by position, and the type of it all."""

    def __init__(self, name: str, values: Cells | None, default: np.ndarray) -> None:
        if values is None:
            values = default
        elif isinstance(values, (list, tuple)):
            whole = np.empty(len(values), object)
            whole[:] = values
            values = whole
        else:
            values = by_place(values)
        if len(values) != len(default):
            raise NearfarError(
                f"{len(values)} values for the cells of {len(default)} rows; one for each is needed"
            )
        self.values: Any = values
        self.type = _type_of(name, self)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, rows: NDArray[np.integer]) -> list[object]:
        some = self.values[rows]
        return some.tolist() if isinstance(some, np.ndarray) else list(some)


def _type_of(name: str, cells: _Cells) -> pyarrow.DataType:
    """The one type that holds all values; ``NearfarError`` where there is none."""
    import pyarrow

    values = cells.values
    if isinstance(values, MappedColumn):
        return pyarrow.string()
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "Uif":
        return {"U": pyarrow.string(), "i": pyarrow.int64(), "f": pyarrow.float64()}[values.dtype.kind]
    schema = pyarrow.schema([(name, pyarrow.null())])
    for begin in range(0, len(cells), _STRETCH):
        end = min(begin + _STRETCH, len(cells))
        try:
            some = pyarrow.array(cells.at(np.arange(begin, end)), from_pandas=True)
            schema = pyarrow.unify_schemas(
                [schema, pyarrow.schema([(name, some.type)])], promote_options="permissive"
            )
        except (pyarrow.ArrowException, OverflowError) as error:
            raise NearfarError(
                f"{name}: rows {begin} to {end - 1} do not fit into a column of one type ({error}); give values that "
                "do, such as texts alone"
            ) from None
    return schema.field(0).type


class _Totals:
    """Counts over blocks."""

    def __init__(self) -> None:
        self.negatives = self.short = self.empty = self.candidates = 0
        self.left_out: dict[str, int] = {}
        self.false: dict[str, tuple[int, int]] = {}
        self.index = ""

    def add(self, mined: Mined, false: Mapping[str, tuple[int, int]]) -> None:
        counts, wanted = mined.counts, mined.negatives.shape[1]
        self.negatives += int(counts.sum())
        self.short += int((counts < wanted).sum())
        self.empty += int((counts == 0).sum())
        self.candidates += mined.candidates
        self.index = mined.index
        for why, count in mined.left_out.items():
            self.left_out[why] = self.left_out.get(why, 0) + count
        for by, (wrong, n) in false.items():
            before = self.false.get(by, (0, 0))
            self.false[by] = (before[0] + wrong, before[1] + n)


def _write(
    tables: Iterator[dict[str, list[object]]], output: Path, schema: pyarrow.Schema
) -> tuple[int, list[str]]:
    """All tables into one Parquet file, one in memory at a time; its rows and columns."""
    import pyarrow
    import pyarrow.parquet

    rows = 0

    def write(file: IO[bytes]) -> None:
        nonlocal rows
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            for each in filter(None, tables):
                columns = [pyarrow.array(each[part.name], part.type, from_pandas=True) for part in schema]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
                rows += len(columns[0])
        if not rows:
            raise NearfarError(
                "no query has as many negatives as were asked for: widen rank_range, or lower the margins"
            )

    write_atomically(output, write)
    return rows, schema.names
