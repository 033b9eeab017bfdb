"""Tables of text from files that other people wrote: delimited text, spreadsheets, JSON and Parquet, without surprises.

`open_table` reads a whole file as text, whatever its format; `read_table` takes the wanted columns out of it. A broken
row costs one row: it is counted in `Rejections` and reading goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfar.data.delimited import decode, read_delimited
from nearfar.data.rejections import Rejections
from nearfar.data.table_formats import (
    JSON_SUFFIXES,
    PARQUET_SUFFIXES,
    REFUSED,
    SHEET_SUFFIXES,
    content_of,
    full_suffix,
    parquet_header,
    read_json,
    read_parquet,
    read_sheet,
)
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "TABLE_SUFFIXES",
    "RawTable",
    "Table",
    "choose_columns",
    "column_key",
    "delimited_table",
    "is_placeholder",
    "open_table",
    "read_table",
    "require_file",
    "unknown_suffix",
]

_TEXT_SUFFIXES = (".tsv", ".txt", ".tab", ".csv")
TABLE_SUFFIXES = _TEXT_SUFFIXES + JSON_SUFFIXES + SHEET_SUFFIXES + PARQUET_SUFFIXES
"""What a table may be called; each also with ``.gz`` behind it, or alone in a ``.zip``."""

_PLACEHOLDERS = frozenset(
    ("nan", "none", "null", "nil", "na", "n/a", "#n/a", "<na>", "n.a.", "-", "--", "---", "?", "missing")
)


@dataclass
class RawTable:
    """A whole file as text: ``rows[i]`` has a field for each name in ``header``.

    ``numbers[i]`` is the line (spreadsheet, Parquet: the row) where row i stood, ``n_rows`` the rows of the file, used
    or rejected; ``notes`` say how it was read where that is no matter of course.
    """

    path: Path
    header: list[str]
    rows: list[list[str]]
    numbers: list[int]
    n_rows: int
    header_line: int = 1
    rejections: Rejections = field(default_factory=Rejections)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, position: int) -> list[str]:
        """One column as a list."""
        return [row[position] for row in self.rows]

    def without_header(self) -> RawTable:
        """The same table where the first line is a row like the others; columns are called 1, 2, …"""
        return RawTable(
            self.path,
            [str(i + 1) for i in range(len(self.header))],
            [self.header, *self.rows],
            [self.header_line, *self.numbers],
            self.n_rows + 1,
            self.header_line,
            self.rejections,
            self.notes,
        )

    def take(self, used: Mapping[str, int]) -> Table:
        """The columns at the positions ``used`` under new names; raises ``NearfarError`` where there is no row."""
        if self.n_rows == 0:
            raise NearfarError(f"{self.path} has a header but no rows.")
        if not self.rows:
            raise NearfarError(
                f"{self.path}: none of its {self.n_rows} rows is usable; {self.rejections.summary()}."
            )
        columns = {name: self.column(position) for name, position in used.items()}
        headers = {name: self.header[position] for name, position in used.items()}
        return Table(self.path, columns, self.numbers, headers, self.n_rows, self.rejections, self.notes)


@dataclass
class Table:
    """The wanted columns of one file, as text.

    ``columns[name][i]`` is the value of row i, ``rows[i]`` the line (spreadsheet, Parquet: the row) where it
    stood, ``used[name]`` the header under which the column was found, ``n_rows`` the rows of the file, used
    or rejected; ``notes`` say how it was read where that is no matter of course.
    """

    path: Path
    columns: dict[str, list[str]]
    rows: list[int]
    used: dict[str, str]
    n_rows: int
    rejections: Rejections = field(default_factory=Rejections)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[str]:
        return self.columns[column]

    def __contains__(self, column: object) -> bool:
        return column in self.columns


def read_table(
    path: str | Path,
    columns: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str | None] | None = None,
    optional: Collection[str] = (),
    naming: str = "{name}_column=NAME",
    encoding: str | None = None,
    encoding_option: str = "",
) -> Table:
    """Read the wanted columns of a table.

    Args:
        path: the file; its suffix says what it is (`TABLE_SUFFIXES`).
        columns: for each wanted column the headers under which it may stand, best first; letter case, spaces
            and ``-`` against ``_`` do not matter.
        overrides: the header to use for a wanted column, instead of the aliases (``None``: use the aliases).
        optional: wanted columns that may be missing.
        naming: how the caller's users give the header of the column ``{name}``, for the message that asks
            them to.
        encoding, encoding_option: see `open_table`.

    Raises:
        NearfarError: what `open_table` raises, no row, a missing column (with the columns that are there and the
            nearest name), or no usable row at all.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "pairs.tsv"
    >>> _ = file.write_text('CID\\tSMILES\\tdescription\\n702\\tCCO\\tAn "alcohol".\\n703\\tCC\\n')
    >>> table = read_table(file, {"smiles": ["smiles"], "text": ["description", "text"]})
    >>> table["text"], table.used["smiles"], table.rejections.counts
    (['An "alcohol".'], 'SMILES', {'wrong number of fields': 1})
    """

    def choose(header: Sequence[str]) -> dict[str, int]:
        return choose_columns(Path(path), header, columns, overrides or {}, optional, naming)

    raw = open_table(path, encoding, encoding_option, lambda header: sorted(set(choose(header).values())))
    return raw.take(choose(raw.header))


def open_table(
    path: str | Path,
    encoding: str | None = None,
    encoding_option: str = "",
    needed: Callable[[Sequence[str]], Sequence[int]] | None = None,
) -> RawTable:
    """A whole table as text.

    Args:
        path: delimited text (`read_delimited`), a spreadsheet, JSON, JSON lines or Parquet; see `TABLE_SUFFIXES`.
        encoding: of a text file; null: UTF-8, or UTF-16 with its mark.
        encoding_option: how the caller's users give the encoding, for the message that asks them to.
        needed: the positions of the header that are needed; of Parquet, which may hold pictures, only those are read.

    Raises:
        NearfarError: a missing or empty file, a folder, an unknown suffix, bytes of an encoding that is not the given
            one, content that is not what the suffix says.
    """
    path = Path(path)
    require_file(path)
    suffix = full_suffix(path)
    if suffix in PARQUET_SUFFIXES:
        names = parquet_header(path)
        header = names if needed is None else [names[position] for position in needed(names)]
        rows = read_parquet(path, header)
        return RawTable(path, header, rows, list(range(1, len(rows) + 1)), len(rows))
    if suffix in SHEET_SUFFIXES:
        return RawTable(path, *read_sheet(path))
    if suffix not in _TEXT_SUFFIXES + JSON_SUFFIXES:
        raise unknown_suffix(path, TABLE_SUFFIXES)
    text = decode(path, content_of(path), encoding, encoding_option)
    if suffix in JSON_SUFFIXES:
        return RawTable(path, *read_json(path, text))
    return delimited_table(path, text, suffix)


def delimited_table(path: Path, text: str, suffix: str) -> RawTable:
    """The text of a delimited file as a table; ``suffix`` is the first guess of its delimiter (`read_delimited`)."""
    parsed = read_delimited(path, text, suffix)
    return RawTable(
        path,
        parsed.header,
        parsed.rows,
        parsed.numbers,
        parsed.n_rows,
        parsed.header_line,
        parsed.rejections,
        parsed.notes,
    )


def unknown_suffix(path: Path, known: Sequence[str]) -> NearfarError:
    """The error for a file whose format is not read."""
    suffix = full_suffix(path)
    if suffix in REFUSED:
        return NearfarError(f"{path}: {suffix} is not read. {REFUSED[suffix]}.")
    names = ", ".join(known)
    return NearfarError(f"{path}: cannot tell the format from the suffix '{suffix}'; known: {names}.")


def require_file(path: Path) -> None:
    """Raise ``NearfarError`` for a folder, a missing file or an empty one."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir())[:8]
        raise NearfarError(f"{path} is a folder, not a file; it holds {', '.join(inside) or 'nothing'}.")
    if not path.exists():
        hint = f"the folder {path.parent} does not exist."
        if path.parent.is_dir():
            names = [p.name for p in path.parent.iterdir() if p.is_file()][:500]
            hint = nearest_name(path.name, names)
            if not hint.endswith("?"):
                hint = f"{hint}." if 0 < len(names) <= 20 else f"{path.parent.absolute()} has no such file."
        raise NearfarError(f"There is no file {path}; {hint}")
    if path.stat().st_size == 0:
        raise NearfarError(f"{path} is empty (0 bytes).")


def is_placeholder(text: str) -> bool:
    """Whether a cell of prose holds nothing but a word for *missing*; no rule for other columns (``N`` is ammonia).

    >>> [is_placeholder(text) for text in ("N/A", " nan ", "-", "none of it", "N")]
    [True, True, True, False, False]
    """
    return text.strip().casefold() in _PLACEHOLDERS


def choose_columns(
    path: Path,
    header: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str | None],
    optional: Collection[str],
    naming: str,
    introduction: str = "Its header line has",
) -> dict[str, int]:
    """Which position of the header holds which wanted column; arguments and errors as of `read_table`.

    ``introduction`` begins the sentence that lists the columns in an error.
    """
    by_key: dict[str, list[int]] = {}
    for position, head in enumerate(header):
        by_key.setdefault(column_key(head), []).append(position)
    listed = ", ".join(repr(head) for head in header[:40]) + (", …" if len(header) > 40 else "")
    used: dict[str, int] = {}
    for name, aliases in columns.items():
        override = overrides.get(name)
        wanted = [override] if override is not None else list(aliases)
        key = next((column_key(alias) for alias in wanted if column_key(alias) in by_key), None)
        if key is None:
            if override is None and name in optional:
                continue
            sought = repr(override) if override is not None else f"for {name} ({', '.join(aliases)})"
            near = nearest_name(wanted[0], header)
            near = "." if near.startswith("known: ") else f"; {near}"
            raise NearfarError(
                f"{path} has no column {sought}. {introduction} {listed}{near} "
                f"Name the column with {naming.format(name=name)}."
            )
        matches = by_key[key]
        exact = [position for position in matches if header[position] in wanted]
        if len(matches) > 1 and len(exact) != 1:
            same = len({header[position] for position in matches}) == 1
            advice = (
                "Rename all but one"
                if same
                else f"Choose with {naming.format(name=name)} as it is written there"
            )
            raise NearfarError(f"{path} has {len(matches)} columns that could be {name}: {listed}. {advice}.")
        used[name] = exact[0] if exact else matches[0]
    return used


def column_key(name: str) -> str:
    """What two spellings of a header have in common.

    >>> column_key("#Canonical SMILES") == column_key("canonical_smiles")
    True
    """
    return name.strip().lstrip("#").strip().strip("\ufeff\"'").lower().replace("-", "_").replace(" ", "_")
