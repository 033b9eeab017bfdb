"""A store in a folder ``NAME.faiss``: an index of FAISS, memory-mapped, and the columns beside it as Parquet."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from nearfar.data.files import Maybe, read_json
from nearfar.data.writing import make_folder, remove_left_over, write_atomically
from nearfar.errors import NearfarError
from nearfar.serving.stores.base import Matches, Row, VectorStore
from nearfar.serving.stores.filters import Condition, Kind

if TYPE_CHECKING:
    import faiss

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
_GROUP = 8192  # rows of a row group: what is read to show one row
_GROUPS_KEPT = 64 << 20  # bytes of row groups that are kept decoded
_BLOCK = 65_536  # rows that are copied at once
_PRODUCT = 16_384  # rows of one matrix product
#: comparing a row of a cell takes so many times as long as one in a matrix product, and reading all rows once as
#: long as so many queries (docs/search.md)
_ONE_BY_ONE, _PASS = 20, 50
_POINTS = 40  # rows for each cell, from which its centre is learned
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

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        super().__init__(str(folder), head["dim"], head["columns"], head["about"], head["index"])
        self.folder = folder
        self._rows: int = head["rows"]
        self._generation: int = head["generation"]
        self._files: dict[str, dict[str, Any]] = dict(head["files"])
        self._parts: list[dict[str, Any]] = list(head["parts"])
        self._open_index: faiss.Index | None = None
        self._open_columns: Any = None
        self._groups: dict[int, Any] = {}  # row groups that were read last, the latest at the end

    # -- the folder ------------------------------------------------------------------------------------------
    @classmethod
    def exists(cls, place: str) -> bool:
        return os.path.lexists(Path(place) / HEAD)

    @classmethod
    def create(cls, place: str, dim: int, kinds: Mapping[str, Kind], about: Mapping[str, Any]) -> FaissStore:
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
        head = {
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
        head = read_json(folder / HEAD, _SHAPE)
        assert isinstance(head, dict)
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
    def _upsert(self, ids: list[str], vectors: np.ndarray, columns: dict[str, list[Any]]) -> None:
        name = f"part-{self._generation:04d}-{len(self._parts):06d}"
        with self._writing():
            write_atomically(
                self.folder / f"{name}.npy", lambda file: np.save(file, vectors, allow_pickle=False)
            )
            table = self._table(ids, columns)
            write_atomically(self.folder / f"{name}.parquet", lambda file: _write_parquet(table, file))
            self._parts.append({"name": name, "rows": len(ids)})
            self._save_head()

    def _schema(self) -> Any:
        import pyarrow

        types = {"text": pyarrow.string(), "number": pyarrow.float64(), "boolean": pyarrow.bool_()}
        fields = [(field, types[self.kinds[name]]) for name, field in self.fields.items()]
        return pyarrow.schema([("id", pyarrow.string()), *fields])

    def _table(self, ids: list[str], columns: dict[str, list[Any]]) -> Any:
        import pyarrow

        arrays = {"id": ids} | {self.fields[name]: values for name, values in columns.items()}
        return pyarrow.table(arrays, schema=self._schema())

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

    def _pieces(self) -> list[tuple[Any, Any, int]]:
        """Vectors, columns and rows of what was finished and of every part; vectors are read when they are copied."""
        pieces: list[tuple[Any, Any, int]] = []
        if self._rows:
            index = self._reconstructing()
            pieces.append((index, self._read_columns(None), self._rows))
        for part in self._parts:
            vectors, table = self._part(part["name"])
            if vectors.shape != (part["rows"], self.dim) or table.num_rows != part["rows"]:
                raise self._damaged(f"{part['name']} does not have the rows that it should")
            pieces.append((vectors, table, part["rows"]))
        return pieces

    def _part(self, name: str) -> tuple[np.ndarray, Any]:
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

    def _write(self, pieces: Sequence[tuple[Any, Any, int]], kept: np.ndarray) -> None:
        """Write the next generation, let ``store.json`` name it, and remove the one before."""
        import faiss
        import pyarrow.parquet

        rows, generation = int(kept.sum()), self._generation + 1
        index = self._new_index(pieces, kept, rows)
        columns = self.folder / f"columns-{generation}.parquet"
        vectors = self.folder / f"vectors-{generation}.faiss"

        def write_columns(file: Any) -> None:
            with pyarrow.parquet.ParquetWriter(file, self._schema(), compression="zstd") as writer:
                waiting: Any = None
                start = 0
                for _, table, n in pieces:
                    some = table.filter(kept[start : start + n])
                    waiting = some if waiting is None else _concat(waiting, some)
                    start += n
                    whole = len(waiting) // _GROUP * _GROUP
                    if whole:
                        writer.write_table(waiting.slice(0, whole), row_group_size=_GROUP)
                        waiting = waiting.slice(whole)
                if waiting is not None and len(waiting):
                    writer.write_table(waiting)

        write_atomically(columns, write_columns)
        write_atomically(
            vectors, lambda file: faiss.write_index(index, cast(Any, faiss).PyCallbackIOWriter(file.write))
        )
        files = {
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

    def _new_index(self, pieces: Sequence[tuple[Any, Any, int]], kept: np.ndarray, rows: int) -> faiss.Index:
        import faiss

        self.index = None
        flat = faiss.IndexFlatIP(self.dim)
        index: faiss.Index = flat
        if rows >= (self.approximate_from or rows + 1):
            cells = max(1, min(int(4 * np.sqrt(rows)), rows // _POINTS))
            index = faiss.IndexIVFFlat(flat, self.dim, cells, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter, index.cp.seed, index.cp.max_points_per_centroid = 8, 1, _POINTS
            index.cp.min_points_per_centroid = 1
            wanted = np.sort(np.random.default_rng(0).choice(rows, min(rows, _POINTS * cells), replace=False))
            index.train(np.concatenate([*_blocks(pieces, kept, wanted)]))
            # exact until its recall is measured
            self.index = {"cells": cells, "effort": cells, "most": cells, "rows": 0}
        for block in _blocks(pieces, kept, None):
            index.add(block)
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
            import faiss

            path = self._path("vectors")
            # each flag maps one kind of index; the wrong one reads it into memory
            flag = (
                faiss.IO_FLAG_MMAP if self.index else getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
            )
            try:
                index = faiss.read_index(str(path), flag)
            except RuntimeError as error:
                raise self._damaged(
                    f"{path.name} cannot be read ({str(error).splitlines()[0][:120]})"
                ) from None
            if (
                index.d != self.dim
                or index.ntotal != self._rows
                or index.metric_type != faiss.METRIC_INNER_PRODUCT
            ):
                raise self._damaged(f"{path.name} does not hold the vectors that it should")
            self._open_index = index
        return self._open_index

    def _columns(self) -> Any:
        if self._open_columns is None:
            import pyarrow
            import pyarrow.parquet

            path = self._path("columns")
            try:
                file = pyarrow.parquet.ParquetFile(path, memory_map=True)
            except (OSError, ValueError, pyarrow.ArrowException) as error:
                raise self._damaged(f"{path.name} cannot be read ({str(error).splitlines()[0]})") from None
            if file.metadata.num_rows != self._rows or set(file.schema_arrow.names) != {
                "id",
                *self.fields.values(),
            }:
                raise self._damaged(f"{path.name} does not hold the columns that it should")
            self._open_columns = file
        return self._open_columns

    def _read_columns(self, names: Sequence[str] | None) -> Any:
        import pyarrow

        try:
            return self._columns().read(columns=None if names is None else list(names))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise self._damaged(f"columns cannot be read ({str(error).splitlines()[0]})") from None

    def _passing(self, where: Sequence[Condition]) -> np.ndarray:
        """Which rows pass the conditions."""
        import pyarrow
        import pyarrow.compute as compute

        order = {
            "<": compute.less,
            "<=": compute.less_equal,
            ">": compute.greater,
            ">=": compute.greater_equal,
        }
        table = self._read_columns(list({self.fields[each.column] for each in where}))
        passing = np.ones(self._rows, bool)
        for each in where:
            column = table.column(self.fields[each.column])
            if each.operator in ("in", "not in"):
                mask = compute.is_in(column, value_set=pyarrow.array(each.values, type=column.type))
                if each.operator == "not in":
                    mask = compute.and_(compute.invert(mask), compute.is_valid(column))
            else:
                mask = compute.fill_null(order[each.operator](column, each.values[0]), False)
            passing &= np.asarray(mask)
        return passing

    def __len__(self) -> int:
        self._join()
        return self._rows

    def _count(self, where: Sequence[Condition]) -> int:
        self._join()
        return int(self._passing(where).sum())

    def _search(
        self, vectors: np.ndarray, k: int, where: Sequence[Condition], effort: int | None
    ) -> list[Matches]:
        faiss: Any = importlib.import_module("faiss")  # whose types are those of C++
        self._join()
        if not self._rows:
            return [Matches(np.zeros(0, np.float32), [], []) for _ in vectors]
        index, selector, most = self._faiss(), None, self._rows
        if where:
            passing = self._passing(where)
            most = int(passing.sum())
            selector = faiss.IDSelectorBitmap(np.packbits(passing, bitorder="little"))
        if not most:
            return [Matches(np.zeros(0, np.float32), [], []) for _ in vectors]
        if self.index is not None and effort is None:
            return self._matches(*self._compare_all(vectors, min(k, most), passing if where else None))
        options: dict[str, Any] = {} if selector is None else {"sel": selector}
        parameters = faiss.SearchParameters(**options)
        if self.index is not None:
            parameters = faiss.SearchParametersIVF(nprobe=effort, **options)
        scores, positions = index.search(vectors, min(k, most), params=parameters)
        return self._matches(scores, positions)

    def _exact_is_faster(self, queries: int, effort: int, share: float) -> bool:
        assert self.index is not None
        looked_at = effort / int(self.index["cells"])
        return _ONE_BY_ONE * looked_at * queries > share * queries + _PASS

    def _compare_all(
        self, vectors: np.ndarray, k: int, passing: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions of the nearest rows in all cells: a matrix product for each block of cells."""
        faiss: Any = importlib.import_module("faiss")
        index: Any = self._faiss()
        lists, best = index.invlists, faiss.ResultHeap(len(vectors), k, keep_max=True)
        ids: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        waiting = 0
        for cell in range(lists.nlist):
            size = int(lists.list_size(cell))
            if size:
                own = faiss.rev_swig_ptr(lists.get_ids(cell), size)
                codes = faiss.rev_swig_ptr(lists.get_codes(cell), size * self.dim * 4)
                some = codes.view(np.float32).reshape(size, self.dim)
                if passing is not None:
                    own, some = own[passing[own]], some[passing[own]]
                ids.append(own)
                rows.append(some)
                waiting += len(own)
            if waiting and (waiting >= _PRODUCT or cell == lists.nlist - 1):
                positions = np.concatenate(ids)
                scores, at = faiss.knn(
                    vectors, np.concatenate(rows), min(k, waiting), metric=faiss.METRIC_INNER_PRODUCT
                )
                best.add_result(scores, positions[at])
                ids, rows, waiting = [], [], 0
        best.finalize()
        return best.D, best.I

    def _matches(self, scores: np.ndarray, positions: np.ndarray) -> list[Matches]:
        """Scores and positions (−1: none) with the ids and columns that stand there."""
        real = positions >= 0
        needed = np.unique(positions[real])
        ids, rows = self._rows_at(needed)
        at = np.searchsorted(needed, positions)
        return [
            Matches(
                each[mask], [ids[i] for i in where[mask].tolist()], [rows[i] for i in where[mask].tolist()]
            )
            for each, mask, where in zip(scores, real, at, strict=True)
        ]

    def _group(self, number: int) -> Any:
        """A row group with all its columns; the last ones are kept, so that many small searches decode them once."""
        group = self._groups.pop(number, None)
        if group is None:
            group = self._columns().read_row_group(number)
        self._groups[number] = group
        oldest = list(self._groups)
        while len(oldest) > 1 and sum(each.nbytes for each in list(self._groups.values())) > _GROUPS_KEPT:
            self._groups.pop(oldest.pop(0), None)
        return group

    def _rows_at(self, positions: np.ndarray) -> tuple[list[str], list[Row]]:
        """Ids and columns of ascending positions; row groups without any are not read."""
        import pyarrow

        file = self._columns()
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        begins = np.concatenate([[0], np.cumsum(sizes)])
        groups = np.searchsorted(begins, positions, side="right") - 1
        parts = []
        try:
            for group in np.unique(groups).tolist():
                inside = positions[groups == group] - begins[group]
                parts.append(self._group(group).take(pyarrow.array(inside)))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise self._damaged(f"columns cannot be read ({str(error).splitlines()[0]})") from None
        if not parts:
            return [], []
        table = pyarrow.concat_tables(parts)
        columns = {name: table.column(field).to_pylist() for name, field in self.fields.items()}
        ids = table.column("id").to_pylist()
        return ids, [{name: values[i] for name, values in columns.items()} for i in range(len(ids))]

    # -- the index -------------------------------------------------------------------------------------------
    def _build(self, rows: int) -> tuple[dict[str, Any], int, int]:
        if self.index is None:  # it was filled below the limit that holds today
            with self._writing():
                pieces = [(self._reconstructing(), self._read_columns(None), self._rows)]
                self._write(pieces, np.ones(self._rows, bool))
        assert self.index is not None
        cells = int(self.index["cells"])
        return {"cells": cells}, min(8, cells), cells

    def _forget_index(self) -> None:
        with self._writing():
            self._write(
                [(self._reconstructing(), self._read_columns(None), self._rows)], np.ones(self._rows, bool)
            )

    def _sample(self, n: int) -> np.ndarray:
        self._join()
        index = self._reconstructing()
        at = np.random.default_rng(1).choice(self._rows, min(n, self._rows), replace=False)
        return np.stack([index.reconstruct(int(i)) for i in at])

    def close(self) -> None:
        self._open_index, self._open_columns, self._groups = None, None, {}


# -- helpers -------------------------------------------------------------------------------------------------
def _write_parquet(table: Any, file: Any) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, file, compression="zstd")


def _concat(first: Any, second: Any) -> Any:
    import pyarrow

    return pyarrow.concat_tables([first, second]).combine_chunks()


def _last_of_each(ids: np.ndarray) -> np.ndarray:
    """Which rows are the last of their id.

    >>> _last_of_each(np.array(["a", "b", "a"], dtype=object)).tolist()
    [False, True, True]
    """
    last = {identity: at for at, identity in enumerate(ids.tolist())}
    kept = np.zeros(len(ids), bool)
    kept[np.fromiter(last.values(), np.int64, len(last))] = True
    return kept


def _blocks(
    pieces: Sequence[tuple[Any, Any, int]], kept: np.ndarray, wanted: np.ndarray | None
) -> Iterator[np.ndarray]:
    """The vectors of the rows that are kept, in order, by blocks; of ``wanted`` positions among these alone."""
    chosen = np.flatnonzero(kept)
    if wanted is not None:
        chosen = chosen[wanted]
    start = 0
    for vectors, _, n in pieces:
        inside = chosen[(chosen >= start) & (chosen < start + n)] - start
        for begin in range(0, n, _BLOCK):
            some = inside[(inside >= begin) & (inside < begin + _BLOCK)] - begin
            if len(some):
                size = min(_BLOCK, n - begin)
                block = (
                    vectors[begin : begin + size]
                    if isinstance(vectors, np.ndarray)
                    else vectors.reconstruct_n(begin, size)
                )
                yield np.ascontiguousarray(np.asarray(block)[some], dtype=np.float32)
        start += n


def _check(path: Path) -> str:
    """A hash of the first and the last MiB: enough to tell a different file, and a blink for a large one."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, os.path.getsize(path) - _EDGE))
        digest.update(file.read(_EDGE))
    return digest.hexdigest()[:32]
