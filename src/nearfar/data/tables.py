"""Tables of text from files that other people wrote: TSV, CSV and Parquet, read without surprises.

Two habits of real files decide how the reader works. Prose holds quotation marks, so a tab-separated file is
split at tabs and line ends alone: a parser that honours quotes would merge hundreds of rows into one. And a
broken row should cost one row: it is counted in `Rejections` and reading goes on with the next line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfar.data.delimited import decode, find_delimiter, records_of
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Table", "read_table", "table_header"]

_TEXT_SUFFIXES = (".tsv", ".txt", ".tab", ".csv")
_PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass
class Table:
    """The wanted columns of one file, as text.

    ``columns[name][i]`` is the value of row i, ``rows[i]`` the line (Parquet: row, counted from 1) where it
    stood, ``used[name]`` the header under which the column was found, ``n_rows`` the rows of the file, used
    or rejected.
    """

    path: Path
    columns: dict[str, list[str]]
    rows: list[int]
    used: dict[str, str]
    n_rows: int
    rejections: Rejections = field(default_factory=Rejections)

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
) -> Table:
    """Read the wanted columns of a TSV/TXT, CSV or Parquet file.

    Args:
        path: the file; its suffix says what it is. A byte-order mark is understood, UTF-8 is expected.
        columns: for each wanted column the headers under which it may stand, best first; letter case, spaces
            and ``-`` against ``_`` do not matter.
        overrides: the header to use for a wanted column, instead of the aliases (``None``: use the aliases).
        optional: wanted columns that may be missing.
        naming: how the caller's users give the header of the column ``{name}``, for the message that asks
            them to.

    Raises:
        NearfarError: missing or empty file, a folder, other bytes than UTF-8, no row, a missing column (with
            the columns that are there and the nearest name), or no usable row at all.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "pairs.tsv"
    >>> _ = file.write_text('CID\\tSMILES\\tdescription\\n702\\tCCO\\tAn "alcohol".\\n703\\tCC\\n')
    >>> table = read_table(file, {"smiles": ["smiles"], "text": ["description", "text"]})
    >>> table["text"], table.used["smiles"], table.rejections.counts
    (['An "alcohol".'], 'SMILES', {'wrong number of fields': 1})
    """
    path = Path(path)
    _require_file(path)
    suffix = path.suffix.lower()
    if suffix in _PARQUET_SUFFIXES:
        table = _read_parquet(path, columns, overrides or {}, optional, naming)
    elif suffix in _TEXT_SUFFIXES:
        table = _read_text(path, columns, overrides or {}, optional, naming)
    else:
        known = ", ".join(_TEXT_SUFFIXES + _PARQUET_SUFFIXES)
        raise NearfarError(
            f"{path}: cannot tell the format from the suffix '{path.suffix}'; rename it to one of {known}."
        )
    if table.n_rows == 0:
        raise NearfarError(f"{path} has a header but no rows.")
    if len(table) == 0:
        raise NearfarError(
            f"{path}: none of its {table.n_rows} rows is usable; {table.rejections.summary()}."
        )
    return table


def table_header(path: str | Path) -> list[str]:
    """The headers of a table, for files whose columns have no fixed names; errors as of `read_table`."""
    path = Path(path)
    _require_file(path)
    suffix = path.suffix.lower()
    if suffix in _PARQUET_SUFFIXES:
        import pyarrow
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (pyarrow.ArrowException, OSError) as error:
            raise NearfarError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    lines = [line.removesuffix("\r") for line in decode(path).split("\n")]
    start = next((i for i, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise NearfarError(f"{path} holds nothing but blank lines.")
    _, header = next(records_of(lines, start, find_delimiter(suffix, lines[start]), Rejections()), (0, []))
    return header


def _require_file(path: Path) -> None:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir())[:8]
        raise NearfarError(f"{path} is a folder, not a file; it holds {', '.join(inside) or 'nothing'}.")
    if not path.exists():
        hint = f"the folder {path.parent} does not exist"
        if path.parent.is_dir():
            names = [p.name for p in path.parent.iterdir() if p.is_file()][:500]
            hint = (
                nearest_name(path.name, names) if 0 < len(names) <= 20 else f"{path.parent} has no such file"
            )
        raise NearfarError(f"There is no file {path}; {hint}.")
    if path.stat().st_size == 0:
        raise NearfarError(f"{path} is empty (0 bytes).")


def _read_text(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str | None],
    optional: Collection[str],
    naming: str,
) -> Table:
    # Not str.splitlines: prose holds line separators (U+2028, form feeds) that do not end a row.
    lines = [line.removesuffix("\r") for line in decode(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    start = next((i for i, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise NearfarError(f"{path} holds nothing but blank lines.")
    delimiter = find_delimiter(path.suffix.lower(), lines[start])
    rejections = Rejections()
    records = records_of(lines, start, delimiter, rejections)
    _, header = next(records, (0, []))
    used = _resolve(path, header, columns, overrides, optional, naming)
    where = {name: header.index(head) for name, head in used.items()}
    taken: dict[str, list[str]] = {name: [] for name in used}
    rows: list[int] = []
    n_rows = 0
    for number, fields in records:
        n_rows += 1
        if len(fields) != len(header):
            detail = f"{len(fields)} fields, the header has {len(header)}"
            rejections.add("wrong number of fields", number, delimiter.join(fields), detail)
            continue
        rows.append(number)
        for name, position in where.items():
            taken[name].append(fields[position])
    n_rows += sum(rejections.counts.get(reason, 0) for reason in ("blank line", "broken quoting"))
    return Table(path, taken, rows, used, n_rows, rejections)


def _read_parquet(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str | None],
    optional: Collection[str],
    naming: str,
) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        header = list(pyarrow.parquet.read_schema(path).names)
        used = _resolve(path, header, columns, overrides, optional, naming)
        data = pyarrow.parquet.read_table(path, columns=sorted(set(used.values())))
    except (pyarrow.ArrowException, OSError) as error:
        raise NearfarError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    taken = {
        name: [_as_text(value) for value in data.column(head).to_pylist()] for name, head in used.items()
    }
    return Table(path, taken, list(range(1, data.num_rows + 1)), used, data.num_rows)


def _as_text(value: object) -> str:
    if value is None or value != value:  # missing, or NaN
        return ""
    if isinstance(value, float) and value.is_integer():  # an integer column with gaps is stored as float
        return str(int(value))
    return str(value)


def _resolve(
    path: Path,
    header: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    overrides: Mapping[str, str | None],
    optional: Collection[str],
    naming: str,
) -> dict[str, str]:
    """Which header holds which wanted column."""
    by_key: dict[str, list[str]] = {}
    for head in header:
        by_key.setdefault(_key(head), []).append(head)
    there = ", ".join(repr(head) for head in header)
    used: dict[str, str] = {}
    for name, aliases in columns.items():
        override = overrides.get(name)
        wanted = [override] if override is not None else list(aliases)
        found = next((_key(alias) for alias in wanted if _key(alias) in by_key), None)
        if found is None:
            if override is None and name in optional:
                continue
            sought = repr(override) if override is not None else f"for {name} ({', '.join(aliases)})"
            near = nearest_name(wanted[0], header)
            raise NearfarError(
                f"{path} has no column {sought}. Its header line has {there}; {near}. "
                f"Name the column with {naming.format(name=name)}."
            )
        matches = by_key[found]
        exact = [head for head in matches if head in wanted]
        if len(matches) > 1 and len(exact) != 1:
            raise NearfarError(f"{path} has {len(matches)} columns that could be {name}: {there}.")
        used[name] = exact[0] if exact else matches[0]
    return used


def _key(name: str) -> str:
    return name.strip().strip("\ufeff\"'").lower().replace("-", "_").replace(" ", "_")
