"""Columns of Arrow as items: Parquet files, and Hugging Face ``datasets`` saved to disk or fetched by name."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.data.cache import cache_dir
from nearfar.data.files import Json, Maybe, parse_json, read_json
from nearfar.data.items import Column, Items
from nearfar.data.table_formats import cell_text, parquet_header
from nearfar.data.table_items import Reasons, build_items, choose, stack_vectors, without_placeholders
from nearfar.data.tables import require_file
from nearfar.errors import NearfarError

__all__ = [
    "dataset_items",
    "dataset_splits",
    "hub_items",
    "hub_name",
    "hub_splits",
    "keep_picture",
    "parquet_items",
]

_BATCH = 1024  # rows that are in memory at once where a column holds pictures
_INFO = {"features": Maybe({str: object})}
_STATE = {"_data_files": [{"filename": str}]}


@dataclass
class _Wanted:
    """Which columns are read, and how messages name them."""

    columns: Sequence[str] | None
    id_column: str | None
    group_column: str | None
    naming: str


# -- Parquet -------------------------------------------------------------------------------------------------
def parquet_items(
    path: Path,
    columns: Sequence[str] | None = None,
    id_column: str | None = None,
    group_column: str | None = None,
    naming: str = "columns=[NAME]",
) -> Items:
    """The items of a Parquet file; arguments and errors as of `nearfar.data.sources.read_items`.

    Numbers become an array (n,), lists of numbers an array (n, d); pictures that are in the file go into the cache.
    """
    import pyarrow
    import pyarrow.parquet

    require_file(path)
    wanted = _Wanted(columns, id_column, group_column, naming)
    header = parquet_header(path)
    used, _ = choose(path, header, columns, id_column, group_column, naming, "Its columns are")
    read = [header[position] for position in dict.fromkeys(used.values())]
    try:
        file = pyarrow.parquet.ParquetFile(path)
        features = _features_of(file.schema_arrow.metadata)
        batches = (pyarrow.Table.from_batches([batch]) for batch in file.iter_batches(_BATCH, columns=read))
        return _items(str(path), path.parent, header, batches, features, wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise NearfarError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _features_of(metadata: Mapping[bytes, bytes] | None) -> Json:
    """What the library ``datasets`` wrote about its columns into the head of a file; nothing where it did not."""
    try:
        about = parse_json((metadata or {})[b"huggingface"])
        features = about["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


# -- folders of the library datasets -------------------------------------------------------------------------
def dataset_splits(folder: Path) -> dict[str, Path] | None:
    """The splits of a ``DatasetDict`` that was saved to disk, as folders; None where ``folder`` is none."""
    about = folder / "dataset_dict.json"
    if not about.is_file():
        return None
    names = read_json(about, {"splits": [str]})["splits"]
    wrong = [name for name in names if Path(name).name != name or not (folder / name).is_dir()]
    if wrong or not names:
        raise NearfarError(
            f"{about} names the splits {names}, and there is no folder of {wrong or 'any'} beside it."
        )
    return {name: folder / name for name in names}


def dataset_items(
    folder: Path,
    columns: Sequence[str] | None = None,
    id_column: str | None = None,
    group_column: str | None = None,
    naming: str = "columns=[NAME]",
) -> Items:
    """The items of one ``Dataset`` that was saved to disk (``save_to_disk``); read without the library ``datasets``.

    Names of classes take the place of their numbers; pictures inside go into the cache.

    Raises:
        NearfarError: as `nearfar.data.sources.read_items`, and for a folder that was saved in part.
    """
    import pyarrow

    features = read_json(folder / "dataset_info.json", _INFO).get("features") or {}
    state = read_json(folder / "state.json", _STATE)
    if state.get("_indices_data_files"):
        raise NearfarError(
            f"{folder} was saved with an order of its rows apart (datasets before 2.0): load it with the library "
            "and save it again after flatten_indices()."
        )
    names = [str(file["filename"]) for file in state["_data_files"]]
    files = [folder / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name or not file.is_file():
            raise NearfarError(f"{folder}: its part {name} is missing: save or copy it again.")
    if not files:
        raise NearfarError(f"{folder} is a dataset without rows.")
    wanted = _Wanted(columns, id_column, group_column, naming)
    try:
        header = _stream(files[0])[0]
        return _items(str(folder), folder, header, _batches(files), features, wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise NearfarError(
            f"{folder} cannot be read as a saved dataset: {str(error).splitlines()[0]}. Save or copy it again."
        ) from None


def _stream(file: Path) -> tuple[list[str], Any]:
    """The column names and a reader of an Arrow file, as a stream or with an index at its end."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        reader = pyarrow.ipc.open_stream(source)
        return list(reader.schema.names), reader
    except pyarrow.ArrowInvalid:
        source.seek(0)
        reader = pyarrow.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        return list(reader.schema.names), batches


def _batches(files: Sequence[Path]) -> Iterator[Any]:
    import pyarrow

    for file in files:
        for batch in _stream(file)[1]:
            yield pyarrow.Table.from_batches([batch])


# -- by name, over the network -------------------------------------------------------------------------------
def hub_name(text: str) -> tuple[str, str | None, str | None] | None:
    """Name, configuration and split of a dataset on the Hugging Face hub: ``[hf:]OWNER/NAME[:CONFIGURATION][#SPLIT]``.

    >>> hub_name("hf:nyu-mll/glue:sst2#train"), hub_name("ylecun/mnist"), hub_name("data/train.csv.gz/x")
    (('nyu-mll/glue', 'sst2', 'train'), ('ylecun/mnist', None, None), None)
    """
    stated = text.startswith("hf:")
    name, _, split = text.removeprefix("hf:").partition("#")
    name, _, configuration = name.partition(":")
    parts = name.split("/")
    plain = all(part and part.strip(".") and all(c.isalnum() or c in "._-" for c in part) for part in parts)
    if not plain or len(parts) not in ((1, 2) if stated else (2,)):
        return None
    return name, configuration or None, split or None


def hub_splits(text: str) -> dict[str, str]:
    """The splits of a dataset on the hub, each as a name that `hub_items` reads."""
    known = hub_name(text)
    assert known is not None
    name, configuration, split = known
    if split is not None:
        return {split: text}
    library = _datasets(text)
    with _loading(text):
        names = library.get_dataset_split_names(name, configuration)
    base = f"hf:{name}" + (f":{configuration}" if configuration else "")
    return {each: f"{base}#{each}" for each in names}


def hub_items(
    text: str,
    columns: Sequence[str] | None = None,
    id_column: str | None = None,
    group_column: str | None = None,
    naming: str = "columns=[NAME]",
) -> Items:
    """The items of a split of a dataset on the hub (`hub_name`; without a split: ``train``).

    The library ``datasets`` fetches and keeps it; from version 4 on, which is asked for, it runs no code of datasets.

    Raises:
        NearfarError: as `nearfar.data.sources.read_items`; no such library, name or split, or no network.
    """
    known = hub_name(text)
    if known is None:
        raise NearfarError(
            f"'{text}' is no name on the hub: hf:OWNER/NAME, or hf:OWNER/NAME:CONFIGURATION#SPLIT."
        )
    name, configuration, split = known
    library = _datasets(text)
    with _loading(text):
        data = library.load_dataset(name, configuration, split=split or "train")
        features = data.features.to_dict()
    header = list(data.column_names)
    choose(Path(text), header, columns, id_column, group_column, naming, "Its columns are")
    wanted = _Wanted(columns, id_column, group_column, naming)
    batches = data.with_format("arrow").iter(batch_size=_BATCH)
    return _items(text, None, header, batches, features, wanted)


def _datasets(text: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise NearfarError(
            f"'{text}' is no file or folder here; as a name on the Hugging Face hub it is fetched by the library "
            "datasets: pip install 'nearfar[datasets]'. Or save it where that library is, by "
            "datasets.load_dataset(NAME).save_to_disk(FOLDER), and give the folder."
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise NearfarError(
            f"datasets {datasets.__version__} may run code that comes with a dataset: pip install 'datasets>=4'."
        )
    return datasets


@dataclass
class _loading:
    """Turns whatever the library raises into a message with what to do."""

    text: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, NearfarError):
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise NearfarError(
                f"'{self.text}' is no file or folder here, and could not be fetched from the Hugging Face hub: "
                f"{reason}. Look at its name; without a network, save it elsewhere by "
                "datasets.load_dataset(NAME).save_to_disk(FOLDER), copy it here and give the folder."
            ) from None


# -- Arrow columns -------------------------------------------------------------------------------------------
def _items(
    source: str,
    folder: Path | None,
    header: Sequence[str],
    batches: Iterable[Any],
    features: Json,
    wanted: _Wanted,
) -> Items:
    used, id_name = choose(
        Path(source),
        header,
        wanted.columns,
        wanted.id_column,
        wanted.group_column,
        wanted.naming,
        "Its columns are",
    )
    at = {name: header[position] for name, position in used.items()}
    needed = list(dict.fromkeys(at.values()))
    pieces: dict[str, list[Any]] = {name: [] for name in needed}
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
    rows = list(range(1, n + 1))
    values: dict[str, Column] = {}
    reasons: dict[str, Reasons] = {}
    notes: dict[str, Any] = {}
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
        asked=wanted.columns is not None,
        folder=folder,
        notes=notes,
        id_given=wanted.id_column is not None,
        reasons={name: reason for name, reason in reasons.items() if name in values},
    )


def _holds_bytes(kind: Any) -> bool:
    """Whether a column holds whole files: pictures as ``datasets`` keeps them, or bytes alone."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"\0\0\0", b"P5", b"P6")


def _no_pictures(column: Any) -> bytes:
    """The first bytes of the first file of a column that begins like no picture; nothing where it does."""
    first = next((value for value in column.to_pylist() if value is not None), None)
    data = first.get("bytes") if isinstance(first, dict) else first
    return b"" if not data or data.startswith(_MAGIC) else bytes(data[:8])


def _kept(column: Any, folder: Path | None) -> list[str | None]:
    paths: list[str | None] = []
    for value in column.to_pylist():
        data = value.get("bytes") if isinstance(value, dict) else value
        path = value.get("path") if isinstance(value, dict) else None
        if data:
            paths.append(keep_picture(data))
        else:
            paths.append(os.path.join(folder, path) if path and folder is not None else path)
    return paths


def _column(pieces: Sequence[Any], feature: object) -> tuple[Column, Reasons | None]:
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


def _lists(whole: Any) -> tuple[Column, Reasons | None]:
    import pyarrow

    inner = whole.type.value_type
    while hasattr(inner, "value_type"):
        inner = inner.value_type
    if pyarrow.types.is_integer(inner) or pyarrow.types.is_floating(inner) or pyarrow.types.is_boolean(inner):
        return stack_vectors([_vector(value) for value in whole])
    texts: list[str | None] = []
    for value in whole.to_pylist():
        if value and all(isinstance(word, str) for word in value):
            texts.append("; ".join(value))
        else:
            texts.append(cell_text(value) if value else None)
    return texts, None


def _vector(value: Any) -> np.ndarray | None:
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


# -- pictures that come as bytes -----------------------------------------------------------------------------
def keep_picture(data: bytes) -> str:
    """The path of a file in the cache that holds these bytes, written if it is not there; called by their sha256.

    Raises:
        NearfarError: a cache that cannot be written.

    >>> os.environ["NEARFAR_CACHE"] = tempfile.mkdtemp()
    >>> path = keep_picture(b"abc")
    >>> path == keep_picture(b"abc"), Path(path).read_bytes()
    (True, b'abc')
    >>> del os.environ["NEARFAR_CACHE"]
    """
    digest = hashlib.sha256(data).hexdigest()
    path = cache_dir() / "pictures" / digest[:2] / digest
    try:
        if path.is_file() and path.stat().st_size == len(data):
            return str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.replace(temporary, path)  # a reader sees the whole file or none
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NearfarError(
            f"a picture cannot be kept in {path.parent} ({error.strerror}): make room there, or set NEARFAR_CACHE to a "
            "folder that has it."
        ) from None
    return str(path)
