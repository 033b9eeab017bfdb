"""Lines of delimited text to rows of fields, one broken row at a time."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError

__all__ = ["decode", "find_delimiter", "records_of"]

_MAX_RECORD_LINES = 200  # a quoted field may hold line breaks; an unclosed quote must not eat the file


def decode(path: Path) -> str:
    """The text of a file in UTF-8 (or UTF-16 with its mark), without a byte-order mark."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NearfarError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} (offset {error.start}) is not {encoding}. "
            "Save the file as UTF-8."
        ) from None


def find_delimiter(suffix: str, header: str) -> str:
    """The delimiter that the header line uses, the suffix deciding what is looked for first."""
    order = ",;\t" if suffix == ".csv" else "\t,;"
    return next((mark for mark in order if mark in header), order[0])


def records_of(
    lines: Sequence[str], start: int, delimiter: str, rejections: Rejections
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number from 1, fields); broken and blank lines go to ``rejections``."""
    position = start
    while position < len(lines):
        line = lines[position]
        if not line.strip():
            rejections.add("blank line", position + 1)
            position += 1
        elif delimiter == "\t":
            yield position + 1, [_unwrap(value) for value in line.split("\t")]
            position += 1
        elif '"' not in line:
            yield position + 1, line.split(delimiter)
            position += 1
        else:
            fields, length = _quoted_record(lines, position, delimiter)
            if fields is None:
                rejections.add("broken quoting", position + 1, line)
            else:
                yield position + 1, fields
            position += length


def _quoted_record(lines: Sequence[str], start: int, delimiter: str) -> tuple[list[str] | None, int]:
    """The record that begins at line ``start`` and the lines it spans; ``None`` and 1 if its quotes are off.

    The shortest run of lines that parses strictly is taken; after a broken line reading resumes at the next.
    """
    span: list[str] = []
    for line in lines[start : start + _MAX_RECORD_LINES]:
        span.append(line)
        if span[1:] and '"' not in line:
            continue  # still inside the quoted field: only a quote can close it
        try:
            return next(csv.reader(["\n".join(span)], delimiter=delimiter, strict=True)), len(span)
        except csv.Error as error:
            if "unexpected end of data" not in str(error):
                break
    return None, 1


def _unwrap(value: str) -> str:
    """Undo the quotes a spreadsheet puts around a whole field; quotation marks in prose stay as they are."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        inner = value[1:-1].replace('""', "\0")
        if '"' not in inner:
            return inner.replace("\0", '"')
    return value
