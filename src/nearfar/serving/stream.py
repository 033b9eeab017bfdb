"""Vectors and predictions of a table of any size: written in parts, so that a killed command goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.chunks import NewData
from nearfar.data.files import Json, read_json, write_atomically
from nearfar.data.items import Column, Items
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError
from nearfar.training.system import rows_of

if TYPE_CHECKING:
    import pyarrow

    from nearfar.serving.ray_pool import RayPool
    from nearfar.serving.trained import Trained

__all__ = [
    "TABLE_ENDINGS",
    "Written",
    "embed_file",
    "predict_file",
    "require_writable",
    "state_of",
    "write_rows",
]

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
_VECTOR_ENDINGS = (".parquet", ".npz")
_PART = "part-{:06d}"

Advance = Callable[[int], None]


@dataclass
class Written:
    """What was written: rows, of how many parts earlier processes had made, and what could not be read."""

    path: Path
    rows: int = 0
    resumed: int = 0
    columns: list[str] = field(default_factory=list)
    rejections: Rejections = field(default_factory=Rejections)


def embed_file(
    trained: Trained,
    source: NewData,
    output: Path,
    *,
    towers: Sequence[str] | None = None,
    batch_size: int | None = None,
    advance: Advance = lambda _: None,
    pool: RayPool | None = None,
) -> Written:
    """Embed a file or folder: ``id``, ``row`` and, for each view that is there, a vector or null.

    Args:
        trained: the run.
        source: what to embed; it is read in chunks.
        output: ``.parquet`` (a list of float32 for each view), or ``.npz`` (``ids``, ``rows``, an array for each view;
            of a view that some items lack, rows of NaN).
        towers: the views to embed; None: all that the data has.
        batch_size: rows that are computed at once.
        advance: is told the rows of every chunk that is done.
        pool: encoders in other processes, which are given the chunks; None: everything is computed here.

    A killed command that is given again keeps the parts that it had finished, where run, data and options are the same.

    Raises:
        NearfarError: an ending that is not known, nothing that can be embedded, data that cannot be read.
    """
    require_writable(output, "vectors.parquet")
    if output.suffix.lower() not in _VECTOR_ENDINGS:
        raise NearfarError(f"{output}: vectors are written as {' or '.join(_VECTOR_ENDINGS)}.")
    for view in towers or ():
        trained.view_of((), view)
    if not trained.views:
        trained.view_of(())

    work = _Vectors(tuple(towers or ()), batch_size, source.path)
    what = {"embed": sorted(towers or ()), "batch_size": batch_size}
    parts = _Parts(trained, source, output, what)
    chunks = trained.new_items(source)
    if pool is not None:
        return parts.fill(chunks, lambda rest: pool.map(work, rest), advance)
    return parts.fill(chunks, lambda rest: _in_turn(lambda items: work(trained, items), rest), advance)


@dataclass(frozen=True)
class _Vectors:
    """The table of a chunk: its ids, its rows, and the vectors of the ``towers``, or of all views that it has."""

    towers: tuple[str, ...]
    batch_size: int | None
    path: Path

    def __call__(self, trained: Trained, items: Items) -> pyarrow.Table:
        import pyarrow

        columns: dict[str, Column] = _identity(items)
        if not self.towers and "refused" in items.notes:
            raise NearfarError(f"{items.notes['refused']} Or say what is to be embedded, as --tower NAME.")
        for view in self.towers or [view for view in trained.views if view in items]:
            if view not in items:
                if view in items.notes.get("lacking", {}):
                    raise NearfarError(items.notes["lacking"][view])
                raise NearfarError(
                    f"{self.path} has no column of '{view}': name it with --column {view}=HEADER, or leave --tower "
                    f"{view} out."
                )
            present = items.present(view)
            at = np.flatnonzero(present)
            values = items[view]
            some = values[at] if isinstance(values, np.ndarray) else [values[i] for i in at.tolist()]
            vectors = (
                trained.vectors(some, view, batch_size=self.batch_size)
                if len(at)
                else np.zeros((0, trained.dim))
            )
            columns[view] = _lists(vectors.astype(np.float32), present, trained.dim)
        return pyarrow.table(columns)


def _in_turn(
    table: Callable[[Items], pyarrow.Table], chunks: Iterable[Items]
) -> Iterator[tuple[Items, pyarrow.Table | None]]:
    """Each chunk with its table, computed here, one after the other."""
    for items in chunks:
        yield items, table(items) if len(items) else None


def predict_file(
    trained: Trained,
    source: NewData,
    output: Path,
    *,
    gallery: NewData | None = None,
    k: int | None = None,
    advance: Advance = lambda _: None,
) -> Written:
    """Predict a file or folder: ``id``, ``row`` and the columns of the system's predictions.

    ``output`` is a table (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``) or what the system writes besides, such as COCO
    results; ``gallery`` and ``k`` as of `Trained.predict`. Other arguments, resuming and errors as of `embed_file`;
    what items are compared with is embedded anew.
    """
    require_writable(output, "predictions.csv")
    writer = trained.system.prediction_writer(output, source)
    if writer is None and output.suffix.lower() not in TABLE_ENDINGS:
        raise NearfarError(f"{output}: predictions are written as {', '.join(TABLE_ENDINGS)}.")
    chunks, predict = trained.prediction(source, gallery, k)
    if writer is not None:
        written = Written(output)
        for items in chunks:
            written.rejections.extend(items.rejections)
            if len(items):
                outputs = trained.outputs(items)
                columns = trained.system.predictions(outputs, items)
                writer.write(items, columns, outputs)
                rows, named = rows_of(columns, items)
                written.columns, written.rows = list(named), written.rows + len(rows)
            advance(len(items))
        if not written.columns:
            raise NearfarError(f"no row can be used; {written.rejections.summary()}.")
        writer.close()
        return written

    def table(items: Items) -> pyarrow.Table:
        import pyarrow

        rows, columns = rows_of(predict(items), items)
        return pyarrow.table(_identity(rows) | {name: _arrow(values) for name, values in columns.items()})

    what: Json = {"predict": True, "k": k}
    if gallery is not None:
        what["gallery"] = [state_of(Path(gallery.path)), dict(gallery.columns), gallery.id_column]
    parts = _Parts(trained, source, output, what)
    return parts.fill(chunks, lambda rest: _in_turn(table, rest), advance)


def require_writable(path: Path, example: str) -> None:
    """Raise before the work where no file can be written to ``path``."""
    if path.is_dir():
        raise NearfarError(f"{path} is a folder; name the file to write, such as {path / example}.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise NearfarError(f"{path} cannot be written: {above} is a file and not a folder.")


def _identity(items: Items) -> dict[str, Column]:
    import pyarrow

    rows = items.rows or list(range(1, len(items) + 1))
    return {"id": pyarrow.array(items.ids, pyarrow.string()), "row": pyarrow.array(rows, pyarrow.int64())}


def _arrow(values: Column) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(values if isinstance(values, np.ndarray) and values.ndim == 1 else list(values))


def _lists(vectors: np.ndarray, present: np.ndarray, dim: int) -> pyarrow.Array:
    """Vectors as lists of one length, null where a view is not present."""
    import pyarrow

    whole = np.zeros((len(present), dim), np.float32)
    whole[present] = vectors
    mask = None if present.all() else pyarrow.array(~present)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(whole.reshape(-1)), dim, mask=mask)


class _Parts:
    """The parts of an output, each a Parquet file with its rejections beside it, in a folder next to the output."""

    def __init__(self, trained: Trained, source: NewData, output: Path, what: Json) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".parts")
        # What a part holds depends on all of these; the data is known by its size and time, since it may be large.
        known = {
            "weights": trained.weights_key,
            "data": state_of(Path(source.path)),
            "columns": dict(source.columns),
            "id_column": source.id_column,
            "encoding": source.encoding,
            "images": str(source.images),
            "options": dict(source.options),
            "rows": source.rows,
            "output": output.suffix.lower(),
            **what,
        }
        self.key = content_key(known)

    def fill(
        self,
        chunks: Iterable[Items],
        tables: Callable[[Iterator[Items]], Iterator[tuple[Items, pyarrow.Table | None]]],
        advance: Advance,
    ) -> Written:
        """Write the tables of all chunks but those that an earlier process wrote; ``tables`` gives them in order."""
        written = Written(self.output, resumed=self._open())
        rest, count = iter(chunks), 0
        for items in islice(rest, written.resumed):
            count += 1
            advance(len(items))
        for items, table in tables(rest):
            self._write(count, items, table)
            count += 1
            advance(len(items))
        files = []
        for number in range(count):
            about = read_json(self._path(number, ".json"), {"rows": int, "rejections": dict})
            written.rejections.extend(Rejections.from_dict(about["rejections"]))
            written.rows += about["rows"]
            if about["rows"]:
                files.append(self._path(number, ".parquet"))
        if not files:
            shutil.rmtree(self.folder)
            raise NearfarError(f"no row can be used; {written.rejections.summary()}.")
        written.columns = _join(files, self.output)
        shutil.rmtree(self.folder)
        return written

    def _path(self, number: int, ending: str) -> Path:
        return self.folder / (_PART.format(number) + ending)

    def _open(self) -> int:
        """The number of parts that an earlier process finished; those of different data or options are removed."""
        about = self.folder / "about.json"
        if self.folder.exists():
            if not about.is_file():
                raise NearfarError(f"{self.folder} is in the way of this output: move it elsewhere.")
            if read_json(about, {"key": str})["key"] != self.key:
                shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(about, lambda file: file.write(json.dumps({"key": self.key}).encode()))
        done = 0
        while self._is_whole(done):
            done += 1
        return done

    def _is_whole(self, number: int) -> bool:
        """Whether a part was finished: its rejections are written after its rows. One that was damaged is made anew."""
        import pyarrow.parquet

        about, rows = self._path(number, ".json"), self._path(number, ".parquet")
        try:
            count = read_json(about, {"rows": int, "rejections": dict})["rows"] if about.is_file() else None
            return count == 0 or (count is not None and pyarrow.parquet.read_metadata(rows).num_rows == count)
        except (NearfarError, OSError, pyarrow.ArrowException):
            return False

    def _write(self, number: int, items: Items, table: pyarrow.Table | None) -> None:
        import pyarrow.parquet

        if table is not None:
            path = self._path(number, ".parquet")
            beside = path.with_suffix(".writing")
            pyarrow.parquet.write_table(table, beside)
            os.replace(beside, path)
        about = {"rows": 0 if table is None else table.num_rows, "rejections": items.rejections.as_dict()}
        write_atomically(self._path(number, ".json"), lambda file: file.write(json.dumps(about).encode()))


def state_of(path: Path) -> list[object]:
    """By what changed data is told: names, sizes and times."""
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return [[str(each), each.stat().st_size, each.stat().st_mtime_ns] for each in files[:100_000]]
    if path.exists():
        return [str(path), path.stat().st_size, path.stat().st_mtime_ns]
    return [str(path)]


# -- joining -------------------------------------------------------------------------------------------------
def _join(files: Sequence[Path], output: Path) -> list[str]:
    """All parts as one file, a part in memory at a time; returns its columns."""
    import pyarrow
    import pyarrow.parquet

    # A column that is empty in one part has no type there; what the others say holds.
    schemas = [pyarrow.parquet.read_schema(file) for file in files]
    schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
    output.parent.mkdir(parents=True, exist_ok=True)
    ending = output.suffix.lower()

    def tables() -> Iterator[pyarrow.Table]:
        for file in files:
            table = pyarrow.parquet.read_table(file)
            for name in set(schema.names) - set(table.column_names):
                table = table.append_column(name, pyarrow.nulls(table.num_rows))
            yield table.select(schema.names).cast(schema)

    def write(file: IO[bytes]) -> None:
        if ending == ".parquet":
            with pyarrow.parquet.ParquetWriter(file, schema) as writer:
                for table in tables():
                    writer.write_table(table)
        elif ending == ".npz":
            _write_npz(file, schema, tables)
        else:
            _write_lines(file, schema.names, tables(), ending)

    write_atomically(output, write)
    return list(schema.names)


def write_rows(rows: Sequence[Mapping[str, object]], output: Path) -> None:
    """Write rows with the same columns as a table (``TABLE_ENDINGS``), atomically."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows))
    ending = output.suffix.lower()

    def write(file: IO[bytes]) -> None:
        if ending == ".parquet":
            pyarrow.parquet.write_table(table, file)
        else:
            _write_lines(file, table.schema.names, [table], ending)

    write_atomically(output, write)


def _write_lines(file: IO[bytes], names: Sequence[str], tables: Iterable[pyarrow.Table], ending: str) -> None:
    import csv
    import io

    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    rows = csv.writer(text, delimiter="\t" if ending == ".tsv" else ",", lineterminator="\n")
    if ending != ".jsonl":
        rows.writerow(names)
    for table in tables:
        for record in table.to_pylist():
            if ending == ".jsonl":
                text.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                rows.writerow([_cell(record[name]) for name in names])
    text.flush()
    text.detach()


def _cell(value: object) -> str:
    """A value in a table of text: lists as JSON, numbers with the digits that tell them apart."""
    if value is None:
        return ""
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:.7g}"
    return str(value)


def _write_npz(
    file: IO[bytes], schema: pyarrow.Schema, tables: Callable[[], Iterator[pyarrow.Table]]
) -> None:
    """The columns as arrays of an archive, each written part by part."""
    n, longest = 0, 1
    for table in tables():
        n += table.num_rows
        longest = max(longest, max(map(len, table["id"].to_pylist()), default=1))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in schema.names:
            kind = schema.field(name).type
            shape: tuple[int, ...]
            if name == "id":
                dtype, shape, title = np.dtype(f"<U{longest}"), (n,), "ids"
            elif name == "row":
                dtype, shape, title = np.dtype("<i8"), (n,), "rows"
            else:
                dtype, shape, title = np.dtype("<f4"), (n, kind.list_size), name
            with archive.open(f"{title}.npy", "w", force_zip64=True) as member:
                about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(member, about)
                for table in tables():
                    member.write(_array(table[name], dtype, shape).tobytes())


def _array(column: pyarrow.ChunkedArray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.asarray(column.to_pylist(), dtype=dtype)
    rows = np.full((len(column), shape[1]), np.nan, dtype)
    whole = column.combine_chunks()
    present = np.asarray(whole.is_valid())
    rows[present] = np.asarray(whole.drop_null().flatten()).reshape(-1, shape[1])
    return rows
