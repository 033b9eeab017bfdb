"""Tables as items: texts, numbers, vectors and paths of pictures, told apart by the values of a whole column."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.data.items import Column, Items
from nearfar.data.rejections import Rejections
from nearfar.data.table_formats import JSON_SUFFIXES, full_suffix
from nearfar.data.tables import RawTable, choose_columns, column_key, is_placeholder, open_table
from nearfar.errors import NearfarError

__all__ = [
    "PICTURE_SUFFIXES",
    "Wanted",
    "build_items",
    "choose",
    "select",
    "stack_vectors",
    "table_items",
    "without_placeholders",
]

PICTURE_SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".avif",
        ".jp2",
        ".ppm",
        ".pgm",
    )
)
"""How files of pictures end, in small letters."""
_MOST = 0.9  # the share of a column's values that decides what all of them are
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


Reasons = list[str | None]
"""For each row why it is rejected, or None."""


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
    named = wanted.named
    if named and all(name.isdigit() for name in named) and _by_number(raw, named):
        raw = raw.without_header()
        raw.notes.append("no header line: columns were given by number")
    used, id_name = choose(path, raw.header, wanted)
    table = raw.take(used)
    notes: dict[str, Any] = {"reading": list(table.notes)} if table.notes else {}
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
        used = _chosen(path, header, names, wanted.naming, introduction)
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


def without_placeholders(name: str, values: Sequence[Any], notes: dict[str, Any]) -> list[Any]:
    """Texts without blanks around them; empty ones, and words for *missing*, are None."""
    texts: list[Any] = []
    words: Counter[str] = Counter()
    for value in values:
        if not isinstance(value, str):
            texts.append(value)
            continue
        text = value.strip()
        if text and is_placeholder(text):
            words[text] += 1
            text = ""
        texts.append(text or None)
    if words:
        notes.setdefault("words for missing", {})[name] = dict(words)
    return texts


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
    notes: dict[str, Any] | None = None,
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
        column, reason = values[name], None
        if isinstance(column, list):
            column, reason = _typed(source, name, column, folder, asked, about)
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
        value = values[bad][i] if isinstance(values[bad], list) else ""
        tally.add(str(wrong[bad][i]), row, value, f"column '{bad}'")
    if rows and not usable:
        raise NearfarError(f"{source}: none of its {len(rows)} rows is usable; {tally.summary()}.")
    return items if len(usable) == len(rows) else replace(items.take(usable), rejections=tally)


def _ids(
    source: str,
    name: str | None,
    values: Mapping[str, Column],
    rows: Sequence[int],
    given: bool,
    about: dict[str, Any],
) -> tuple[list[str], Reasons | None]:
    """Ids that differ, and the rows that have none; rows by number where no column has such."""
    numbers = [f"row{row}" for row in rows]
    if name is None:
        return numbers, None
    if isinstance(values[name], np.ndarray) and np.ndim(values[name]) > 1:
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


def _groups(values: Column, rows: Sequence[int]) -> list[Any]:
    """The group of each row; a row without one is by itself."""
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    return [
        f"without a group, row {row}" if value is None or value != value else value
        for value, row in zip(plain, rows, strict=True)
    ]


# -- what a column of texts is -------------------------------------------------------------------------------
def _typed(
    source: str, name: str, values: list[Any], folder: Path | None, asked: bool, about: dict[str, Any]
) -> tuple[Column, Reasons | None]:
    """A column of texts as vectors or paths of pictures, where nearly all of its values are such."""
    texts = [value for value in values if isinstance(value, str)]
    if not texts:
        return values, None
    if sum(text[:1] == "[" and text[-1:] == "]" for text in texts) >= _MOST * len(texts):
        return _listed(values, name, about)
    pictures = sum(os.path.splitext(text)[1].lower() in PICTURE_SUFFIXES for text in texts)
    if folder is not None and pictures >= _MOST * len(texts):
        return _pictures(source, name, values, folder, asked, about)
    return values, None


def _listed(values: list[Any], name: str, about: dict[str, Any]) -> tuple[Column, Reasons | None]:
    """Texts in square brackets: lists of numbers are vectors, lists of words are texts joined by ``; ``."""
    vectors: list[np.ndarray | None] = []
    reasons: Reasons = []
    for value in values:
        vector = _numbers(value) if value is not None else None
        vectors.append(vector)
        reasons.append("no list of numbers" if value is not None and vector is None else None)
    wrong = sum(reason is not None for reason in reasons)
    if wrong <= (1 - _MOST) * sum(value is not None for value in values):
        column, lengths = stack_vectors(vectors)
        both = [a or b for a, b in zip(reasons, lengths or [None] * len(reasons), strict=True)]
        return column, both if any(both) else None
    lists = [_words(value) if isinstance(value, str) else None for value in values]
    if all(words is not None for words, value in zip(lists, values, strict=True) if value is not None):
        about.setdefault("lists joined by '; '", []).append(name)
        return [None if not words else "; ".join(words) for words in lists], None
    return values, None


def _numbers(text: str) -> np.ndarray | None:
    parts = re.split(r"[,\s]+", text.strip()[1:-1].strip())
    try:
        return np.array([float(part) for part in parts if part], dtype=np.float32)
    except ValueError:
        return None


def _words(text: str) -> list[str] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(word, str) for word in value) else None


def stack_vectors(vectors: Sequence[np.ndarray | None]) -> tuple[Column, Reasons | None]:
    """Vectors of one length as an array, missing ones as NaN; rows of a length that few have get a reason.

    Where less than nine in ten are of one length, they are no vectors of features and stay a list.

    >>> column, reasons = stack_vectors([np.ones(2, np.float32)] * 9 + [np.ones(3, np.float32)])
    >>> column.shape, reasons[-1]
    ((10, 2), 'not 2 numbers')
    """
    lengths = Counter(vector.shape for vector in vectors if vector is not None)
    if not lengths:
        return [None] * len(vectors), None
    shape, count = lengths.most_common(1)[0]
    if count < _MOST * sum(lengths.values()) or not np.prod(shape):
        return list(vectors), None
    complete = all(vector is not None and vector.shape == shape for vector in vectors)
    types = [vector.dtype for vector in vectors if vector is not None]
    dtype = np.result_type(*set(types)) if complete else np.result_type(np.float32, *set(types))
    column = np.full((len(vectors), *shape), 0 if complete else np.nan, dtype)
    reasons: Reasons = []
    words = " × ".join(map(str, shape))
    for i, vector in enumerate(vectors):
        fits = vector is not None and vector.shape == shape
        if fits:
            column[i] = vector
        reasons.append(None if fits or vector is None else f"not {words} numbers")
    return column, reasons if any(reasons) else None


def _pictures(
    source: str, name: str, values: list[Any], folder: Path, asked: bool, about: dict[str, Any]
) -> tuple[Column, Reasons | None]:
    """Paths of pictures that are on disk; the others get a reason."""
    known: dict[str, str | None] = {None: None}  # type: ignore[dict-item]
    for value in values:
        if value not in known:
            known[value] = _picture(value, folder)
    paths = [known[value] for value in values]
    missing = [value for value in values if value is not None and known[value] is None]
    if missing and not any(paths):
        shown = f"'{missing[0]}'"
        if not asked:
            about.setdefault("pictures that are not here", []).append(name)
            return values, None
        if "://" in missing[0]:
            raise NearfarError(
                f"{source}: the column '{name}' holds addresses ({shown}): load the pictures to disk and "
                "name the files."
            )
        raise NearfarError(
            f"{source}: none of the {len(missing)} pictures of the column '{name}' is here ({shown} …); they are "
            f"sought in {folder} and in {folder / 'images'}. Put them there, or write their full paths into the table."
        )
    reasons: Reasons = [
        "no such picture" if value is not None and path is None else None
        for value, path in zip(values, paths, strict=True)
    ]
    return paths, reasons if missing else None


def _picture(value: str, folder: Path) -> str | None:
    """The file that a path in a table means: as it is, below the table's folder, or below ``images/`` there.

    Paths of other machines and systems lose leading folders until a file is met.
    """
    parts = [part for part in value.replace("\\", "/").split("/") if part not in ("", ".")]
    tries = [value, *("/".join(parts[skipped:]) for skipped in range(len(parts)))]
    roots = (folder, folder / "images")
    paths = (os.path.join(root, part) for part in tries for root in roots)  # an absolute path stays as it is
    try:
        return next((path for path in paths if os.path.isfile(path)), None)
    except ValueError:  # a NUL in a path
        return None
