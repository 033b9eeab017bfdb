"""Tables as items: texts, numbers, vectors and paths of pictures, told apart by the values of a whole column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from nearfar.data.column_kinds import Reasons, typed, without_placeholders
from nearfar.data.delimited import decode, text_lines
from nearfar.data.files import Json
from nearfar.data.items import Column, Items
from nearfar.data.rejections import Rejections
from nearfar.data.table_formats import JSON_SUFFIXES, content_of, full_suffix
from nearfar.data.tables import RawTable, choose_columns, column_key, open_table
from nearfar.errors import NearfarError

__all__ = ["Wanted", "as_lines", "build_items", "choose", "select", "table_items"]

_REPEATS = 0.1  # a column in which more of the values than this repeat is no column of ids
_IDS = ("id",)


@dataclass(frozen=True)
class Wanted:
    """What is to be read: columns (None: all), of ids and of groups; and how options are named in messages."""

    columns: Sequence[str] | None = None
    id_column: str | None = None
    group_column: str | None = None
    naming: str = "columns=[NAME]"
    id_naming: str = "id_column=NAME"
    group_naming: str = "group_column=NAME"
    encoding: str | None = None
    encoding_option: str = "encoding"

    @property
    def named(self) -> list[str]:
        """All names that were given."""
        names = (*(self.columns or ()), self.id_column, self.group_column)
        return [name for name in names if name is not None]


def table_items(
    path: Path,
    wanted: Wanted,
) -> Items:
    """The items of a text table, a spreadsheet or JSON; arguments and errors as of `nearfar.data.sources.read_items`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.csv"
    >>> _ = file.write_text('id,word,vector\\nb,near,"[1, 2]"\\na,N/A,"[3, 4]"\\n')
    >>> items = table_items(file, Wanted())
    >>> items.ids, items["word"], items["vector"].tolist()
    (['b', 'a'], ['near', None], [[1.0, 2.0], [3.0, 4.0]])
    """
    raw = open_table(path, wanted.encoding, wanted.encoding_option)
    if wanted.named == ["text"]:
        raw = as_lines(raw, wanted.encoding, wanted.encoding_option)
    named = wanted.named
    if named and all(name.isdigit() for name in named) and _by_number(raw, named):
        raw = raw.without_header()
        raw.notes.append("no header line: columns were given by number")
    used, id_name = choose(path, raw.header, wanted)
    table = raw.take(used)
    notes: Json = {"reading": list(table.notes)} if table.notes else {}
    values: dict[str, Column] = {
        name: without_placeholders(name, table[name], notes) for name in dict.fromkeys(used)
    }
    return build_items(
        str(path),
        values,
        table.rows,
        kept=list(raw.header) if wanted.columns is None else list(wanted.columns),
        id_name=id_name,
        group_name=wanted.group_column,
        asked=wanted.columns is not None,
        folder=path.parent,
        rejections=table.rejections,
        notes=notes,
        id_given=wanted.id_column is not None,
    )


def _no_table(raw: RawTable) -> bool:
    """Whether a text file is texts alone, one a line: no column is called text, and no tab separates any."""
    return "text" not in map(column_key, raw.header) and not any(
        "\t" in field for row in (raw.header, *raw.rows[:100]) for field in row
    )


def as_lines(raw: RawTable, encoding: str | None = None, encoding_option: str = "--encoding") -> RawTable:
    """A ``.txt`` file without columns as a table: every line, from the first on, is a ``text``; others as they are."""
    path = raw.path
    if full_suffix(path) != ".txt" or not _no_table(raw):
        return raw
    lines = text_lines(decode(path, content_of(path), encoding, encoding_option))
    rejections = Rejections()
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    for number in sorted(set(range(1, len(lines) + 1)) - set(numbers)):
        rejections.add("blank line", number)
    rows = [[lines[number - 1]] for number in numbers]
    return RawTable(path, ["text"], rows, numbers, len(lines), 0, rejections, ["every line is a text"])


def _by_number(raw: RawTable, named: Sequence[str]) -> bool:
    """Whether names that are whole numbers are positions in a file without a header line."""
    if full_suffix(raw.path) in JSON_SUFFIXES:
        return False
    keys = {column_key(head) for head in raw.header}
    return not any(name in keys for name in named) and all(
        1 <= int(name) <= len(raw.header) for name in named
    )


def choose(
    path: Path,
    header: Sequence[str],
    wanted: Wanted,
    introduction: str = "Its header line has",
) -> tuple[dict[str, int], str | None]:
    """Where the wanted columns stand, and the name of the column of ids: that given, or one that is called ``id``."""
    repeated = [head for head, count in Counter(header).items() if count > 1]
    if wanted.columns is None and repeated:
        raise NearfarError(f"{path} has several columns called '{repeated[0]}': rename all but one.")
    if wanted.columns is None:
        used = {name: position for position, name in enumerate(header)}
    else:
        names = list(dict.fromkeys(wanted.columns))
        patterns = {name: _matching(name, header) for name in names if "*" in name and name not in header}
        plain = [name for name in names if not patterns.get(name)]
        used = _chosen(path, header, plain, wanted.naming, introduction)
        used.update({header[i]: i for positions in patterns.values() for i in positions})
    for name, option in ((wanted.id_column, wanted.id_naming), (wanted.group_column, wanted.group_naming)):
        if name is not None and name not in used:
            used.update(_chosen(path, header, [name], option, introduction))
    if wanted.id_column is not None:
        return used, wanted.id_column
    same = [position for position, head in enumerate(header) if column_key(head) in _IDS]
    if len(same) != 1:
        return used, None
    used.setdefault(header[same[0]], same[0])
    return used, header[same[0]]


def _matching(pattern: str, header: Sequence[str]) -> list[int]:
    """Positions of the columns that a name with ``*`` means."""
    return [i for i, head in enumerate(header) if fnmatchcase(column_key(head), column_key(pattern))]


def select(items: Items, wanted: Wanted) -> Items:
    """Items that were read whole, with the columns that are wanted under the names they were asked by."""
    header = list(items.columns)
    used, _ = choose(Path(items.source), header, wanted, "Its columns are")
    values = {name: items.columns[header[position]] for name, position in used.items()}
    kept = header if wanted.columns is None else dict.fromkeys(wanted.columns)
    rows = items.rows if items.rows is not None else list(range(1, len(items) + 1))
    groups = items.groups if wanted.group_column is None else _groups(values[wanted.group_column], rows)
    chosen = replace(items, columns={name: values[name] for name in kept}, groups=groups)
    if wanted.id_column is None:
        return chosen
    ids, reasons = _ids(items.source, wanted.id_column, values, rows, True, {})
    chosen = replace(chosen, ids=ids)
    return chosen if reasons is None else chosen.rejecting(wanted.id_column, reasons)


def _chosen(
    path: Path, header: Sequence[str], wanted: Sequence[str], naming: str, introduction: str
) -> dict[str, int]:
    how = naming + (
        ", or by number (1, 2, …) where there is no header line" if "header line" in introduction else ""
    )
    return choose_columns(
        path, header, {name: (name,) for name in wanted}, {n: n for n in wanted}, (), how, introduction
    )


# -- items ---------------------------------------------------------------------------------------------------
def build_items(
    source: str,
    values: Mapping[str, Column],
    rows: list[int],
    *,
    kept: Sequence[str],
    id_name: str | None = None,
    group_name: str | None = None,
    asked: bool = False,
    folder: Path | None = None,
    rejections: Rejections | None = None,
    notes: Json | None = None,
    id_given: bool = False,
    reasons: Mapping[str, Reasons] | None = None,
) -> Items:
    """Items of columns that were read as texts or numbers.

    Args:
        source: what they were read from, for messages.
        values: columns by name, with those of ids and groups.
        rows: line or row of each value.
        kept: the names of columns that items have.
        id_name, group_name: of ids and groups; without ids they are ``row2``, ….
        asked: ``kept`` was asked for by name: pictures none of which is there are an error.
        folder: where paths of pictures begin; None: no text is such a path.
        rejections, notes: of the reading, which go on.
        id_given: the column of ids was asked for: where it is none, that is an error.
        reasons: rows that were found wrong before, by column.
    """
    wrong: dict[str, Reasons] = dict(reasons or {})
    tally = rejections if rejections is not None else Rejections()
    about = dict(notes or {})
    columns: dict[str, Column] = {}
    for name in dict.fromkeys(kept):
        column, reason = values.get(name), None
        if column is None:
            names = list(values)
            column, reason = _side_by_side(
                source, name, {names[i]: values[names[i]] for i in _matching(name, names)}
            )
        elif isinstance(column, list):
            column, reason = typed(source, name, column, folder, asked, about)
        if reason is not None:
            wrong[name] = reason
        columns[name] = column
    ids, reason = _ids(source, id_name, values, rows, id_given, about)
    if id_name is not None and reason is not None:
        wrong[id_name] = reason
    groups = None if group_name is None else _groups(values[group_name], rows)
    items = Items(ids, columns, source, groups, rows, tally, about)
    usable: list[int] = []
    for i, row in enumerate(rows):
        bad = next((name for name, reason in wrong.items() if reason[i] is not None), None)
        if bad is None:
            usable.append(i)
            continue
        column = values.get(bad, "")
        value = column[i] if isinstance(column, list) else ""
        tally.add(str(wrong[bad][i]), row, value, f"column '{bad}'")
    if rows and not usable:
        raise NearfarError(f"{source}: none of its {len(rows)} rows is usable; {tally.summary()}.")
    return items if len(usable) == len(rows) else replace(items.take(usable), rejections=tally)


def _side_by_side(source: str, name: str, values: Mapping[str, Column]) -> tuple[Column, Reasons | None]:
    """Several columns of numbers as one of vectors (n, d): what lacks one number lacks the vector."""
    n = len(next(iter(values.values())))
    matrix = np.empty((n, len(values)), np.float32)
    reasons: Reasons = [None] * n
    for at, (each, column) in enumerate(values.items()):
        if isinstance(column, np.ndarray):
            if column.ndim != 1 or column.dtype.kind not in "fiub":
                raise NearfarError(
                    f"{source}: the columns '{name}' are to be numbers side by side, and '{each}' is none."
                )
            matrix[:, at] = column
            continue
        for i, value in enumerate(column):
            try:
                matrix[i, at] = np.nan if value is None else float(value)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                matrix[i, at], reasons[i] = np.nan, f"no number in '{each}'"
    if all(reason is not None for reason in reasons):
        raise NearfarError(
            f"{source}: the columns '{name}' are to be numbers side by side; row 1 has {reasons[0]}."
        )
    return matrix, reasons if any(reasons) else None


def _ids(
    source: str,
    name: str | None,
    values: Mapping[str, Column],
    rows: Sequence[int],
    given: bool,
    about: Json,
) -> tuple[list[str], Reasons | None]:
    """Ids that differ, and the rows that have none; rows by number where no column has such."""
    numbers = [f"row{row}" for row in rows]
    if name is None:
        return numbers, None
    column = values[name]
    if isinstance(column, np.ndarray) and column.ndim > 1:
        raise NearfarError(f"{source}: the column '{name}' holds vectors, which are no ids.")
    reasons: Reasons = []
    seen: set[str] = set()
    ids = ["" if value is None else str(value) for value in values[name]]
    for text in ids:
        reasons.append("no id" if not text else "repeated id" if text in seen else None)
        seen.add(text)
    wrong = sum(reason is not None for reason in reasons)
    if not wrong:
        return ids, None
    if not given:  # a column that happens to be called id, and is none
        about["ids"] = f"row numbers: {wrong} of {len(ids)} values of '{name}' are missing or repeated"
        return numbers, None
    if wrong > _REPEATS * len(ids):
        row = rows[next(i for i, reason in enumerate(reasons) if reason is not None)]
        raise NearfarError(
            f"{source}: {wrong} of {len(ids)} values of the id column '{name}' are missing or repeated (first: row "
            f"{row}), so they are no ids of rows. Give it as the group column, and leave ids to the numbers of rows."
        )
    return ids, reasons


def _groups(values: Column, rows: Sequence[int]) -> list[object]:
    """The group of each row; a row without one is by itself."""
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    return [
        f"without a group, row {row}" if value is None or value != value else value
        for value, row in zip(plain, rows, strict=True)
    ]
