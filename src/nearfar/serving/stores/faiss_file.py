"""A store in a folder ``NAME.faiss``: an index of FAISS, memory-mapped, and the columns beside it as Parquet."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypedDict

import numpy as np

from nearfar.data.files import Json, Maybe, make_folder, read_json, remove_left_over, write_atomically
from nearfar.errors import NearfarError
from nearfar.serving.stores.base import Columns, Head, Matches, VectorStore
from nearfar.serving.stores.faiss_index import (
    Vectors,
    build_index,
    cells_for,
    compare_all,
    read_index,
    search_index,
    write_index,
)
from nearfar.serving.stores.filters import Condition, Kind
from nearfar.serving.stores.parquet_columns import (
    ParquetColumns,
    columns_schema,
    columns_table,
    write_columns,
    write_table,
)

if TYPE_CHECKING:
    import faiss
    import pyarrow

__all__ = ["FaissStore"]

HEAD = "store.json"
_FORMAT = 1
_SHAPE: dict[str, object] = {
    "format": int,
    "dim": int,
    "columns": {str: str},
    "about": dict,
    "rows": int,
    "generation": int,
    "index": Maybe(dict),
    "files": {str: {"bytes": int, "check": str}},
    "parts": [{"name": str, "rows": int}],
}
#: vectors, columns and rows of what was finished, or of a part
Piece: TypeAlias = "tuple[Vectors, pyarrow.Table, int]"


class _Part(TypedDict):
    name: str
    rows: int


class _File(TypedDict):
    bytes: int
    check: str


class _Head(Head):
    """What ``store.json`` holds."""

    format: int
    rows: int
    generation: int
    files: dict[str, _File]
    parts: list[_Part]


#: comparing a row of a cell takes so many times as long as one in a matrix product, and reading all rows once as
#: long as so many queries (docs/search.md)
_ONE_BY_ONE, _PASS = 20, 50
_EDGE = 1 << 20  # bytes at both ends of a file that its check covers


class FaissStore(VectorStore):
    """The default: nothing to install, one folder to copy.

    ``add`` writes a part (vectors as ``.npy``, columns as Parquet) and then ``store.json``, which alone says what
    counts; ``finish``, or the first search, joins the parts into ``vectors-N.faiss`` and ``columns-N.parquet``. Up to
    ``approximate_from`` rows the index is flat, beyond it is an inverted file. Joining holds all vectors in memory
    once.
    """

    form: ClassVar[str] = "FOLDER.faiss"
    approximate_from: ClassVar[int | None] = 200_000
    method: ClassVar[tuple[str, str]] = ("inverted file", "cells looked at")

    def __init__(self, folder: Path, head: _Head) -> None:
        super().__init__(str(folder), head["dim"], head["columns"], head["about"], head["index"])
        self.folder = folder
        self._rows: int = head["rows"]
        self._generation: int = head["generation"]
        self._files: dict[str, _File] = dict(head["files"])
        self._parts: list[_Part] = list(head["parts"])
        self._open_index: faiss.Index | None = None
        self._open_columns: ParquetColumns | None = None

    # -- the folder ------------------------------------------------------------------------------------------
    @classmethod
    def exists(cls, place: str) -> bool:
        return os.path.lexists(Path(place) / HEAD)

    @classmethod
    def create(
        cls, place: str, dim: int, kinds: Mapping[str, Kind], about: Mapping[str, object]
    ) -> FaissStore:
        folder = Path(place)
        if folder.exists() and not folder.is_dir():
            raise NearfarError(
                f"{folder} is a file, and a store is a folder with vectors, ids and columns; name a different place."
            )
        if folder.is_dir() and not cls.exists(place) and any(folder.iterdir()):
            raise NearfarError(
                f"{folder} holds something else than a store; name a new folder, which is made."
            )
        if cls.exists(place):
            shutil.rmtree(folder)
        make_folder(folder)
        head: _Head = {
            "format": _FORMAT, "dim": dim, "columns": dict(kinds), "about": dict(about), "rows": 0, "generation": 0,
            "index": None, "files": {}, "parts": [],
        }  # fmt: skip
        store = cls(folder, head)
        store._save_head()
        return store

    @classmethod
    def open(cls, place: str) -> FaissStore:
        folder = Path(place)
        if folder.is_file():
            raise NearfarError(
                f"{folder} is a file. A store is a folder with vectors, ids and columns: an index alone does not say "
                "what its rows are."
            )
        if not cls.exists(place):
            raise NearfarError(f"{folder} holds no store ({HEAD} is missing).")
        head: _Head = read_json(folder / HEAD, _SHAPE)
        if head["format"] != _FORMAT:
            raise NearfarError(
                f"{folder}: its format is {head['format']}, and this version reads format {_FORMAT}. Fill it anew."
            )
        return cls(folder, head)

    def _save_head(self) -> None:
        head = {
            "format": _FORMAT, "dim": self.dim, "columns": self.kinds, "about": self.about, "rows": self._rows,
            "generation": self._generation, "index": self.index, "files": self._files, "parts": self._parts,
        }  # fmt: skip
        text = json.dumps(head, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.folder / HEAD, lambda file: file.write(text.encode()))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One process at a time; the lock goes with the process."""
        try:
            import fcntl
        except ImportError:  # Windows, which has no such lock
            yield
            return
        try:
            with (self.folder / ".lock").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise NearfarError(
                        f"{self.folder} is being written by a different process; wait for it, or name a different one."
                    ) from None
                yield
        except OSError as error:
            raise NearfarError(
                f"{self.folder} cannot be written: {error.strerror or error}; name a different place."
            ) from None

    def _damaged(self, what: str) -> NearfarError:
        return NearfarError(
            f"{self.folder}: {what}. The store is damaged or was changed; remove the folder and fill it anew."
        )

    # -- writing ---------------------------------------------------------------------------------------------
    def _upsert(self, ids: list[str], vectors: np.ndarray, columns: Columns) -> None:
        name = f"part-{self._generation:04d}-{len(self._parts):06d}"
        with self._writing():
            write_atomically(
                self.folder / f"{name}.npy", lambda file: np.save(file, vectors, allow_pickle=False)
            )
            table = columns_table(ids, columns, self.fields, self._schema())
            write_atomically(self.folder / f"{name}.parquet", lambda file: write_table(table, file))
            self._parts.append({"name": name, "rows": len(ids)})
            self._save_head()

    def _schema(self) -> pyarrow.Schema:
        return columns_schema(self.kinds, self.fields)

    def _join(self) -> None:
        """Index and columns of the finished rows and of the parts; of each id the last row."""
        if not self._parts:
            return
        with self._writing():
            remove_left_over(self.folder)
            pieces = self._pieces()
            ids = np.concatenate([np.asarray(table.column("id")) for _, table, _ in pieces])
            kept = _last_of_each(ids)
            self._write(pieces, kept)

    def _pieces(self) -> list[Piece]:
        """Vectors, columns and rows of what was finished and of every part; vectors are read when they are copied."""
        pieces: list[Piece] = []
        if self._rows:
            index = self._reconstructing()
            pieces.append((index, self._columns().table(), self._rows))
        for part in self._parts:
            vectors, table = self._part(part["name"])
            if vectors.shape != (part["rows"], self.dim) or table.num_rows != part["rows"]:
                raise self._damaged(f"{part['name']} does not have the rows that it should")
            pieces.append((vectors, table, part["rows"]))
        return pieces

    def _part(self, name: str) -> tuple[np.ndarray, pyarrow.Table]:
        import pyarrow
        import pyarrow.parquet

        try:
            vectors = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            table = pyarrow.parquet.read_table(self.folder / f"{name}.parquet").cast(self._schema())
        except (OSError, ValueError, EOFError, pyarrow.ArrowException) as error:
            raise self._damaged(
                f"{name} cannot be read ({str(error).splitlines()[0] if str(error) else 'it is empty'})"
            ) from None
        if vectors.dtype != np.float32:
            raise self._damaged(f"{name} does not hold vectors")
        return vectors, table

    def _reconstructing(self) -> faiss.Index:
        index = self._faiss()
        if hasattr(index, "make_direct_map"):
            index.make_direct_map()
        return index

    def _write(self, pieces: Sequence[Piece], kept: np.ndarray) -> None:
        """Write the next generation, let ``store.json`` name it, and remove the one before."""
        rows, generation = int(kept.sum()), self._generation + 1
        index = self._new_index(pieces, kept, rows)
        columns = self.folder / f"columns-{generation}.parquet"
        vectors = self.folder / f"vectors-{generation}.faiss"
        ends = np.cumsum([n for *_, n in pieces])
        some = (table.filter(kept[end - n : end]) for (_, table, n), end in zip(pieces, ends, strict=True))
        write_atomically(columns, lambda file: write_columns(file, self._schema(), some))
        write_atomically(vectors, lambda file: write_index(index, file))
        files: dict[str, _File] = {
            path.name: {"bytes": path.stat().st_size, "check": _check(path)} for path in (columns, vectors)
        }
        old = [
            *self._files,
            *(f"{part['name']}{suffix}" for part in self._parts for suffix in (".npy", ".parquet")),
        ]
        self._rows, self._generation, self._files, self._parts = rows, generation, files, []
        self._save_head()
        self.close()
        for name in old:
            (self.folder / name).unlink(missing_ok=True)

    def _new_index(self, pieces: Sequence[Piece], kept: np.ndarray, rows: int) -> faiss.Index:
        cells = cells_for(rows) if rows >= (self.approximate_from or rows + 1) else None
        index = build_index([(vectors, n) for vectors, _, n in pieces], kept, self.dim, cells)
        # exact until its recall is measured
        self.index = None if cells is None else {"cells": cells, "effort": cells, "most": cells, "rows": 0}
        return index

    # -- reading ---------------------------------------------------------------------------------------------
    def _path(self, prefix: str) -> Path:
        name = next((name for name in self._files if name.startswith(prefix)), None)
        if name is None or Path(name).name != name:
            raise self._damaged(f"{HEAD} names no file of {prefix}")
        path = self.folder / name
        known = self._files[name]
        try:
            same = path.stat().st_size == known["bytes"] and _check(path) == known["check"]
        except OSError:
            raise self._damaged(f"{name} is missing") from None
        if not same:
            raise self._damaged(f"{name} is not the file that was written")
        return path

    def _faiss(self) -> faiss.Index:
        if self._open_index is None:
            path = self._path("vectors")
            self._open_index = read_index(path, self.dim, self._rows, bool(self.index), self._damaged)
        return self._open_index

    def _columns(self) -> ParquetColumns:
        if self._open_columns is None:
            path = self._path("columns")
            self._open_columns = ParquetColumns(path, self._rows, self.fields, self._damaged)
        return self._open_columns

    def __len__(self) -> int:
        self._join()
        return self._rows

    def _count(self, where: Sequence[Condition]) -> int:
        self._join()
        return int(self._columns().passing(where).sum())

    def _search(
        self, vectors: np.ndarray, k: int, where: Sequence[Condition], effort: int | None
    ) -> list[Matches]:
        self._join()
        nothing = [Matches(np.zeros(0, np.float32), [], []) for _ in vectors]
        if not self._rows:
            return nothing
        index, passing, most = self._faiss(), None, self._rows
        if where:
            passing = self._columns().passing(where)
            most = int(passing.sum())
        if not most:
            return nothing
        if self.index is not None and effort is None:
            return self._matches(*compare_all(index, vectors, min(k, most), passing))
        cells = None if self.index is None else effort
        return self._matches(*search_index(index, vectors, min(k, most), passing, cells))

    def _exact_is_faster(self, queries: int, effort: int, share: float) -> bool:
        assert self.index is not None
        looked_at = effort / int(self.index["cells"])
        return _ONE_BY_ONE * looked_at * queries > share * queries + _PASS

    def _matches(self, scores: np.ndarray, positions: np.ndarray) -> list[Matches]:
        """Scores and positions (−1: none) with the ids and columns that stand there."""
        real = positions >= 0
        needed = np.unique(positions[real])
        ids, rows = self._columns().rows_at(needed)
        at = np.searchsorted(needed, positions)
        return [
            Matches(
                each[mask], [ids[i] for i in where[mask].tolist()], [rows[i] for i in where[mask].tolist()]
            )
            for each, mask, where in zip(scores, real, at, strict=True)
        ]

    # -- the index -------------------------------------------------------------------------------------------
    def _build(self, rows: int) -> tuple[Json, int, int]:
        if self.index is None:  # it was filled below the limit that holds today
            with self._writing():
                pieces = [(self._reconstructing(), self._columns().table(), self._rows)]
                self._write(pieces, np.ones(self._rows, bool))
        assert self.index is not None
        cells = int(self.index["cells"])
        return {"cells": cells}, min(8, cells), cells

    def _forget_index(self) -> None:
        with self._writing():
            self._write(
                [(self._reconstructing(), self._columns().table(), self._rows)], np.ones(self._rows, bool)
            )

    def _sample(self, n: int) -> np.ndarray:
        self._join()
        index = self._reconstructing()
        at = np.random.default_rng(1).choice(self._rows, min(n, self._rows), replace=False)
        return np.stack([index.reconstruct(int(i)) for i in at])

    def close(self) -> None:
        self._open_index, self._open_columns = None, None


# -- helpers -------------------------------------------------------------------------------------------------
def _last_of_each(ids: np.ndarray) -> np.ndarray:
    """Which rows are the last of their id.

    >>> _last_of_each(np.array(["a", "b", "a"], dtype=object)).tolist()
    [False, True, True]
    """
    last = {identity: at for at, identity in enumerate(ids.tolist())}
    kept = np.zeros(len(ids), bool)
    kept[np.fromiter(last.values(), np.int64, len(last))] = True
    return kept


def _check(path: Path) -> str:
    """A hash of the first and the last MiB: enough to tell a different file, and a blink for a large one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, os.path.getsize(path) - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()[:32]
