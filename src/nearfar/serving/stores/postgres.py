"""A store in PostgreSQL with the extension pgvector."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.serving.stores.base import Columns, Head, Matches, VectorStore, table_name
from nearfar.serving.stores.filters import Condition, Kind, Value

if TYPE_CHECKING:
    import psycopg
    from psycopg import sql

__all__ = ["PostgresStore"]

_HEADS = "nearfar_stores"
_WIDEST = 16_000  # numbers of a vector; an index takes 2,000
_WIDEST_INDEX = 2_000
_FEW = 15_000  # rows that pass a filter and are compared in the time in which the index looks far enough
_TYPES = {"text": "text", "number": "double precision", "boolean": "boolean"}
_PG_NAMES = {"text": "text", "number": "float8", "boolean": "bool"}


class PostgresStore(VectorStore):
    """``postgresql://USER@HOST/DATABASE``; the table is ``nearfar``, or what follows a ``#``.

    A table with the columns of the gallery, and a row in ``nearfar_stores`` that says what it holds; rows and that note
    are written in one transaction. The approximate index is HNSW. All values of filters are parameters of the query.
    """

    form: ClassVar[str] = "postgresql://USER@HOST/DATABASE"
    approximate_from: ClassVar[int | None] = 50_000
    method: ClassVar[tuple[str, str]] = ("HNSW", "ef_search")

    def __init__(self, place: str, connection: psycopg.Connection, head: Head) -> None:
        super().__init__(place, head["dim"], head["columns"], head["about"], head["index"])
        self._connection = connection
        self._name = table_name(place)[1]
        if self.dim > _WIDEST_INDEX:
            self.approximate_from = None  # type: ignore[misc]

    @classmethod
    def require(cls) -> None:
        import pgvector.psycopg  # noqa: F401
        import psycopg  # noqa: F401

    @classmethod
    def exists(cls, place: str) -> bool:
        with _errors(place), _connect(place) as connection:
            return _head(connection, table_name(place)[1]) is not None

    @classmethod
    def create(
        cls, place: str, dim: int, kinds: Mapping[str, Kind], about: Mapping[str, object]
    ) -> PostgresStore:
        from psycopg import sql

        if dim > _WIDEST:
            raise NearfarError(f"pgvector keeps vectors of at most {_WIDEST} numbers, and these have {dim}.")
        name = table_name(place)[1]
        head: Head = {"dim": dim, "columns": dict(kinds), "about": dict(about), "index": None}
        connection = _connect(place, make=True)
        try:
            with _errors(place), connection.transaction():
                if _head(connection, name) is None and _table_exists(connection, name):
                    raise NearfarError(
                        f"{_bare(place)} has a table '{name}' that nearfar did not make; it is left as it is. Name a "
                        "different one, with #NAME."
                    )
                store = cls(place, connection, head)
                fields = [
                    sql.SQL("{} {}").format(sql.Identifier(store.fields[column]), sql.SQL(_TYPES[kind]))
                    for column, kind in kinds.items()
                ]
                vector = sql.SQL("vector vector({}) NOT NULL").format(sql.Literal(dim))
                columns = sql.SQL(", ").join([sql.SQL("id text PRIMARY KEY"), vector, *fields])
                connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name)))
                connection.execute(sql.SQL("CREATE TABLE {} ({})").format(sql.Identifier(name), columns))
                store._write_head()
            return store
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open(cls, place: str) -> PostgresStore:
        name = table_name(place)[1]
        connection = _connect(place)
        try:
            with _errors(place):
                head = _head(connection, name)
            if head is None:
                raise NearfarError(f"{_bare(place)} has no table '{name}' that nearfar has filled.")
            return cls(place, connection, head)
        except BaseException:
            connection.close()
            raise

    # -- writing ---------------------------------------------------------------------------------------------
    def _write_head(self) -> None:
        head = {"dim": self.dim, "columns": self.kinds, "about": self.about, "index": self.index}
        self._connection.execute(
            f"INSERT INTO {_HEADS} (name, head) VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET head = EXCLUDED.head",
            (self._name, json.dumps(head)),
        )

    def _save_head(self) -> None:
        with _errors(self.place), self._connection.transaction():
            self._write_head()

    def _upsert(self, ids: list[str], vectors: np.ndarray, columns: Columns) -> None:
        from pgvector import Vector
        from psycopg import sql

        written: dict[str, Sequence[Value | None]] = {"id": ids, **columns}
        for name, values in written.items():
            for identity, value in zip(ids, values, strict=True):
                if isinstance(value, str) and "\0" in value:
                    raise NearfarError(
                        f"{self.shown}: '{name}' of the row {identity!r} holds a zero byte, which PostgreSQL refuses."
                    )
        fields = ["id", "vector", *self.fields.values()]
        types = ["text", "vector", *(_PG_NAMES[kind] for kind in self.kinds.values())]
        names = sql.SQL(", ").join(map(sql.Identifier, fields))
        table, staging = sql.Identifier(self._name), sql.Identifier("nearfar_staging")
        replaced = sql.SQL(", ").join(
            sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(field)) for field in fields[1:]
        )
        with _errors(self.place), self._connection.transaction():
            cursor = self._connection.cursor()
            cursor.execute(
                sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {}) ON COMMIT DROP").format(staging, table)
            )
            with cursor.copy(
                sql.SQL("COPY {} ({}) FROM STDIN WITH (FORMAT BINARY)").format(staging, names)
            ) as copy:
                copy.set_types(types)
                for i, identity in enumerate(ids):
                    copy.write_row(
                        [identity, Vector(vectors[i]), *(values[i] for values in columns.values())]
                    )
            cursor.execute(
                sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} ON CONFLICT (id) DO UPDATE SET {}").format(
                    table, names, names, staging, replaced
                )
            )
            self._write_head()

    # -- reading ---------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return self._count([])

    def _count(self, where: Sequence[Condition]) -> int:
        from psycopg import sql

        clause, values = self._where(where)
        query = sql.SQL("SELECT count(*) FROM {} {}").format(sql.Identifier(self._name), clause)
        with _errors(self.place), self._connection.transaction():
            return int(_first(self._connection.execute(query, values)))

    def _where(self, where: Sequence[Condition]) -> tuple[sql.Composable, list[Value | list[Value]]]:
        """The clause, in which every value is a parameter, and the parameters."""
        from psycopg import sql

        parts: list[sql.Composable] = []
        values: list[Value | list[Value]] = []
        for each in where:
            field, kind = sql.Identifier(self.fields[each.column]), sql.SQL(_TYPES[each.kind])
            if each.operator == "in":
                parts.append(sql.SQL("{} = ANY(%s::{}[])").format(field, kind))
                values.append(list(each.values))
            elif each.operator == "not in":
                parts.append(sql.SQL("{} <> ALL(%s::{}[])").format(field, kind))
                values.append(list(each.values))
            else:
                parts.append(sql.SQL("{} {} %s::{}").format(field, sql.SQL(each.operator), kind))
                values.append(each.values[0])
        if not parts:
            return sql.SQL(""), values
        return sql.SQL("WHERE {}").format(sql.SQL(" AND ").join(parts)), values

    def _search(
        self, vectors: np.ndarray, k: int, where: Sequence[Condition], effort: int | None
    ) -> list[Matches]:
        from pgvector import Vector
        from psycopg import sql

        clause, values = self._where(where)
        fields = [sql.Identifier(field) for field in ("id", *self.fields.values())]
        query = sql.SQL(
            "SELECT -(vector <#> %s) AS nearfar_score, {} FROM {} {} ORDER BY vector <#> %s LIMIT %s"
        ).format(sql.SQL(", ").join(fields), sql.Identifier(self._name), clause)
        answers = []
        with _errors(self.place), self._connection.transaction():
            if effort is None:
                self._connection.execute("SET LOCAL enable_indexscan = off")
            else:
                self._connection.execute(f"SET LOCAL hnsw.ef_search = {int(effort)}")
                self._connection.execute("SET LOCAL enable_seqscan = off")
                self._connection.execute("SET LOCAL enable_sort = off")  # the index gives the order
            for vector in vectors:
                asked = Vector(vector)
                # a prepared statement would keep the plan of earlier settings, and be exact or not as they were
                answer = self._connection.execute(query, [asked, *values, asked, k], prepare=False)
                rows = answer.fetchall()
                answers.append(
                    Matches(
                        np.array([row[0] for row in rows], np.float32),
                        [row[1] for row in rows],
                        [dict(zip(self.fields, row[2:], strict=True)) for row in rows],
                    )
                )
        return answers

    def _exact_is_faster(self, queries: int, effort: int, share: float) -> bool:
        assert self.index is not None
        return share < 1 and share * int(self.index["rows"]) < _FEW

    def _sample(self, n: int) -> np.ndarray:
        from psycopg import sql

        query = sql.SQL("SELECT vector FROM {} ORDER BY hashtext(id), id LIMIT %s").format(
            sql.Identifier(self._name)
        )
        with _errors(self.place), self._connection.transaction():
            rows = self._connection.execute(query, (n,)).fetchall()
        return np.array([np.asarray(row[0].to_numpy()) for row in rows], np.float32).reshape(-1, self.dim)

    # -- the index -------------------------------------------------------------------------------------------
    def _build(self, rows: int) -> tuple[Json, int, int]:
        from psycopg import sql

        self._forget_index()
        with _errors(self.place), self._connection.transaction():
            self._connection.execute(
                sql.SQL("CREATE INDEX {} ON {} USING hnsw (vector vector_ip_ops)").format(
                    sql.Identifier(f"{self._name}_hnsw"), sql.Identifier(self._name)
                )
            )
        return {"m": 16}, 40, 1000  # the largest ef_search that pgvector takes

    def _forget_index(self) -> None:
        from psycopg import sql

        with _errors(self.place), self._connection.transaction():
            self._connection.execute(
                sql.SQL("DROP INDEX IF EXISTS {}").format(sql.Identifier(f"{self._name}_hnsw"))
            )

    def close(self) -> None:
        self._connection.close()


def _bare(place: str) -> str:
    from nearfar.serving.stores.base import without_password

    return without_password(table_name(place)[0])


def _connect(place: str, make: bool = False) -> psycopg.Connection:
    """A connection to a database that has the extension; ``make``: and the table of stores."""
    import psycopg
    from pgvector.psycopg import register_vector

    with _errors(place):
        connection = psycopg.connect(table_name(place)[0], autocommit=True, connect_timeout=10)
        try:
            if make:
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
                connection.execute(
                    f"CREATE TABLE IF NOT EXISTS {_HEADS} (name text PRIMARY KEY, head text NOT NULL)"
                )
            if _has_extension(connection):
                register_vector(connection)
        except psycopg.Error as error:
            connection.close()
            raise NearfarError(
                f"{_bare(place)}: pgvector cannot be used there ({str(error).splitlines()[0]}). Install it on the "
                "server, and run CREATE EXTENSION vector as the owner of the database."
            ) from None
        return connection


def _has_extension(connection: psycopg.Connection) -> bool:
    return connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'vector'").fetchone() is not None


def _head(connection: psycopg.Connection, name: str) -> Head | None:
    if not (_table_exists(connection, _HEADS) and _table_exists(connection, name)):
        return None
    row = connection.execute(f"SELECT head FROM {_HEADS} WHERE name = %s", (name,)).fetchone()
    if row is None:
        return None
    head: Head = json.loads(row[0])
    if not (isinstance(head, dict) and {"dim", "columns", "about", "index"} <= head.keys()):
        raise NearfarError(
            f"the row '{name}' of {_HEADS} does not say what the store holds; remove it, and fill it anew."
        )
    return head


def _table_exists(connection: psycopg.Connection, name: str) -> bool:
    return _first(connection.execute("SELECT to_regclass(quote_ident(%s))", (name,))) is not None


def _first(cursor: psycopg.Cursor) -> Any:
    """The value of a query that gives one."""
    row = cursor.fetchone()
    assert row is not None
    return row[0]


@contextmanager
def _errors(place: str) -> Iterator[None]:
    """What the server answers, as a message that says where."""
    import psycopg

    try:
        yield
    except NearfarError:
        raise
    except (psycopg.Error, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise NearfarError(f"{_bare(place)}: PostgreSQL could not do this ({first}).") from None
