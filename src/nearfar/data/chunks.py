"""New data of a user's, whatever its size, as items in chunks: large tables are read as a stream."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from nearfar.data.column_kinds import without_placeholders
from nearfar.data.delimited import read_delimited, read_further, require_text_encoding
from nearfar.data.files import Json
from nearfar.data.items import Column, Items
from nearfar.data.sources import read_items
from nearfar.data.table_formats import PARQUET_SUFFIXES, full_suffix, parquet_header, read_json
from nearfar.data.table_items import as_lines, build_items
from nearfar.data.tables import TABLE_SUFFIXES, RawTable, choose_columns, column_key, open_table, require_file
from nearfar.data.typed_tables import parquet_chunks
from nearfar.errors import NearfarError

__all__ = ["NewData", "read_chunks"]

#: text files up to this size are read whole, by all the evidence in them; larger ones by that of their beginning
WHOLE = 64 * 2**20
_HEAD = 50_000  # lines that are the beginning
_TEXT, _LINES = (".csv", ".tsv", ".txt", ".tab"), (".jsonl", ".ndjson")
_NAMING = "--column {name}=HEADER"


@dataclass(frozen=True)
class NewData:
    """A file or folder that a trained run is applied to.

    Args:
        path: a table, a folder of pictures, shards, whatever the system reads.
        columns: under which header a view or a role stands, where it is not the usual one.
        id_column: the header of ids; None: a column called id, or else the number of the row.
        encoding: of a text file; None: UTF-8.
        rows: the size of a chunk.
        images: the folder that names of pictures in a file are relative to; None: that of the file.
        others: columns beyond those of the run are kept.
        options: of the system's own reading, by name (``System.new_options``).
    """

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None
    encoding: str | None = None
    rows: int = 1024
    images: Path | None = None
    others: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """An option that is a number.

        >>> NewData(Path("a.json"), options={"min_score": "0.3"}).number("min_score", 0.5, 0, 1)
        0.3
        """
        given = self.options.get(name)
        if given is None:
            return default
        try:
            value = float(given)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise NearfarError(f"{name}={given}: a number from {least:g} to {most:g} is needed.")
        return value

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        """An option that is one of several words."""
        given = self.options.get(name, default)
        if given not in choices:
            raise NearfarError(f"{name}={given}: {' or '.join(choices)} is needed.")
        return given


def read_chunks(
    source: NewData,
    headers: Mapping[str, Sequence[str]],
    also: Mapping[str, Sequence[str]] | None = None,
    ids: Sequence[str] = (),
) -> Iterator[Items]:
    """The items of a table, folder or shards, ``source.rows`` at a time, with a column for each name in ``headers``.

    Parquet, and JSON lines and text tables above 64 MB, are read as a stream. Ids need not differ. Rows that cannot be
    read are rejections of their chunk. Of a table with one column that is wanted as the only one, the header does not
    matter; a ``.txt`` file without columns has a text in each line.

    Args:
        source: what to read.
        headers: for each name the headers under which it may stand, best first; ``source.columns`` overrides them. A
            column that ``source.columns`` names has to be there, of the others at least one.
        also: the same of columns that are read where they are there, and without which nothing is missing.
        ids: headers under which ids may stand, best first, where ``source`` names none; the last is ``id``.

    Raises:
        NearfarError: nothing to read, damaged files, none of the columns, a column that was named and is not there.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.tsv"
    >>> _ = file.write_text("id\\tWord\\nn1\\tnear\\nn2\\tfar\\nn2\\tN/A\\n")
    >>> source = NewData(file, rows=2)
    >>> [(items.ids, items["word"]) for items in read_chunks(source, {"word": ["word"], "text": ["text"]})]
    [(['n1', 'n2'], ['near', 'far']), (['n2'], [None])]
    """
    if source.rows < 1:
        raise NearfarError(f"a chunk of {source.rows} rows: at least one is needed.")
    also = also or {}
    for name in source.columns:
        if name not in headers and name not in also:
            raise NearfarError(
                f"a column for '{name}' was named, and this run reads none; it reads {', '.join(headers)}."
            )
    wanted = _Wanted(headers, also, [*ids, "id"])
    path = Path(source.path).expanduser()
    suffix = full_suffix(path) if path.is_file() else ""
    if suffix in PARQUET_SUFFIXES:
        require_file(path)
        names = parquet_header(path)
        header = _Header(path, names, source, wanted)
        columns = names if source.others else header.needed
        for items in parquet_chunks(path, columns, source.rows, source.images):
            yield header.named(items)
    elif suffix in (*_TEXT, *_LINES) and path.stat().st_size > WHOLE:
        stream = _json_lines if suffix in _LINES else _delimited
        header = None
        for raw in stream(path, suffix, source):
            header = header or _Header(path, raw.header, source, wanted)
            yield header.items(raw)
    elif suffix in TABLE_SUFFIXES:
        raw = as_lines(open_table(path, source.encoding, "--encoding"), source.encoding)
        yield from _parts(_Header(path, raw.header, source, wanted).items(raw), source.rows)
    else:
        whole = read_items(path, encoding=source.encoding, encoding_option="--encoding")
        header = _Header(path, list(whole.columns), source, wanted)
        yield from _parts(header.named(whole), source.rows)


def _parts(whole: Items, rows: int) -> Iterator[Items]:
    """The items in chunks; all rejections are those of the first."""
    for start in range(0, max(1, len(whole)), rows):
        chunk = whole.take(range(start, min(start + rows, len(whole))))
        yield replace(chunk, rejections=whole.rejections) if start == 0 else chunk


@dataclass(frozen=True)
class _Wanted:
    """The headers of the columns that are wanted, of those that are taken along, and of ids."""

    headers: Mapping[str, Sequence[str]]
    also: Mapping[str, Sequence[str]]
    ids: Sequence[str]


class _Header:
    """Which columns of a source are wanted, and its rows as items with these."""

    def __init__(
        self,
        path: Path,
        header: Sequence[str],
        source: NewData,
        wanted: _Wanted,
    ) -> None:
        self.path, self.source = path, source
        about = (_NAMING, "Its columns are")
        used, beside = (
            choose_columns(
                path, header, some, {name: source.columns.get(name) for name in some}, list(some), *about
            )
            for some in (wanted.headers, wanted.also)
        )
        headers = wanted.headers
        self.ids: str | None = None
        if source.id_column is not None:
            own = {"id": [source.id_column]}
            at = choose_columns(
                path, header, own, {"id": source.id_column}, (), "--id-column HEADER", about[1]
            )
            self.ids = header[at["id"]]
        else:
            of_key = Counter(map(column_key, header))
            keys = [key for key in map(column_key, wanted.ids) if of_key[key] == 1]
            self.ids = next((head for head in header if keys and column_key(head) == keys[0]), None)
        known = {self.ids, *(header[position] for position in beside.values())}
        others = [head for head in header if head not in known]
        if not used and len(headers) == len(others) == 1:
            used = {next(iter(headers)): header.index(others[0])}
        if not used:
            listed = ", ".join(repr(head) for head in header[:40])
            sought = " or ".join(repr(name) for name in headers)
            example = _NAMING.format(name=next(iter(headers)))
            raise NearfarError(
                f"{path} has no column {sought}. Its columns are {listed}. Name one with {example}."
            )
        self.used = {name: header[position] for name, position in {**beside, **used}.items()}
        self.header = list(header)

    @property
    def needed(self) -> list[str]:
        """The headers to read."""
        return list(dict.fromkeys([*self.used.values(), *([self.ids] if self.ids is not None else [])]))

    def items(self, raw: RawTable) -> Items:
        """The rows of a table of text."""
        notes: Json = {"reading": list(raw.notes)} if raw.notes else {}
        names = dict.fromkeys(self.header if self.source.others else self.needed)
        values: dict[str, Column] = {
            name: without_placeholders(name, raw.column(self.header.index(name)), notes) for name in names
        }
        folder = self.source.images or self.path.parent
        if not raw.rows:
            columns: dict[str, Column] = {name: [] for name in values}
            return self.named(Items([], columns, str(self.path), rows=[], rejections=raw.rejections))
        return self.named(
            build_items(
                str(self.path),
                values,
                raw.numbers,
                kept=list(values),
                folder=folder,
                rejections=raw.rejections,
                notes=notes,
            )
        )

    def named(self, items: Items) -> Items:
        """The wanted columns by their names, and the ids of the table."""
        ids = items.ids
        if self.ids is not None and self.ids in items:
            rows = items.rows or list(range(1, len(items) + 1))
            values = items[self.ids]
            plain = values.tolist() if hasattr(values, "tolist") else list(values)
            ids = [
                f"row{row}" if value is None else str(value) for value, row in zip(plain, rows, strict=True)
            ]
        columns = {name: items[head] for name, head in self.used.items()}
        if self.source.others:
            columns |= {
                name: items[name]
                for name in items.columns
                if name not in columns and name not in self.used.values()
            }
        return replace(items, ids=ids, columns=columns)


# -- large text files ----------------------------------------------------------------------------------------
def _text_lines(path: Path, encoding: str | None) -> Iterator[str]:
    """The lines of a text file without their ends; ``NearfarError`` for bytes that are not of its encoding."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        marked = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    if encoding is not None:
        require_text_encoding(encoding, "--encoding")
    chosen = encoding or ("utf-16" if marked else "utf-8-sig")
    number = 0
    try:
        with opener(path, "rt", encoding=chosen, newline="\n") as file:
            for number, line in enumerate(file, start=1):  # noqa: B007  (the error names it)
                yield line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise NearfarError(
            f"{path}, after line {number}: bytes that are not {chosen.removesuffix('-sig').upper()} "
            f"({error.reason}). Give its encoding, as --encoding cp1252."
        ) from None
    except (OSError, EOFError) as error:
        raise NearfarError(f"{path} cannot be read: {error}") from None


def _delimited(path: Path, suffix: str, source: NewData) -> Iterator[RawTable]:
    """A delimited file in parts; delimiter, quotation and header are those of its beginning."""
    lines = _text_lines(path, source.encoding)
    head = list(islice(lines, _HEAD))
    if len(head) == 1:  # carriage returns alone, or one row: nothing to stream
        yield open_table(path, source.encoding, "--encoding")
        return
    # The last record may be cut off; it is read again, with what follows it.
    known = read_delimited(path, "\n".join(head), suffix)
    after = known.header_line
    notes = list(known.notes)

    def rest() -> Iterator[str]:
        yield from head[after:]
        yield from lines

    for part in read_further(rest(), known, source.rows, after + 1):
        yield RawTable(
            path, known.header, part.rows, part.numbers, part.n_rows, after, part.rejections, notes
        )
        notes = []


def _json_lines(path: Path, suffix: str, source: NewData) -> Iterator[RawTable]:
    """JSON lines in parts; the columns are those of the first."""
    lines, before = _text_lines(path, source.encoding), 0
    header: list[str] = []
    while part := list(islice(lines, source.rows)):
        if any(line.strip() for line in part):
            names, rows, numbers, n_rows, _, rejections, _ = read_json(
                path, "\n".join([*part, ""]), lines=True
            )
            header = header or names
            at = {name: i for i, name in enumerate(names)}
            rows = [[row[at[name]] if name in at else "" for name in header] for row in rows]
            rejections.shift(before)
            yield RawTable(path, header, rows, [number + before for number in numbers], n_rows, 0, rejections)
        before += len(part)
