"""Tables that are no delimited text: spreadsheets, JSON and Parquet, and what is packed with gzip or zip."""

from __future__ import annotations

import gzip
import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from nearfar.data.files import Json
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError

__all__ = [
    "JSON_SUFFIXES",
    "PARQUET_SUFFIXES",
    "REFUSED",
    "SHEET_SUFFIXES",
    "content_of",
    "full_suffix",
    "parquet_header",
    "read_json",
    "read_parquet",
    "read_sheet",
]

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
SHEET_SUFFIXES = (".xlsx", ".xlsm")
REFUSED = {
    ".xls": "Save it as .xlsx or .csv",
    ".ods": "Save it as .xlsx or .csv",
    ".pkl": "Loading a pickle runs what is in it: save it as .parquet or .csv",
    ".pickle": "Loading a pickle runs what is in it: save it as .parquet or .csv",
    ".feather": "Save it as .parquet",
    ".arrow": "Save it as .parquet",
}
_MAGIC = (
    (b"\x1f\x8b", "packed with gzip", ".gz"),
    (b"PK\x03\x04", "a spreadsheet or a zip archive", ".xlsx or .zip"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file, which is not read: save it as .xlsx", ".xlsx then"),
)
_MOST_BYTES = 4 << 30  # of an unpacked file: more is a mistake, or made to fill the memory

Read = tuple[list[str], list[list[str]], list[int], int, int, Rejections, list[str]]
"""Header, rows, their numbers, rows of the file, line of the header, rejections, notes."""


def full_suffix(path: Path) -> str:
    """The suffix that says what is inside: of ``a.csv.gz`` it is ``.csv``, of a zip that of its one member.

    >>> full_suffix(Path("pairs.CSV.gz"))
    '.csv'
    """
    packed = path.suffix.lower()
    if packed == ".gz":
        return Path(path.stem).suffix.lower()
    if packed == ".zip":
        with _zip(path) as archive:
            inside = Path(_member(path, archive)).suffix.lower()
            return ".csv" if inside in ("", ".zip") else inside  # as pandas names what it packs
    return packed


def content_of(path: Path) -> bytes:
    """The bytes of a file, unpacked where it is called ``.gz`` or ``.zip`` (of one member).

    Raises:
        NearfarError: a damaged or encrypted archive, several members, more than 4 GiB unpacked, no permission.
    """
    packed = path.suffix.lower()
    try:
        if packed == ".gz":
            with gzip.open(path, "rb") as file:
                return _bounded(path, file)  # type: ignore[arg-type]
        if packed == ".zip":
            with _zip(path) as archive, archive.open(_member(path, archive)) as member:
                return _bounded(path, member)  # type: ignore[arg-type]
        data = path.read_bytes()
        for magic, kind, suffix in _MAGIC:
            if data.startswith(magic):
                name = path.name if suffix == ".gz" else path.stem
                raise NearfarError(f"{path} is {kind}, whatever its name says; call it {name}{suffix}.")
        return data
    except NearfarError:
        raise
    except (EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError) as error:
        raise NearfarError(f"{path} cannot be read: {error or type(error).__name__}.") from None


def _bounded(path: Path, file: BinaryIO) -> bytes:
    data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise NearfarError(f"{path} holds more than {_MOST_BYTES >> 30} GiB unpacked; split it.")
    return data


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise NearfarError(f"{path} cannot be read as a zip archive: {error}.") from None


def _member(path: Path, archive: zipfile.ZipFile) -> str:
    names = [
        info.filename
        for info in archive.infolist()
        if not info.is_dir() and not info.filename.startswith("__MACOSX/")
    ]
    if len(names) != 1:
        shown = ", ".join(names[:8]) or "nothing"
        raise NearfarError(
            f"{path} holds {len(names)} files ({shown}): unpack it and name the file that is meant."
        )
    return names[0]


def cell_text(value: object) -> str:
    """A value as the text of a cell: missing is empty, whole numbers have no point, lists are JSON.

    >>> [cell_text(value) for value in (None, 7.0, 0.5, True, ["a"])]
    ['', '7', '0.5', 'True', '["a"]']
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value != value else str(value)


# -- spreadsheets --------------------------------------------------------------------------------------------
def read_sheet(path: Path) -> Read:
    """The first sheet that holds anything; formulas count as the value that was saved with them.

    Raises:
        NearfarError: no such library, no spreadsheet, a sheet of nothing but blanks.
    """
    try:
        import openpyxl
    except ImportError:
        raise NearfarError(
            f"{path}: spreadsheets are read by openpyxl: pip install openpyxl, or save it as .csv."
        ) from None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MOST_BYTES:
                raise NearfarError(f"{path} holds more than {_MOST_BYTES >> 30} GiB unpacked; split it.")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = {
            sheet.title: [list(row) for row in sheet.iter_rows(values_only=True)] for sheet in book.worksheets
        }
        book.close()
    except NearfarError:
        raise
    except Exception as error:  # openpyxl has no base class of its errors, and damage shows in many
        raise NearfarError(
            f"{path} cannot be read as a spreadsheet: {type(error).__name__}: {error}."
        ) from None
    filled = [name for name, rows in sheets.items() if any(not _blank(row) for row in rows)]
    if not filled:
        raise NearfarError(f"{path}: its sheets hold nothing but blank cells.")
    rows = sheets[filled[0]]
    start = next(i for i, row in enumerate(rows) if not _blank(row))
    width = max(i + 1 for i, value in enumerate(rows[start]) if cell_text(value).strip())
    rejections, taken, numbers = Rejections(), [], []
    last = max(i for i, row in enumerate(rows) if not _blank(row))
    for number in range(start + 1, last + 1):
        fields = [cell_text(value) for value in rows[number]]
        if _blank(fields):
            rejections.add("blank line", number + 1)
        elif any(fields[width:]):
            rejections.add(
                "wrong number of fields", number + 1, " | ".join(fields), "cells beyond the header"
            )
        else:
            taken.append(fields[:width] + [""] * (width - len(fields)))
            numbers.append(number + 1)
    notes = []
    if len(filled) > 1:
        notes.append(f"sheet {filled[0]!r} was read, and none of {', '.join(map(repr, filled[1:]))}")
    header = [cell_text(value) for value in rows[start][:width]]
    return header, taken, numbers, last - start, start + 1, rejections, notes


def _blank(row: Sequence[object]) -> bool:
    return not any(cell_text(value).strip() for value in row)


# -- JSON ----------------------------------------------------------------------------------------------------
def read_json(path: Path, text: str, lines: bool = False) -> Read:
    """Objects one a line, a list of objects, or columns as `pandas.DataFrame.to_json` writes them in any orientation.

    ``lines``: they are one a line, whatever the file is called.

    Columns are the keys of all objects, in order of first appearance; a nested value is JSON text.

    Raises:
        NearfarError: no JSON, or none of these.
    """
    rejections = Rejections()
    lines = lines or (full_suffix(path) != ".json" and text.count("\n{") > 0)
    try:
        whole = json.loads("" if lines else text)
    except RecursionError:
        raise NearfarError(f"{path} is nested too deeply for a table.") from None
    except ValueError as error:
        objects, numbers = _json_lines(text, rejections)
        if not objects:
            raise NearfarError(f"{path} cannot be read as JSON: {error}.") from None
        n_rows = len(objects) + len(rejections)
    else:
        objects = _json_objects(path, whole)
        numbers, n_rows = list(range(1, len(objects) + 1)), len(objects)
    kept: list[Json] = []
    rows_of: list[int] = []
    for number, item in zip(numbers, objects, strict=True):
        if isinstance(item, dict):
            kept.append(item)
            rows_of.append(number)
        else:
            rejections.add("no JSON object", number, item)
    header = list(dict.fromkeys(str(key) for item in kept for key in item))
    if not header:
        raise NearfarError(
            f"{path} holds no object with a value: a table is a list of objects, or one a line."
        )
    rows = [[cell_text(item.get(key)) for key in header] for item in kept]
    return header, rows, rows_of, n_rows, 0, rejections, []


def _json_lines(text: str, rejections: Rejections) -> tuple[list[object], list[int]]:
    objects, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
            numbers.append(number)
        except (ValueError, RecursionError) as error:
            rejections.add("no JSON", number, line, str(error))
    return objects, numbers


def _json_objects(path: Path, whole: object) -> list[object]:
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        columns, data = whole.get("columns"), whole.get("data")
        if isinstance(columns, list) and isinstance(data, list):  # orient="split"
            short = [row for row in data if not isinstance(row, list) or len(row) != len(columns)]
            if short:
                raise NearfarError(f"{path}: {len(short)} rows of 'data' do not fit its 'columns'.")
            return [dict(zip(map(str, columns), row, strict=True)) for row in data]
        if isinstance(data, list):  # orient="table", and what many services answer
            return data
        values = list(whole.values())
        if values and all(isinstance(value, dict) for value in values):
            inner = list(values[0])
            numbered = all(index.isdigit() for index in inner)
            if numbered and all(list(value) == inner for value in values):  # orient="columns"
                return [{key: value[index] for key, value in whole.items()} for index in inner]
            return values  # orient="index"
        if values and all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
            return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
        return [whole]
    raise NearfarError(
        f"{path} holds a JSON {type(whole).__name__}: a table is a list of objects, or one a line."
    )


# -- Parquet -------------------------------------------------------------------------------------------------
def parquet_header(path: Path) -> list[str]:
    """The column names of a Parquet file; an index that pandas wrote is a column like the others."""
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise NearfarError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def read_parquet(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows of a Parquet file: of each the named columns, as text."""
    import pyarrow
    import pyarrow.parquet

    try:
        data = pyarrow.parquet.ParquetFile(path).read(columns=list(dict.fromkeys(columns)))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise NearfarError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    taken = {name: [cell_text(value) for value in data.column(name).to_pylist()] for name in set(columns)}
    return [list(row) for row in zip(*(taken[name] for name in columns), strict=True)]
