"""Stores that are damaged, foreign, or made to run code, and servers that are not there."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.serving.stores import create_store, open_store

D = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "rows.faiss"
    with create_store(str(place), D, {"lang": "text"}) as store:
        store.add([f"r{i}" for i in range(20)], np.eye(20, D) + 0.1, {"lang": ["de", "en"] * 10})
        store.finish()
    return place


def ask(place: object) -> list[str]:
    with open_store(str(place)) as store:
        return store.search(np.ones((1, D)), 3, "lang=de")[0].ids


def test_a_finished_store_is_two_files_that_others_read(folder: Path) -> None:
    import faiss
    import pyarrow.parquet

    assert len(ask(folder)) == 3
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix) == [".faiss", ".json", ".parquet"]
    assert faiss.read_index(str(next(folder.glob("*.faiss")))).ntotal == 20
    assert pyarrow.parquet.read_table(next(folder.glob("*.parquet"))).column_names == ["id", "lang"]
    moved = folder.with_name("moved.faiss")
    folder.rename(moved)
    assert len(ask(moved)) == 3


@pytest.mark.parametrize("name", ["vectors-1.faiss", "columns-1.parquet", "store.json"])
def test_damage_is_an_error(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    spoiled = [b"", whole[: len(whole) // 2], whole + b"x", generator.bytes(len(whole))]
    for at in (0, len(whole) // 2, len(whole) - 1):
        spoiled.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    for content in spoiled:
        path.write_bytes(content)
        with pytest.raises(NearfarError, match=r"damaged|is missing|not|JSON"):
            ask(folder)
    path.unlink()
    with pytest.raises(NearfarError, match="is missing"):
        ask(folder)


def test_a_head_that_leads_elsewhere_is_an_error(folder: Path) -> None:
    head = json.loads((folder / "store.json").read_text())
    for change in (
        {"format": 9},
        {"dim": 5},
        {"rows": 7},
        {"columns": {"other": "text"}},
        {"files": {}},
        {"files": {f"../{name}": facts for name, facts in head["files"].items()}},
        {"parts": [{"name": "../../x", "rows": 3}]},
    ):
        (folder / "store.json").write_text(json.dumps(head | change))
        with pytest.raises(NearfarError), open_store(str(folder)) as store:
            store.search(np.ones((1, store.dim)), 3)


def test_a_part_that_is_damaged_is_an_error(tmp_path: Path) -> None:
    for number, suffix in enumerate((".npy", ".parquet")):
        place = tmp_path / f"{number}.faiss"
        with create_store(str(place), D) as store:
            store.add(["a"], np.ones((1, D)))
        part = next(place.glob(f"*{suffix}"))
        for content in (b"", b"\x80\x04cos\nsystem\n", pickle.dumps([1, 2, 3])):
            part.write_bytes(content)
            with pytest.raises(NearfarError, match="damaged"), open_store(str(place)) as store:
                len(store)


def test_what_is_no_store_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "mine.faiss"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(NearfarError, match="holds something else"):
        create_store(str(other), D)
    assert (other / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "index.faiss"
    file.write_bytes(b"IxFI")
    for attempt in (lambda: open_store(str(file)), lambda: create_store(str(file), D)):
        with pytest.raises(NearfarError, match="is a file"):
            attempt()


def test_one_process_writes_at_a_time(folder: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (folder / ".lock").open("w") as file, open_store(str(folder)) as store:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(NearfarError, match="being written by a different process"):
            store.add(["new"], np.ones((1, D)), {"lang": ["de"]})
        assert len(store.search(np.ones((1, D)), 30)[0].ids) == 20


class Bad:
    """What a pickle may do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_a_folder_of_qdrant_cannot_run_code(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_client")
    place = tmp_path / "rows"
    with create_store(f"qdrant:{place}", D) as store:
        store.add(["a", "b"], np.eye(2, D))
    with open_store(f"qdrant:{place}") as store:
        assert len(store) == 2
    file = next(place.rglob("storage.sqlite"))
    with sqlite3.connect(file) as database:
        database.execute("INSERT INTO points VALUES ('x', ?)", (pickle.dumps(Bad(tmp_path / "ran")),))
    with pytest.raises(NearfarError, match="only plain values may stand there"):
        open_store(f"qdrant:{place}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_folder_of_others_is_no_store(tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb")
    database = lancedb.connect(str(tmp_path / "theirs"))
    database.create_table("nearfar", [{"id": "a", "vector": [1.0, 2.0]}])
    with pytest.raises(NearfarError, match="holds no store 'nearfar'"):
        open_store(f"lance:{tmp_path / 'theirs'}")
    with create_store(f"lance:{tmp_path / 'own'}", D, {"x": "number"}) as store:
        store.add(["a"], np.ones((1, D)), {"x": [1]})
    shutil.rmtree(next((tmp_path / "own" / "nearfar.lance").glob("data")))
    with pytest.raises(NearfarError), open_store(f"lance:{tmp_path / 'own'}") as store:
        store.search(np.ones((1, D)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "place"),
    [
        ("psycopg", "postgresql://me:secret@127.0.0.1:1/none"),
        ("qdrant_client", "qdrant+http://127.0.0.1:1"),
    ],
)
def test_a_server_that_is_not_there(package: str, place: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(NearfarError, match=r"127\.0\.0\.1:1") as caught:
        open_store(place)
    assert "secret" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(NearfarError, match=r"needs lancedb.*nearfar\[lance\]"):
        open_store("lance:somewhere")
