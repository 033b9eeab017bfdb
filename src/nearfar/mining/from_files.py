"""Mining from files: embeddings of queries, an index of documents, tables of both, and judgments by id."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nearfar.batching.mapped_neighbors import MappedNeighbors
from nearfar.data.files import make_folder
from nearfar.data.mapped import IdPlaces, MappedColumn, mapped_columns
from nearfar.data.rankings import QREL_HEADERS, read_qrels
from nearfar.data.rejections import Rejections
from nearfar.data.table_formats import PARQUET_SUFFIXES, full_suffix, parquet_header
from nearfar.data.tables import column_key
from nearfar.data.vector_shards import VectorShards, shards_of_table
from nearfar.errors import NearfarError
from nearfar.mining.candidates import Answers, Positives, text_numbers
from nearfar.mining.on_disk import MinedOnDisk, mine_negatives_on_disk

if TYPE_CHECKING:
    import pyarrow

__all__ = ["mine_files"]

_Values: TypeAlias = np.ndarray | MappedColumn


def mine_files(
    source: Path,
    near: MappedNeighbors,
    output: Path,
    views: tuple[str, str],
    *,
    data: Path | None = None,
    documents_data: Path | None = None,
    qrels: Path | None = None,
    split: str | None = None,
    label: str | None = None,
    id_column: str | None = None,
    **options: Any,
) -> tuple[MinedOnDisk, list[str]]:
    """`mine_negatives_on_disk` with everything from files, and notes about them.

    Args:
        source: embeddings of the queries: ``.npy``, a folder of shards, or a table with a column of vectors.
        near: the index of the documents.
        output: the Parquet file.
        views: the columns of queries and documents in tables, and in what is written.
        data, documents_data: tables with the values of both sides and ``label``; None: ids stand in the cells.
        qrels: judgments by id, of which grades above 0 are answers, for all rows with that id; pairs of positions as
            ``.npy``. None: the document with the id of a query answers it (where either side has no ids, that of the
            same row), and every query of the same text.
        split: of a BEIR folder.
        options: of `mine_negatives_on_disk`.
    """
    make_folder(output.absolute().parent)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".{output.name}.") as name:
        folder = Path(name)
        if qrels is None and documents_data is None:
            documents_data = data  # row i has both
        vectors, ids = _vectors(source, views[0], folder / "queries")
        queries = _Side(ids, vectors.n, views[0], data, label, folder / "queries.arrow", id_column)
        documents = _Side(
            near.ids, near.n, views[1], documents_data, label, folder / "documents.arrow", id_column
        )
        texts: tuple[_Values, _Values] | None = (queries.values, documents.values)
        if not (queries.named and documents.named):  # numbers of rows, which say nothing of each other
            texts = None
        notes: list[str] = []
        if qrels is None:
            positives: Answers = _row_by_row(queries, documents)
        else:
            positives, notes = _judged(qrels, split, queries.ids, documents.ids)
        mined = mine_negatives_on_disk(
            vectors,
            near,
            output,
            positives,
            query_texts=None if texts is None else texts[0],
            corpus_texts=None if texts is None else texts[1],
            labels=None if label is None else (queries.labels, documents.labels),
            names=views,
            query_values=queries.values,
            corpus_values=documents.values,
            **options,
        )
    return mined, notes


def _vectors(source: Path, view: str, folder: Path) -> tuple[VectorShards, np.ndarray | None]:
    if source.is_dir() or source.suffix.lower() == ".npy":
        return VectorShards.of(source), None
    ids = shards_of_table(source, view, folder, "--queries NAME")
    return VectorShards.of(folder), ids


class _Side:
    """Rows of one side: where their ids stand, and what their table says of them."""

    def __init__(
        self,
        ids: np.ndarray | None,
        rows: int,
        view: str,
        table: Path | None,
        label: str | None,
        file: Path,
        id_column: str | None,
    ) -> None:
        self.ids = IdPlaces(np.arange(rows) if ids is None else ids)
        self.own_ids = ids is not None
        self.named = ids is not None or table is not None
        self.values: _Values = self.ids.ids
        self.labels: MappedColumn | tuple[()] = ()
        if table is not None:
            names = [view] if label is None else [view, label]
            columns = mapped_columns(table, names, self.ids, file, id_column)
            self.values = columns[view]
            if label is not None:
                self.labels = columns[label]


def _row_by_row(queries: _Side, documents: _Side) -> Positives:
    if len(queries.ids) != len(documents.ids):
        raise NearfarError(
            f"{len(queries.ids)} queries and {len(documents.ids)} documents: without --qrels row i answers row i; say "
            "with --qrels which document answers which query."
        )
    both = text_numbers(queries.values, [], len(queries.ids), 0)
    assert both is not None
    return Positives.same_query(both[0], _same_ids(queries, documents))


def _same_ids(queries: _Side, documents: _Side) -> NDArray[np.int64] | None:
    """The document with the id of each query, (n,); None where they stand in the same order, or have no ids."""
    if not (queries.own_ids and documents.own_ids) or (queries.ids.ids == documents.ids.ids).all():
        return None
    own = documents.ids.of(queries.ids.ids)
    if (own < 0).any():
        which = int((own < 0).argmax())
        raise NearfarError(
            f"{int((own < 0).sum())} of {len(own)} queries have ids that no document has (first: "
            f"'{queries.ids.ids[which]}'): without --qrels the document with the id of a query answers it; say with "
            "--qrels which document answers which query."
        )
    if len(np.unique(own)) < len(own):
        raise NearfarError(
            "ids of queries and documents repeat and stand in different orders, so that they do not say which row "
            "answers which: say it with --qrels, or make the ids different."
        )
    return own


def _judged(
    path: Path, split: str | None, queries: IdPlaces, documents: IdPlaces
) -> tuple[Path | NDArray[np.int32], list[str]]:
    """Pairs of positions from judgments, and what cannot be used of them."""
    if path.suffix.lower() == ".npy":
        return path, []
    notes: list[str] = []
    parts: list[NDArray[np.int32]] = []
    asked = answered = 0
    for some_queries, some_documents in _positive_ids(path, split, notes):
        at, of = queries.of(some_queries), documents.of(some_documents)
        asked += int((at >= 0).sum())
        answered += int(((at >= 0) & (of >= 0)).sum())
        both = (at >= 0) & (of >= 0)
        entry, places = queries.every(at[both])
        again, answers = documents.every(of[both][entry])
        parts.append(np.stack([places[again], answers], 1).astype(np.int32))
    if not answered:
        raise NearfarError(
            f"{path}: no query has an answer in the judgments, which go by the ids of the embeddings (first query "
            f"here: '{queries.ids[0]}', first document: '{documents.ids[0]}'){''.join(f'; {each}' for each in notes)}."
        )
    if asked > answered:
        notes.append(
            f"{asked - answered} answers have no vector: documents whose ids are not among the embeddings; nothing is "
            "compared with them"
        )
    pairs = np.unique(np.concatenate(parts), axis=0)
    return pairs, notes


def _positive_ids(path: Path, split: str | None, notes: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Ids of queries and of documents that answer them; Parquet is read in stretches."""
    if not (path.is_file() and full_suffix(path) in PARQUET_SUFFIXES):
        judged = read_qrels(path, split)
        if judged.rejections.total:
            notes.append(f"{path}: {judged.rejections.summary()}")
        listed = [
            (query, document) for query, own in judged.items() for document, grade in own.items() if grade > 0
        ]
        yield [query for query, _ in listed], [document for _, document in listed]
        return
    import pyarrow.parquet

    known = {column_key(name): name for name in parquet_header(path)}
    headers = [
        next((known[column_key(each)] for each in names if column_key(each) in known), None)
        for names in QREL_HEADERS
    ]
    query, document, grade = headers
    if query is None or document is None:
        raise NearfarError(
            f"{path} has the columns {', '.join(known.values())}; query_id and doc_id are needed."
        )
    columns, rejections, begin = [name for name in headers if name is not None], Rejections(), 1
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1 << 18, columns=columns):
        queries, documents = _id_texts(batch[query]), _id_texts(batch[document])
        grades = [1.0] * len(queries) if grade is None else list(map(_grade, batch[grade].to_pylist()))
        kept: list[tuple[str, str]] = []
        for row, (own, answer, value) in enumerate(zip(queries, documents, grades, strict=True), begin):
            if not own or not answer:
                rejections.add("no id", row)
            elif value is None:
                rejections.add("grade is no number", row, batch[grade][row - begin].as_py())
            elif value > 0:
                kept.append((own, answer))
        begin += len(queries)
        yield [own for own, _ in kept], [answer for _, answer in kept]
    if rejections.total:
        notes.append(f"{path}: {rejections.summary()}")


def _id_texts(column: pyarrow.Array) -> list[str | None]:
    """Ids as texts; whole numbers may be stored as floating point, as pandas does where some are missing."""
    values = column.to_pylist()
    if any(isinstance(value, float) for value in values):
        values = [
            int(v) if isinstance(v, float) and v.is_integer() else None if v != v else v for v in values
        ]
    return [None if value is None else str(value) for value in values]


def _grade(value: object) -> float | None:
    try:
        grade = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return grade if math.isfinite(grade) else None
