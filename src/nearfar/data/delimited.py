"""Delimited text to rows of fields: encoding, delimiter and quoting by the evidence of the whole file.

Quotation marks mean two things in real files. Written by pandas or a spreadsheet they enclose a field, which may then
hold delimiters and line breaks; written by a program that knows nothing of quoting (ChEBI-20) they are part of the
prose. A file is read in the way that turns fewer of its lines away; where both do equally well, a comma file has
enclosing marks and a tab file has marks in its prose. One broken row costs one row.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError

__all__ = ["Delimited", "decode", "read_delimited", "require_text_encoding", "text_lines"]

_SWALLOWED = 4  # so many lines inside one quoted field that are rows of their own: its mark was never closed
_GOOD = 0.9  # share of lines that fit the header from which a delimiter is beyond doubt
_AHEAD = 1000  # lines beyond a part of a large file that a quoted field at its end may run over
_FIELD = 2**24  # characters that a field of a large file may have
_MARKS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "vertical bar"}


@dataclass
class Delimited:
    """A table as text: the header and its line, rows with theirs (counted from 1), and what was turned away.

    ``n_rows`` counts the rows of the file, used or rejected; ``notes`` say how an ambiguous file was read. ``mark``
    separates fields, ``enclosing`` is whether quotation marks enclose them.
    """

    header: list[str]
    header_line: int
    rows: list[list[str]]
    numbers: list[int]
    n_rows: int
    rejections: Rejections = field(default_factory=Rejections)
    notes: list[str] = field(default_factory=list)
    mark: str = ","
    enclosing: bool = False


def require_text_encoding(name: str, option: str = "encoding") -> str:
    """``name`` if Python knows it as an encoding of text.

    >>> require_text_encoding("cp1252")
    'cp1252'
    >>> require_text_encoding("cp9", "data.encoding")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: data.encoding=cp9: no such encoding; utf-8, utf-16, cp1252 and latin-1 are usual.
    """
    try:
        b"text".decode(name)  # nothing would be looked up for no bytes
    except UnicodeDecodeError:
        return name
    except (LookupError, ValueError, TypeError):
        usual = "utf-8, utf-16, cp1252 and latin-1 are usual"
        raise NearfarError(f"{option}={name}: no such encoding; {usual}.") from None
    return name


def decode(path: Path, data: bytes, encoding: str | None = None, option: str = "") -> str:
    """The text of a file: in ``encoding``, or in UTF-8 (UTF-16 with its mark) where null; no byte-order mark.

    ``option`` is how the user sets ``encoding``; a message names it together with an encoding that can read the file.

    Raises:
        NearfarError: bytes that are not of that encoding.
    """
    if encoding is not None:
        require_text_encoding(encoding, option or "encoding")
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    chosen = encoding or ("utf-16" if marked else "utf-8-sig")
    try:
        text = data.decode(chosen)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start] if error.start < len(data) else 0
        raise NearfarError(
            f"{path}, line {line}: byte 0x{byte:02x} (offset {error.start}) is not "
            f"{chosen.removesuffix('-sig').upper()}. " + _encoding_advice(data, error.start, option)
        ) from None
    if encoding is None and (wide := _wide_encoding(data)):
        advice = f"give {option}={wide}, or save" if option else "save"
        raise NearfarError(
            f"{path} is full of NUL bytes, as {wide} without a mark is; {advice} the file as UTF-8."
        )
    return text.removeprefix("\ufeff")


def _encoding_advice(data: bytes, position: int, option: str) -> str:
    if not option:
        return "Save the file as UTF-8."
    for name in ("cp1252", "latin-1"):
        try:
            data.decode(name)
        except UnicodeDecodeError:
            continue
        around = " ".join(data[max(0, position - 15) : position + 15].decode(name).split())
        return f"Save the file as UTF-8, or give {option}={name}, by which it reads '…{around}…' here."
    raise AssertionError("latin-1 reads every byte")


def _wide_encoding(data: bytes) -> str:
    """UTF-16 without a byte-order mark has a NUL beside every Latin letter."""
    head = data[:4096]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(0) < len(head) / 5:
        return ""
    return "utf-16-le" if head[1::2].count(0) > head[0::2].count(0) else "utf-16-be"


def text_lines(text: str) -> list[str]:
    """Lines without their ends; blank ones at the end of the file left out.

    Not `str.splitlines`: prose holds line separators (U+2028, form feeds) that do not end a row.
    """
    mark = "\n" if "\n" in text or "\r" not in text else "\r"  # carriage returns alone: old Macintosh
    lines = [line.removesuffix("\r") for line in text.split(mark)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_delimited(path: Path, text: str, suffix: str) -> Delimited:
    """The rows of delimited text; ``suffix`` (``.csv``, ``.tsv``, …) decides where the evidence does not.

    Before the header blank lines, a line ``sep=;`` and comments (lines that begin with ``#`` and have fewer fields than
    the line after them) are passed over. Empty fields beyond the header are dropped.

    Raises:
        NearfarError: nothing but blank lines.
    """
    lines = text_lines(text)
    start = next((i for i, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise NearfarError(f"{path} holds nothing but blank lines.")
    stated = lines[start].strip().strip('"')
    order = ",;\t|" if suffix == ".csv" else "\t,;|"
    if len(stated) == 5 and stated.startswith("sep="):  # a hint of spreadsheets
        order = stated[4]
        start = next((i for i in range(start + 1, len(lines)) if lines[i].strip()), start)
    start, comments = _after_comments(lines, start, order)
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    try:
        reading = _best_reading(lines, start, order)
    finally:
        csv.field_size_limit(limit)
    if comments:
        reading.notes.append(f"{comments} comment line{'s' * (comments > 1)} before the header passed over")
    return reading


def _after_comments(lines: Sequence[str], start: int, order: str) -> tuple[int, int]:
    """Where the header is, and how many comment lines stand before it."""
    first = next((i for i in range(start, len(lines)) if not lines[i].lstrip().startswith("#")), start)
    while first < len(lines) - 1 and not lines[first].strip():
        first += 1
    if first == start or not lines[first].strip():
        return start, 0
    above = max(i for i in range(start, first) if lines[i].strip())
    mark = max(order, key=lines[first].count)
    fields = lines[above].split(mark)
    names = len(fields) > 1 and all(len(name.split()) <= 3 for name in fields)
    header = above if names and len(fields) == 1 + lines[first].count(mark) else first
    return header, sum(bool(line.strip()) for line in lines[start:header])


@dataclass
class _Reading:
    """One way to read the lines: how many it turns away, and how many it puts into a field although they are rows."""

    delimited: Delimited
    rejected: int
    swallowed: int
    multiline: int

    @property
    def lost(self) -> int:
        return self.rejected + self.swallowed


def _best_reading(lines: Sequence[str], start: int, order: str) -> Delimited:
    marks = [mark for mark in order if mark in lines[start]] or [order[0]]
    best: tuple[_Reading, str] | None = None
    for mark in marks:
        reading, note = _quoting(lines, start, mark)
        if best is None or reading.lost < best[0].lost:
            best = (reading, note)
        if reading.lost <= (1 - _GOOD) * (len(lines) - start):
            best = (reading, note)
            break
    assert best is not None
    reading, note = best
    if note:
        reading.delimited.notes.append(note)
    return reading.delimited


def _quoting(lines: Sequence[str], start: int, mark: str) -> tuple[_Reading, str]:
    """The better of two readings: quotation marks enclose fields, or are part of the prose."""
    if not any('"' in line for line in lines[start:]):
        return _read(lines, start, mark, enclosing=False), ""
    enclosing = _read(lines, start, mark, enclosing=True)
    prose = _read(lines, start, mark, enclosing=False)
    enclosing_usual = mark != "\t"
    if enclosing_usual:
        # A broken quote in a comma file is damage; only where many rows say otherwise are the marks prose. Lines inside
        # a field that would do as rows say nothing here: prose is full of commas.
        strange = (len(lines) - start) / 10
        chosen = prose if prose.rejected * 5 < enclosing.rejected > strange else enclosing
    else:
        chosen = enclosing if enclosing.lost < prose.lost else prose
    other = prose if chosen is enclosing else enclosing
    if chosen.lost == other.lost or (not chosen.rejected and (chosen is enclosing) == enclosing_usual):
        return chosen, ""
    ways = ["enclose fields", "are part of the text"]
    here, elsewhere = ways if chosen is enclosing else ways[::-1]
    return chosen, (
        f"{_MARKS.get(mark, repr(mark))}-separated, quotation marks {here}"
        + (f" ({chosen.multiline} rows span several lines)" if chosen.multiline else "")
        + f"; {chosen.rejected} lines do not fit, {other.lost} if they {elsewhere}"
    )


def read_further(lines: Iterator[str], known: Delimited, rows: int, first: int) -> Iterator[Delimited]:
    """The rows of the lines after the header of a large file, about ``rows`` at a time, read as its beginning was.

    Args:
        lines: without their ends.
        known: what `read_delimited` made of the beginning.
        rows: lines of a part; a quoted field may run over its end, by up to a thousand lines.
        first: the number of the first line in the file.
    """
    header = known.mark.join('"' + name.replace('"', '""') + '"' for name in known.header)
    pending: list[str] = []
    ended = False
    limit = csv.field_size_limit(_FIELD)
    try:
        while not ended or pending:
            while not ended and len(pending) < rows + _AHEAD:
                line = next(lines, None)
                if line is None:
                    ended = True
                else:
                    pending.append(line)
            if not pending:
                return
            block = [header, *pending]
            starts = _starts(block, known.mark, known.enclosing, 1 + rows)
            stop = len(block) if ended and starts >= len(block) else starts
            reading = _read(block[:stop], 0, known.mark, known.enclosing).delimited
            reading.numbers = [number - 2 + first for number in reading.numbers]
            reading.rejections.shift(first - 2)
            yield reading
            pending, first = pending[stop - 1 :], first + stop - 1
    finally:
        csv.field_size_limit(limit)


def _starts(lines: Sequence[str], mark: str, enclosing: bool, at: int) -> int:
    """Where the first record begins that does not begin before the line ``at``."""
    if not enclosing:
        return min(at, len(lines))
    position, width = 0, None
    while position < min(at, len(lines)):
        if '"' not in lines[position]:
            position += 1
            continue
        fields, length = _quoted_record(lines, position, mark, width)
        width = width or (None if fields is None else len(fields))
        position += length
    return min(position, len(lines))


def _read(lines: Sequence[str], start: int, mark: str, enclosing: bool) -> _Reading:
    rejections = Rejections()
    records = _records(lines, start, mark, enclosing, rejections)
    header_line, header, length = next(records, (start + 1, [lines[start]], 1))
    width = len(header)
    rows: list[list[str]] = []
    numbers: list[int] = []
    n_rows = lost = swallowed = multiline = 0
    for number, fields, length in records:
        n_rows += 1
        if len(fields) > width and not any(fields[width:]):
            fields = fields[:width]
        if len(fields) != width:
            detail = f"{len(fields)} fields, the header has {width}"
            rejections.add("wrong number of fields", number, mark.join(fields), detail)
            lost += length
        elif "\0" in "".join(fields):
            rejections.add("NUL byte", number, mark.join(fields).replace("\0", "␀"))
        else:
            rows.append(fields)
            numbers.append(number)
            multiline += length > 1
            inner = lines[number : number - 1 + length]
            swallowed += sum(line.count(mark) == width - 1 for line in inner) if width > 1 else 0
    broken = rejections.counts.get("broken quoting", 0)
    n_rows += broken + rejections.counts.get("blank line", 0)
    content = Delimited(header, header_line, rows, numbers, n_rows, rejections, [], mark, enclosing)
    return _Reading(content, lost + broken, swallowed, multiline)


def _records(
    lines: Sequence[str], start: int, mark: str, enclosing: bool, rejections: Rejections
) -> Iterator[tuple[int, list[str], int]]:
    """Yield (line number from 1, fields, lines it spans); broken and blank lines go to ``rejections``."""
    position, width = start, None
    while position < len(lines):
        line, length = lines[position], 1
        fields: list[str] | None
        if not line.strip():
            rejections.add("blank line", position + 1)
            position += 1
            continue
        if not enclosing or '"' not in line:
            fields = [_unwrap(value) for value in line.split(mark)]
        else:
            fields, length = _quoted_record(lines, position, mark, width)
        if fields is None:
            rejections.add("broken quoting", position + 1, line)
        else:
            width = width or len(fields)
            yield position + 1, fields, length
        position += length


def _quoted_record(
    lines: Sequence[str], start: int, mark: str, width: int | None
) -> tuple[list[str] | None, int]:
    """The record that begins at line ``start`` and the lines it spans; ``None`` and 1 if its quotes are off.

    After a broken line reading resumes at the next. A mark that is closed only after many lines which are rows of their
    own was never meant to enclose them.
    """
    taken = 0

    def feed() -> Iterator[str]:
        nonlocal taken
        for position in range(start, len(lines)):
            taken += 1
            yield lines[position] + "\n"

    try:
        fields = next(csv.reader(feed(), delimiter=mark, strict=True))
    except (csv.Error, StopIteration):
        return None, 1
    if width is not None and width > 1 and taken > _SWALLOWED + 1:
        inner = lines[start + 1 : start + taken - 1]
        if sum(line.count(mark) == width - 1 for line in inner) > 0.8 * len(inner):
            return None, 1
    return fields, taken


def _unwrap(value: str) -> str:
    """Undo the quotes a spreadsheet puts around a whole field; quotation marks in prose stay as they are."""
    if len(value) >= 2 and value[0] == value[-1] == '"':
        inner = value[1:-1].replace('""', "\0")
        if '"' not in inner and "\0" not in value:
            return inner.replace("\0", '"')
    return value
