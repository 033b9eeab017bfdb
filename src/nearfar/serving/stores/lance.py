"""A store in LanceDB: a folder (or a bucket) of columns, made for galleries larger than the memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from nearfar.data.files import Json, parse_json
from nearfar.errors import NearfarError
from nearfar.serving.stores.base import Columns, Head, Matches, VectorStore, table_name
from nearfar.serving.stores.filters import Condition, Kind, Value

if TYPE_CHECKING:
    import lancedb
    import pyarrow
    from lancedb.query import LanceVectorQueryBuilder

__all__ = ["LanceStore"]

_HEAD = b"nearfar"  # in the metadata of the schema: what the store is; a second table holds what changes
_GROUP = 64  # queries that are asked for at once


class LanceStore(VectorStore):
    """``lance:FOLDER``, or ``lance:s3://BUCKET/FOLDER``; the table is ``nearfar``, or what follows a ``#``.

    Rows are merged by id; what the caller notes of the store is a row of the table ``NAME_about``. The approximate
    index is an inverted file of whole vectors (IVF_FLAT).
    """

    form: ClassVar[str] = "lance:FOLDER"
    approximate_from: ClassVar[int | None] = 200_000
    method: ClassVar[tuple[str, str]] = ("inverted file", "cells looked at")

    def __init__(self, place: str, database: lancedb.DBConnection, head: Head) -> None:
        super().__init__(place, head["dim"], head["columns"], head["about"], head["index"])
        self._database = database
        self._name = table_name(place)[1]
        self._table = database.open_table(self._name)
        self._ids: set[int] | None = None

    @classmethod
    def require(cls) -> None:
        import lancedb  # noqa: F401

    @classmethod
    def exists(cls, place: str) -> bool:
        where, name = table_name(place)
        folder = where.removeprefix("lance:")
        if "://" not in folder and not os.path.isdir(folder):
            return False
        return f"{name}_about" in _tables(_connect(place))

    @classmethod
    def create(
        cls, place: str, dim: int, kinds: Mapping[str, Kind], about: Mapping[str, object]
    ) -> LanceStore:
        import pyarrow

        database, name = _connect(place), table_name(place)[1]
        with _errors(place):
            for old in (f"{name}_about", name):
                if old in _tables(database):
                    database.drop_table(old)
            store = cls.__new__(cls)
            VectorStore.__init__(store, place, dim, kinds, about)
            database.create_table(name, schema=store._schema())
            head = pyarrow.table({"key": ["head"], "value": [store._head()]})
            database.create_table(f"{name}_about", head)
        return cls.open(place)

    @classmethod
    def open(cls, place: str) -> LanceStore:
        if not cls.exists(place):
            where, name = table_name(place)
            raise NearfarError(f"{where} holds no store '{name}' of LanceDB that nearfar has filled.")
        database, name = _connect(place), table_name(place)[1]
        with _errors(place):
            rows = database.open_table(f"{name}_about").to_arrow().to_pylist()
            head = parse_json(rows[0]["value"]) if len(rows) == 1 and "value" in rows[0] else {}
            if not (isinstance(head, dict) and {"dim", "columns", "about", "index"} <= head.keys()):
                raise NearfarError(
                    f"{place}: the table {name}_about does not say what the store holds; fill it anew."
                )
            store = cls(place, database, cast(Head, head))
            if store._table.schema.remove_metadata() != store._schema():
                raise NearfarError(
                    f"{place}: the table {name} does not have the columns that it should; fill it anew."
                )
        return store

    def _schema(self) -> pyarrow.Schema:
        import pyarrow

        types = {"text": pyarrow.string(), "number": pyarrow.float64(), "boolean": pyarrow.bool_()}
        fields = [(field, types[self.kinds[name]]) for name, field in self.fields.items()]
        return pyarrow.schema(
            [("id", pyarrow.string()), ("vector", pyarrow.list_(pyarrow.float32(), self.dim)), *fields]
        )

    def _head(self) -> str:
        return json.dumps({"dim": self.dim, "columns": self.kinds, "about": self.about, "index": self.index})

    def _save_head(self) -> None:
        import pyarrow

        with _errors(self.place):
            head = self._database.open_table(f"{self._name}_about")
            new = pyarrow.table({"key": ["head"], "value": [self._head()]})
            head.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(new)

    def _upsert(self, ids: list[str], vectors: np.ndarray, columns: Columns) -> None:
        import pyarrow

        with _errors(self.place):
            if self._ids is None:
                known = (
                    self._table.search().select(["id"]).limit(self._table.count_rows()).to_arrow()
                    if len(self)
                    else None
                )
                self._ids = set() if known is None else set(map(hash, known.column("id").to_pylist()))
            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), self.dim)
            arrays = {"id": ids, "vector": rows} | {self.fields[name]: each for name, each in columns.items()}
            table = pyarrow.table(arrays, schema=self._schema())
            hashes = [hash(identity) for identity in ids]
            old = np.array([each in self._ids for each in hashes])
            if old.any():  # a merge reads the ids of the whole table
                merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
                merge.execute(table.filter(old))
            if not old.all():
                self._table.add(table.filter(~old))
            self._ids.update(hashes)
        self._save_head()

    def __len__(self) -> int:
        with _errors(self.place):
            return int(self._table.count_rows())

    def _count(self, where: Sequence[Condition]) -> int:
        with _errors(self.place):
            return int(self._table.count_rows(self._sql(where)))

    def _sql(self, where: Sequence[Condition]) -> str:
        return " AND ".join(_condition(self.fields[each.column], each) for each in where)

    def _search(
        self, vectors: np.ndarray, k: int, where: Sequence[Condition], effort: int | None
    ) -> list[Matches]:
        answers: list[Matches] = []
        with _errors(self.place):
            n = self._table.count_rows()
            if not n:
                return [Matches(np.zeros(0, np.float32), [], []) for _ in vectors]
            for begin in range(0, len(vectors), _GROUP):
                group = vectors[begin : begin + _GROUP]
                near = self._table.search(list(group), vector_column_name="vector")
                query = cast("LanceVectorQueryBuilder", near).distance_type("dot").limit(min(k, n))
                query = query.select(["id", *self.fields.values(), "_distance"])
                query = query.bypass_vector_index() if effort is None else query.nprobes(effort)
                if where:
                    query = query.where(self._sql(where), prefilter=True)
                answers += self._matches(query.to_arrow(), len(group))
        return answers

    def _matches(self, table: pyarrow.Table, queries: int) -> list[Matches]:
        scores = 1.0 - table.column("_distance").to_numpy().astype(np.float32)
        ids = table.column("id").to_pylist()
        columns = {name: table.column(field).to_pylist() for name, field in self.fields.items()}
        of = (
            table.column("query_index").to_numpy()
            if "query_index" in table.column_names
            else np.zeros(len(ids), int)
        )
        order = np.argsort(of, kind="stable")
        groups = np.split(order, np.searchsorted(of[order], np.arange(1, queries)))
        return [
            Matches(
                scores[at], [ids[i] for i in at], [{name: c[i] for name, c in columns.items()} for i in at]
            )
            for at in (group.tolist() for group in groups)
        ]

    def _sample(self, n: int) -> np.ndarray:
        with _errors(self.place):
            rows = self._table.count_rows()
            at = np.sort(np.random.default_rng(1).choice(rows, min(n, rows), replace=False))
            table = self._table.take_offsets(at.tolist()).select(["vector"]).to_arrow()
        flat = table.column("vector").combine_chunks().flatten()
        return np.asarray(flat, np.float32).reshape(len(table), self.dim)

    def _build(self, rows: int) -> tuple[Json, int, int]:
        from lancedb.index import IvfFlat

        cells = max(1, min(int(np.sqrt(rows)), rows // 39))
        with _errors(self.place):
            self._table.optimize()
            index = IvfFlat(distance_type="dot", num_partitions=cells, sample_rate=64)
            self._table.create_index("vector", config=index)
        return {"cells": cells}, min(8, cells), cells

    def _forget_index(self) -> None:
        with _errors(self.place):
            for index in self._table.list_indices():
                self._table.drop_index(index.name)

    def close(self) -> None:
        self._ids = None


def _connect(place: str) -> lancedb.DBConnection:
    import lancedb

    where = table_name(place)[0].removeprefix("lance:")
    with _errors(place):
        return lancedb.connect(where)


def _tables(database: lancedb.DBConnection) -> list[str]:
    return list(database.list_tables(limit=10_000).tables)


@contextmanager
def _errors(place: str) -> Iterator[None]:
    """What LanceDB raises, as a message that says where."""
    try:
        yield
    except NearfarError:
        raise
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise NearfarError(
            f"{place}: LanceDB could not do this ({first}). Where the folder is damaged, remove it and fill it anew."
        ) from None


# -- filters in SQL ------------------------------------------------------------------------------------------
def _condition(field: str, condition: Condition) -> str:
    """A condition in Lance's SQL; ``field`` is a plain word.

    >>> _condition("who", Condition("who", "text", "in", ("O'Hara", "x")))
    "`who` IN ('O''Hara', 'x')"
    """
    values = [_literal(value) for value in condition.values]
    if condition.operator in ("in", "not in"):
        return f"`{field}` {condition.operator.upper()} ({', '.join(values)})"
    return f"`{field}` {condition.operator} {values[0]}"


def _literal(value: Value) -> str:
    """A value in SQL: in a text a single quote is doubled, and no other sign has a meaning there."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"CAST('{value!r}' AS DOUBLE)"
    return "'" + value.replace("'", "''") + "'"
