"""Readers: the label field of UIT-ViSFD, one column per aspect, any table with a text column, Parquet included.

Each broken row costs one row, each label that cannot be read costs that label: both are counted, and the first of each
kind are kept for ``dataset_layout.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nearfar.data.rejections import Rejections
from nearfar.data.tables import Table, read_table, table_header
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.aspects.labels import ABSENT, UNKNOWN, parse_field, polarity_code
from nearfar.systems.aspects.records import Records

__all__ = ["TEXT_COLUMNS", "read_records"]

TEXT_COLUMNS = ("comment", "data", "text", "review", "content", "sentence", "body")
LABEL_COLUMNS = ("label", "labels", "aspects")
ID_COLUMNS = ("id", "review_id")
#: share of a column's filled cells that must be polarities for it to count as an aspect
ASPECT_SHARE = 0.5


def read_records(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    aspects: Sequence[str] | None = None,
    id_column: str | None = None,
) -> Records:
    """The reviews of a file.

    Args:
        path: CSV, TSV or Parquet.
        text_column: its header; found by the usual names where null.
        label_column: the column of ``{ASPECT#Polarity};…`` fields. Where null, a column called ``label`` whose fields
            have that form, else one column per aspect.
        aspects: the columns that are aspects; where null, those whose cells are polarities.
        id_column: its header; without one, rows are named after their line.

    Raises:
        NearfarError: an unreadable file, a missing column, no aspect column, no usable row.
    """
    path = Path(path)
    header = table_header(path)
    field = _label_column(header, label_column, aspects)
    wanted: dict[str, Sequence[str]] = {"text": TEXT_COLUMNS, "id": ID_COLUMNS}
    overrides = {"text": text_column, "id": id_column}
    if field is not None:
        wanted["label"] = [field]
        table = _read(path, wanted, overrides)
        return _from_field(path, table)
    found = _text_header(header, text_column)
    if aspects is not None:
        for aspect in aspects:
            if aspect.casefold() not in [head.strip().casefold() for head in header]:
                raise NearfarError(
                    f"{path} has no column {aspect!r} for that aspect; {nearest_name(aspect, header)}"
                )
        columns = [h for h in header if h.strip().casefold() in [a.casefold() for a in aspects]]
    else:
        columns = [head for head in header if head != found and head != id_column and head.strip()]
    wanted |= {f"aspect {i}": [head] for i, head in enumerate(columns)}
    return _from_columns(path, _read(path, wanted, overrides), columns, given=aspects is not None)


def _read(path: Path, wanted: dict[str, Sequence[str]], overrides: dict[str, str | None]) -> Table:
    return read_table(path, wanted, overrides, optional=("id",), naming="data.{name}_column=NAME")


def _label_column(header: Sequence[str], given: str | None, aspects: Sequence[str] | None) -> str | None:
    if given is not None:
        return given
    if aspects is not None and any(a.casefold() in [h.casefold() for h in header] for a in aspects):
        return None
    return next((head for head in header if head.strip().casefold() in LABEL_COLUMNS), None)


def _text_header(header: Sequence[str], given: str | None) -> str | None:
    if given is not None:
        return given
    lower = {head.strip().casefold(): head for head in header}
    return next((lower[name] for name in TEXT_COLUMNS if name in lower), None)


def _from_field(path: Path, table: Table) -> Records:
    rejections, unread_labels = table.rejections, Rejections()
    taken: list[tuple[str, dict[str, int], str]] = []
    unread_rows = 0
    for i, (text, label) in enumerate(zip(table["text"], table["label"], strict=True)):
        labels, unread = parse_field(label)
        unread_rows += bool(label.strip()) and not labels
        if not text.strip():
            rejections.add("empty text", table.rows[i])
            continue
        for part in unread:
            unread_labels.add("label that cannot be read", table.rows[i], part)
        taken.append((text, labels, _id(table, i)))
    if unread_rows > len(table) / 2:
        raise NearfarError(
            f"{path}: {unread_rows} of {len(table)} fields of column '{table.used['label']}' hold no label of the form "
            "{ASPECT#Polarity}. For one column per aspect give data.aspects=[NAME,NAME,…]."
        )
    return _records(path, table, taken, "label field", unread_labels)


def _from_columns(path: Path, table: Table, columns: Sequence[str], given: bool) -> Records:
    rejections, unread = table.rejections, Rejections()
    cells = {head: [polarity_code(value) for value in table[f"aspect {i}"]] for i, head in enumerate(columns)}
    words = {head: Counter(table[f"aspect {i}"]) for i, head in enumerate(columns)}
    aspects = [head for head in columns if given or _is_aspect(cells[head])]
    for head in columns:
        if head not in aspects:
            first = ", ".join(repr(word) for word, _ in words[head].most_common(3))
            unread.add("column that is no aspect", None, head, f"its commonest values are {first}")
    if not aspects:
        raise NearfarError(
            f"{path} has no column of polarities (Positive, Negative, Neutral, or empty), and none called label with "
            "{ASPECT#Polarity} fields. Name the columns with data.aspects=[NAME,NAME,…]."
        )
    where = {head: i for i, head in enumerate(columns)}
    taken = []
    for i, text in enumerate(table["text"]):
        if not text.strip():
            rejections.add("empty text", table.rows[i])
            continue
        labels = {head.strip(): cells[head][i] for head in aspects if cells[head][i] != ABSENT}
        for head in aspects:
            if cells[head][i] == UNKNOWN:
                value = f"{head}: {table[f'aspect {where[head]}'][i]}"
                unread.add("polarity that is none", table.rows[i], value)
        taken.append((text, labels, _id(table, i)))
    return _records(path, table, taken, "one column per aspect", unread)


def _is_aspect(codes: Sequence[int]) -> bool:
    filled = [code for code in codes if code != ABSENT]
    return bool(filled) and sum(code != UNKNOWN for code in filled) > ASPECT_SHARE * len(filled)


def _id(table: Table, i: int) -> str:
    return table["id"][i] if "id" in table and table["id"][i].strip() else str(table.rows[i])


def _records(
    path: Path, table: Table, taken: list[tuple[str, dict[str, int], str]], layout: str, unread: Rejections
) -> Records:
    if not taken:
        raise NearfarError(
            f"{path}: none of its {table.n_rows} rows is usable; {table.rejections.summary()}."
        )
    texts, labels, ids = (list(part) for part in zip(*taken, strict=True))
    return Records(str(path), texts, labels, ids, table.n_rows, layout, table.rejections, unread)
