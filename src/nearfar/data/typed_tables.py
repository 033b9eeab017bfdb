"""Tables whose columns have types, as items: Parquet, whatever else comes as Arrow, and arrays of NumPy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.data.cache import kept_file
from nearfar.data.column_kinds import Reasons, stack_vectors, without_placeholders
from nearfar.data.files import Json, parse_json, read_arrays
from nearfar.data.items import Column, Items
from nearfar.data.table_formats import cell_text, parquet_header
from nearfar.data.table_items import Wanted, build_items, choose
from nearfar.data.tables import require_file
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["ARRAY_SUFFIXES", "array_items", "arrow_items", "parquet_chunks", "parquet_items"]

ARRAY_SUFFIXES = (".npy", ".npz")

_BATCH = 1024  # rows that are in memory at once where a column holds pictures


# -- Parquet -------------------------------------------------------------------------------------------------
def parquet_items(
    path: Path,
    wanted: Wanted,
) -> Items:
    """The items of a Parquet file; arguments and errors as of `nearfar.data.sources.read_items`.

    Numbers become an array (n,), lists of numbers an array (n, d); pictures that are in the file go into the cache.
    """
    import pyarrow
    import pyarrow.parquet

    require_file(path)
    header = parquet_header(path)
    used, _ = choose(path, header, wanted, "Its columns are")
    read = [header[position] for position in dict.fromkeys(used.values())]
    try:
        file = pyarrow.parquet.ParquetFile(path)
        features = _features_of(file.schema_arrow.metadata)
        batches = (pyarrow.Table.from_batches([batch]) for batch in file.iter_batches(_BATCH, columns=read))
        return arrow_items(str(path), path.parent, header, batches, features, wanted)
    except NearfarError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise NearfarError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def parquet_chunks(
    path: Path, columns: Sequence[str], rows: int, folder: Path | None = None
) -> Iterator[Items]:
    """The items of a Parquet file, ``rows`` at a time, with the columns that ``columns`` names as it writes them."""
    import pyarrow
    import pyarrow.parquet

    before = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        features = _features_of(file.schema_arrow.metadata)
        for batch in file.iter_batches(rows, columns=list(columns)):
            if not batch.num_rows:
                continue
            table, wanted = pyarrow.Table.from_batches([batch]), Wanted(list(columns))
            yield arrow_items(
                str(path),
                folder or path.parent,
                list(columns),
                [table],
                features,
                wanted,
                asked=False,
                before=before,
            )
            before += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise NearfarError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    if not before:
        raise NearfarError(f"{path} has no rows.")


def _features_of(metadata: Mapping[bytes, bytes] | None) -> Json:
    """What the library ``datasets`` wrote about its columns into the head of a file; nothing where it did not."""
    try:
        about = parse_json((metadata or {})[b"huggingface"])
        features = about["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


# -- Arrow columns -------------------------------------------------------------------------------------------
def arrow_items(
    source: str,
    folder: Path | None,
    header: Sequence[str],
    batches: Iterable[pyarrow.Table],
    features: Json,
    wanted: Wanted,
    *,
    asked: bool | None = None,
    before: int = 0,
) -> Items:
    """The items of Arrow tables that follow each other.

    Args:
        source: what they were read from, for messages.
        folder: where paths of pictures begin; None: there are none.
        header: the columns of all tables.
        batches: the tables; their pictures are written into the cache one table after the other.
        features: what the library ``datasets`` says of columns: names of classes.
        wanted: the columns to take.
        asked: whether pictures none of which is there are an error; None: where columns are named.
        before: rows of the source that come before these.
    """
    asked = wanted.columns is not None if asked is None else asked
    used, id_name = choose(Path(source), header, wanted, "Its columns are")
    at = {name: header[position] for name, position in used.items()}
    needed = list(dict.fromkeys(at.values()))
    pieces: dict[str, list[pyarrow.ChunkedArray]] = {name: [] for name in needed}
    pictures: dict[str, list[str | None]] = {}
    strange: dict[str, int] = {}
    n = 0
    for table in batches:
        n += table.num_rows
        for name in needed:
            column = table.column(name)
            if name not in strange and _holds_bytes(column.type):
                if name not in pictures and (bad := _no_pictures(column)):
                    if wanted.columns is not None:
                        raise NearfarError(
                            f"{source}: the column '{name}' holds bytes that are no picture ({bad!r} …)."
                        )
                    strange[name] = table.num_rows
                    continue
                pictures.setdefault(name, []).extend(_kept(column, folder))
            elif name not in strange:
                pieces[name].append(column)
    if not n:
        raise NearfarError(f"{source} has no rows.")
    rows = list(range(before + 1, before + n + 1))
    values: dict[str, Column] = {}
    reasons: dict[str, Reasons] = {}
    notes: Json = {}
    if strange:
        notes["columns of bytes that are no pictures, left out"] = list(strange)
        at = {name: head for name, head in at.items() if head not in strange}
    for name, head in at.items():
        if head in pictures:
            values[name] = pictures[head]
            continue
        column, reason = _column(pieces[head], features.get(head))
        values[name] = without_placeholders(name, column, notes) if isinstance(column, list) else column
        if reason is not None:
            reasons[name] = reason
    return build_items(
        source,
        values,
        rows,
        kept=list(at) if wanted.columns is None else list(wanted.columns),
        id_name=id_name,
        group_name=wanted.group_column,
        asked=asked,
        folder=folder,
        notes=notes,
        id_given=wanted.id_column is not None,
        reasons={name: reason for name, reason in reasons.items() if name in values},
    )


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether a column holds whole files: pictures as ``datasets`` keeps them, or bytes alone."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"\0\0\0", b"P5", b"P6")


def _no_pictures(column: pyarrow.ChunkedArray) -> bytes:
    """The first bytes of the first file of a column that begins like no picture; nothing where it does."""
    first = next((value for value in column.to_pylist() if value is not None), None)
    data = first.get("bytes") if isinstance(first, dict) else first
    return b"" if not data or data.startswith(_MAGIC) else bytes(data[:8])


def _kept(column: pyarrow.ChunkedArray, folder: Path | None) -> list[str | None]:
    paths: list[str | None] = []
    for value in column.to_pylist():
        data = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if data:
            paths.append(kept_file("pictures", data))
        else:
            paths.append(os.path.join(folder, path) if path and folder is not None else path)
    return paths


def _column(pieces: Sequence[pyarrow.ChunkedArray], feature: object) -> tuple[Column, Reasons | None]:
    """Numbers as an array, lists of numbers as an array of rows, everything else as texts."""
    import pyarrow

    types = pyarrow.types
    whole = pyarrow.chunked_array([chunk for piece in pieces for chunk in piece.chunks])
    if isinstance(whole.type, pyarrow.BaseExtensionType):
        whole = pyarrow.chunked_array([chunk.storage for chunk in whole.chunks])
    if types.is_dictionary(whole.type):
        whole = whole.cast(whole.type.value_type)
    kind = whole.type
    names = (
        feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    )
    if names and types.is_integer(kind):
        return [_class_name(value, names) for value in whole.to_pylist()], None
    if types.is_decimal(kind) or types.is_float16(kind):
        whole = whole.cast(pyarrow.float64() if types.is_decimal(kind) else pyarrow.float32())
        kind = whole.type
    if types.is_floating(kind) or types.is_integer(kind) or types.is_boolean(kind):
        if whole.null_count and not types.is_floating(kind):
            return whole.to_pylist(), None
        return np.array(whole.to_numpy()), None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _lists(whole)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return whole.to_pylist(), None
    return [cell_text(value) or None for value in whole.to_pylist()], None


def _class_name(value: int | None, names: Sequence[str]) -> str | None:
    """The name of a class; −1 is how ``datasets`` writes that there is none."""
    if value is None or value < 0:
        return None
    return str(names[value]) if value < len(names) else str(value)


def _lists(whole: pyarrow.ChunkedArray) -> tuple[Column, Reasons | None]:
    import pyarrow

    inner = whole.type.value_type
    while hasattr(inner, "value_type"):
        inner = inner.value_type
    if pyarrow.types.is_integer(inner) or pyarrow.types.is_floating(inner) or pyarrow.types.is_boolean(inner):
        if (matrix := _matrix(whole)) is not None:
            return matrix, None
        return stack_vectors([_vector(value) for value in whole])
    texts: list[str | None] = []
    for value in whole.to_pylist():
        if value and all(isinstance(word, str) for word in value):
            texts.append("; ".join(value))
        else:
            texts.append(cell_text(value) if value else None)
    return texts, None


def _matrix(whole: pyarrow.ChunkedArray) -> np.ndarray | None:
    """Lists of one length without a gap as rows of an array, at once; None for others."""
    import pyarrow
    import pyarrow.compute

    if whole.null_count or hasattr(whole.type.value_type, "value_type") or not len(whole):
        return None
    lengths = pyarrow.compute.min_max(pyarrow.compute.list_value_length(whole)).as_py()
    if lengths["min"] != lengths["max"] or not lengths["min"]:
        return None
    values = pyarrow.chunked_array([chunk.flatten() for chunk in whole.chunks])
    return None if values.null_count else np.array(values.to_numpy()).reshape(len(whole), -1)


def _vector(value: pyarrow.ListScalar) -> np.ndarray | None:
    """One list of numbers; None inside is NaN, lists of lists of different lengths are no array."""
    if not value.is_valid:
        return None
    inner = value.values
    if not hasattr(inner.type, "value_type") and not inner.null_count:
        return np.asarray(inner.to_numpy(zero_copy_only=False))
    try:
        return np.asarray(value.as_py(), dtype=np.float32)
    except (TypeError, ValueError):
        return np.zeros(0, np.float32)


# -- arrays --------------------------------------------------------------------------------------------------
def array_items(
    path: Path,
    wanted: Wanted,
) -> Items:
    """The rows of the arrays of an ``.npz`` file, which are the columns; of an ``.npy`` file as the column ``vector``.

    Raises:
        NearfarError: arrays of different lengths or of objects, no such array, a damaged file.
    """
    arrays = read_arrays(path) if path.suffix.lower() == ".npz" else {"vector": _load(path)}
    used, id_name = choose(path, list(arrays), wanted, "Its arrays are")
    header = list(arrays)
    values = {name: arrays[header[position]] for name, position in used.items()}
    for name, array in values.items():
        if array.ndim == 0:
            raise NearfarError(
                f"{path}: the array '{name}' is a single number, and a row for each item is needed."
            )
    lengths = {name: len(array) for name, array in values.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {n}" for name, n in lengths.items())
        raise NearfarError(
            f"{path}: its arrays have different numbers of rows ({shown}): name those that belong together."
        )
    n = next(iter(lengths.values()), 0)
    if not n:
        raise NearfarError(f"{path} has no rows.")
    kept = list(wanted.columns) if wanted.columns is not None else [n for n in values if n != id_name]
    plain = {name: array.tolist() if array.dtype.kind in "US" else array for name, array in values.items()}
    return build_items(
        str(path),
        {name: [_text(value) for value in v] if isinstance(v, list) else v for name, v in plain.items()},
        list(range(1, n + 1)),
        kept=kept,
        id_name=id_name,
        group_name=wanted.group_column,
        asked=wanted.columns is not None,
        folder=path.parent,
        id_given=wanted.id_column is not None,
    )


def _text(value: str | bytes) -> str | None:
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else value) or None


def _load(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises whatever the text in a file's head leads to
        raise NearfarError(f"{path} cannot be read as an array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise NearfarError(f"{path} holds several arrays: call it {path.stem}.npz.")
    return array
