"""Every store gives what an explicit search over an array gives: nearest rows, filters, upserts, resumption."""

from __future__ import annotations

import contextlib
import operator
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.serving.stores import create_store, open_store, parquet_columns, store_exists

D = 8
KINDS: dict[str, Any] = {
    "lang": "text",
    "price": "number",
    "Preis in €": "number",
    "new": "boolean",
    "Lang": "text",
}
HOSTILE = [
    "de",
    "O'Hara",
    'say "hi"',
    "a,b",
    "x'); DROP TABLE nearfar; --",
    "back\\slash",
    "ünï £ 漢",
    "",
    "%s",
    "`id`",
    "{}",
]
STORES = ["faiss", "lance", "qdrant", "postgres"]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A PostgreSQL with pgvector, started for these tests.

    Started by root it runs as a user of its own, who may not enter pytest's folder.
    """
    pgserver = pytest.importorskip("pgserver")
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="nearfar-postgres-", ignore_cleanup_errors=True) as folder:
        running = pgserver.get_server(folder, cleanup_mode="delete")
        yield running.get_uri()
        running.cleanup()


@pytest.fixture(params=STORES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kind = request.param
    if kind == "faiss":
        return str(tmp_path / "rows.faiss")
    if kind == "postgres":
        return request.getfixturevalue("server") + f"#t{abs(hash(request.node.name)) % 10**9}"
    pytest.importorskip({"lance": "lancedb", "qdrant": "qdrant_client"}[kind])
    return f"{kind}:{tmp_path / 'rows'}"


class Rows:
    """Rows as arrays, and the search over them written out."""

    def __init__(self, n: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.vectors = rng.standard_normal((n, D)).astype(np.float32) * 3
        self.ids = [f"row {i} {HOSTILE[i % len(HOSTILE)]}" for i in range(n)]
        self.columns: dict[str, list[Any]] = {
            "lang": [None if i % 7 == 3 else HOSTILE[i % len(HOSTILE)] for i in range(n)],
            "price": [None if i % 5 == 4 else float(rng.integers(0, 20)) / 2 for i in range(n)],
            "Preis in €": [0.1 * i for i in range(n)],
            "new": [None if i % 6 == 5 else bool(i % 2) for i in range(n)],
            "Lang": [f"L{i % 3}" for i in range(n)],
        }

    def unit(self) -> np.ndarray:
        return self.vectors / np.linalg.norm(self.vectors, axis=1, keepdims=True)

    def nearest(self, query: np.ndarray, k: int, passing: Callable[[int], bool]) -> list[tuple[str, float]]:
        query = query / np.linalg.norm(query)
        scores = [(self.ids[i], float(self.unit()[i] @ query)) for i in range(len(self.ids)) if passing(i)]
        return sorted(scores, key=lambda each: -each[1])[:k]


def same(answer: Any, expected: list[tuple[str, float]]) -> None:
    assert answer.ids == [identity for identity, _ in expected]
    np.testing.assert_allclose(answer.scores, [score for _, score in expected], atol=2e-6)


@pytest.mark.slow
def test_nearest_rows_with_their_columns(place: str) -> None:
    rows, queries = Rows(60), np.random.default_rng(1).standard_normal((5, D))
    assert not store_exists(place)
    with create_store(place, D, KINDS, {"made of": "rows"}) as store:
        assert len(store) == 0
        assert store.search(queries, 3)[0].ids == []
        for begin in range(0, 60, 25):
            part = slice(begin, begin + 25)
            store.add(rows.ids[part], rows.vectors[part], {name: v[part] for name, v in rows.columns.items()})
        store.finish()
    assert store_exists(place)
    with open_store(place) as store:
        assert (len(store), store.dim, store.kinds, store.about) == (60, D, KINDS, {"made of": "rows"})
        assert "60 vectors of 8 numbers" in store.description
        answers = store.search(queries, 7)
        for query, answer in zip(queries, answers, strict=True):
            same(answer, rows.nearest(query, 7, lambda i: True))
            for identity, row in zip(answer.ids, answer.rows, strict=True):
                assert row == {
                    name: values[rows.ids.index(identity)] for name, values in rows.columns.items()
                }
        assert len(store.search(queries[:1], 1000)[0].ids) == 60


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_columns_of_hits_are_right_however_many_row_groups_are_kept(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_columns, "_GROUP", 7)
    monkeypatch.setattr(parquet_columns, "_GROUPS_KEPT", kept)
    rows, queries = Rows(60), np.random.default_rng(2).standard_normal((4, D))
    with create_store(str(tmp_path / "rows.faiss"), D, KINDS, {}) as store:
        store.add(rows.ids, rows.vectors, rows.columns)
        store.finish()
        for _ in range(2):
            for query, answer in zip(queries, store.search(queries, 20), strict=True):
                same(answer, rows.nearest(query, 20, lambda i: True))
                for identity, row in zip(answer.ids, answer.rows, strict=True):
                    assert row == {name: v[rows.ids.index(identity)] for name, v in rows.columns.items()}
        changed = {name: values[::-1] for name, values in rows.columns.items()}  # the same ids, new columns
        store.add(rows.ids, rows.vectors, changed)
        store.finish()
        for answer in store.search(queries, 20):
            for identity, row in zip(answer.ids, answer.rows, strict=True):
                assert row == {name: v[rows.ids.index(identity)] for name, v in changed.items()}


ORDER = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@pytest.mark.slow
def test_filters_are_those_of_the_arrays(place: str) -> None:
    rows, query = Rows(90), np.random.default_rng(2).standard_normal(D)

    def value(column: str, i: int) -> Any:
        return rows.columns[column][i]

    def among(column: str, *values: Any) -> Callable[[int], bool]:
        return lambda i: value(column, i) is not None and value(column, i) in values

    def none_of(column: str, *values: Any) -> Callable[[int], bool]:
        return lambda i: value(column, i) is not None and value(column, i) not in values

    filters: list[tuple[str | list[str], Callable[[int], bool]]] = []
    for text in HOSTILE:
        quoted = '"' + text.replace('"', '""') + '"'
        filters += [(f"lang={quoted}", among("lang", text)), (f"lang != {quoted}", none_of("lang", text))]
    for sign, compare in ORDER.items():
        filters.append(
            (
                f"price{sign}4.5",
                lambda i, c=compare: value("price", i) is not None and c(value("price", i), 4.5),
            )
        )
    filters += [
        ("price=3", among("price", 3.0)),
        ("price not in 3,4.5, 1", none_of("price", 3.0, 4.5, 1.0)),
        ('lang in de,"a,b",%s', among("lang", "de", "a,b", "%s")),
        ("new=true", among("new", True)),
        ("new!=yes", none_of("new", True)),
        ('"Preis in €"<3,Lang=L1', lambda i: value("Preis in €", i) < 3 and value("Lang", i) == "L1"),
        (
            ["Preis in €>=1", "Lang in L0,L2"],
            lambda i: value("Preis in €", i) >= 1 and value("Lang", i) != "L1",
        ),
        ("lang=nowhere", lambda i: False),
    ]
    with create_store(place, D, KINDS) as store:
        store.add(rows.ids, rows.vectors, rows.columns)
        for where, passing in filters:
            expected = rows.nearest(query, 90, passing)
            same(store.search(query[None], 90, where)[0], expected)
            same(store.search(query[None], 4, where)[0], expected[:4])
            assert store.count(where) == len(expected), where


@pytest.mark.slow
def test_a_row_of_the_same_id_is_replaced(place: str) -> None:
    first, second = Rows(20), Rows(20, seed=5)
    with create_store(place, D, KINDS) as store:
        store.add(first.ids, first.vectors, first.columns)
        assert len(store) == 20
        store.add(second.ids[10:], second.vectors[10:], {n: v[10:] for n, v in second.columns.items()})
        first.vectors[10:] = second.vectors[10:]
        for name, values in second.columns.items():
            first.columns[name][10:] = values[10:]
        # of an id that comes twice, the later row counts
        twice = {name: [v[0], v[1]] for name, v in second.columns.items()}
        store.add([first.ids[3]] * 2, second.vectors[:2], twice)
        first.vectors[3] = second.vectors[1]
        for name, values in second.columns.items():
            first.columns[name][3] = values[1]
    with open_store(place) as store:
        assert len(store) == 20
        query = np.ones(D)
        same(store.search(query[None], 20)[0], first.nearest(query, 20, lambda i: True))
        answer = store.search(query[None], 20, "lang=de")[0]
        assert all(row["lang"] == "de" for row in answer.rows)


@pytest.mark.slow
def test_a_fill_that_was_interrupted_goes_on_without_repeats(place: str) -> None:
    rows = Rows(30)
    with create_store(place, D, KINDS) as store:
        for begin in (0, 10):
            part = slice(begin, begin + 10)
            columns = {n: v[part] for n, v in rows.columns.items()}
            store.add(rows.ids[part], rows.vectors[part], columns, {"rows": begin + 10})
    with open_store(place) as store:
        assert store.about["rows"] == 20
        for begin in (10, 20):  # as if the note of the second chunk had been lost
            part = slice(begin, begin + 10)
            columns = {n: v[part] for n, v in rows.columns.items()}
            store.add(rows.ids[part], rows.vectors[part], columns, {"rows": begin + 10})
        assert len(store) == 30
        same(store.search(np.ones((1, D)), 30)[0], rows.nearest(np.ones(D), 30, lambda i: True))


@pytest.mark.slow
def test_a_new_store_replaces_the_one_before(place: str) -> None:
    rows = Rows(5)
    with create_store(place, D, KINDS) as store:
        store.add(rows.ids, rows.vectors, rows.columns)
    with create_store(place, 3) as store:
        assert (len(store), store.kinds) == (0, {})
        store.add(["a"], np.array([[1.0, 2.0, 2.0]]))
    with open_store(place) as store:
        assert store.search(np.array([[0.0, 0.0, 9.0]]), 5)[0].rows == [{}]
        store.note(source="new")
    with open_store(place) as store:
        assert store.about == {"source": "new"}


def test_what_cannot_be_stored_or_asked_is_refused(place: str) -> None:
    rows = Rows(4)
    with create_store(place, D, KINDS) as store:

        def refused(message: str, call: Callable[[], Any]) -> None:
            with pytest.raises(NearfarError, match=message):
                call()

        columns = rows.columns
        refused("not finite", lambda: store.add(["a"], np.full((1, D), np.nan), {n: [None] for n in KINDS}))
        refused("of 8 numbers, and these have 3", lambda: store.add(rows.ids, np.ones((4, 3)), columns))
        refused("shape", lambda: store.add(rows.ids, np.ones((3, D)), columns))
        refused(
            "differ: price",
            lambda: store.add(rows.ids, rows.vectors, {n: v for n, v in columns.items() if n != "price"}),
        )
        wrong = columns | {"price": [1.0, 2.0, "cheap", 3.0]}
        refused(
            f"'price' of the row '{rows.ids[2]}' is 'cheap'", lambda: store.add(rows.ids, rows.vectors, wrong)
        )
        refused(
            "infinite", lambda: store.add(rows.ids, rows.vectors, columns | {"price": [float("inf")] * 4})
        )
        refused(
            "half a character", lambda: store.add(rows.ids, rows.vectors, columns | {"lang": ["\ud800"] * 4})
        )
        refused("an id is empty", lambda: store.add([""], rows.vectors[:1], {n: [None] for n in KINDS}))
        assert len(store) == 0
        store.add(rows.ids, rows.vectors, columns)
        refused("k=0", lambda: store.search(np.ones((1, D)), 0))
        refused("these have 7", lambda: store.search(np.ones((1, 7))))
        refused("not finite", lambda: store.search(np.full((1, D), np.inf)))
        refused("did you mean 'price'", lambda: store.search(np.ones((1, D)), where="prise<3"))
        zero = store.search(np.zeros((1, D)), 4)[0]
        np.testing.assert_array_equal(zero.scores, 0)
        assert zero.ids == sorted(rows.ids)


def test_a_place_without_a_store_is_an_error(place: str) -> None:
    with pytest.raises(NearfarError, match=r"holds no|has no table"):
        open_store(place)


@pytest.mark.parametrize("wrong", ["rows", "lance:", "qdrant", "mysql://host/db", ""])
def test_what_is_no_place_is_said(wrong: str) -> None:
    with pytest.raises(NearfarError, match="is no place of a store"):
        open_store(wrong)


def indexes_here() -> bool:
    """Whether the packaged pgvector builds an index on this processor, asked of a server of its own: it may die."""
    import pgserver
    import psycopg

    with tempfile.TemporaryDirectory(prefix="nearfar-postgres-", ignore_cleanup_errors=True) as folder:
        running = pgserver.get_server(folder, cleanup_mode="delete")
        try:
            with psycopg.connect(running.get_uri(), autocommit=True) as connection:
                connection.execute("CREATE EXTENSION vector")
                connection.execute("CREATE TABLE t (v vector(8))")
                connection.execute(
                    "INSERT INTO t SELECT ARRAY(SELECT random() FROM generate_series(1, 8) WHERE n > 0)::vector(8) "
                    "FROM generate_series(1, 3000) AS n"
                )
                connection.execute("CREATE INDEX ON t USING hnsw (v vector_ip_ops)")
        except psycopg.OperationalError:
            # Asked to end, a server that recovers from this is waited for a minute.
            with contextlib.suppress(Exception):
                pgserver.pg_ctl(
                    ["-m", "immediate", "stop"], pgdata=running.pgdata, user=running.system_user, timeout=10
                )
            return False
        finally:
            with contextlib.suppress(Exception):
                running.cleanup()
    return True


@pytest.mark.parametrize("place", ["faiss", "lance", "postgres"], indirect=True)
@pytest.mark.slow
def test_a_large_store_has_an_index_whose_recall_is_measured(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place.startswith("postgresql") and not indexes_here():
        pytest.skip(
            "this build of pgvector has instructions that this processor lacks: an index ends its server"
        )
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((40, D))
    vectors = (centres[rng.integers(0, 40, 6000)] + 0.3 * rng.standard_normal((6000, D))).astype(np.float32)
    ids = [f"r{i}" for i in range(6000)]
    kind = [f"k{i % 50}" for i in range(6000)]
    queries = vectors[:50] + 0.05
    with create_store(place, D, {"kind": "text"}) as store:
        monkeypatch.setattr(type(store), "approximate_from", 3000)
        store.add(ids[:3000], vectors[:3000], {"kind": kind[:3000]})
        store.add(ids[3000:], vectors[3000:], {"kind": kind[3000:]})
        store.finish(queries, "queries of this test")
        assert store.index is not None
        assert store.index["recall"] >= 0.95
        assert "recall@10" in store.description
        assert "50 queries of this test" in store.description
    with open_store(place) as store:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        asked = queries / np.linalg.norm(queries, axis=1, keepdims=True)
        best = np.argsort(-asked @ unit.T, axis=1)[:, :10]
        exact = store.search(queries, 10, exact=True)
        assert all({f"r{i}" for i in row} == set(answer.ids) for row, answer in zip(best, exact, strict=True))
        overlap = [
            len({f"r{i}" for i in row} & set(a.ids)) / 10
            for row, a in zip(best, store.search(queries, 10), strict=True)
        ]
        assert np.mean(overlap) >= 0.93
        assert store.recall(queries) == pytest.approx(np.mean(overlap), abs=0.02)
        # few rows pass: the answer is full, and as good
        filtered = store.search(queries, 10, "kind=k7")
        some = np.flatnonzero(np.arange(6000) % 50 == 7)
        for row, answer in zip(asked, filtered, strict=True):
            true = some[np.argsort(-(unit[some] @ row))[:10]]
            assert len(answer.ids) == 10
            assert len({f"r{i}" for i in true} & set(answer.ids)) >= 8
        assert len(store.search(queries[:1], 500, "kind=k7")[0].ids) == 120
