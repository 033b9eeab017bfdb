"""Readers of tables of reviews: label fields, one column per aspect, one row per label.

A broken row is rejected, a label that cannot be read is left out: both are counted, and the first of each kind are kept
for ``dataset_layout.json``. The cells decide which layout a table has; a table whose labels cannot be read is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from nearfar.data.delimited import decode
from nearfar.data.rejections import Rejections
from nearfar.data.reviews.corpora import (
    CORPORA,
    CORPUS_SUFFIXES,
    Sentence,
    corpus_kind,
    group_sentences,
    read_xml,
    require_polarities,
)
from nearfar.data.reviews.labels import (
    ABSENT,
    UNKNOWN,
    mostly_polarities,
    parse_field,
    polarities_advice,
    polarity_code,
)
from nearfar.data.reviews.records import Records
from nearfar.data.table_formats import content_of, full_suffix
from nearfar.data.tables import (
    TABLE_SUFFIXES,
    RawTable,
    choose_columns,
    column_key,
    is_placeholder,
    open_table,
    require_file,
)
from nearfar.errors import NearfarError, nearest_name

__all__ = ["ID_COLUMNS", "TEXT_COLUMNS", "Reading", "read_records"]

TEXT_COLUMNS = (
    *("comment", "data", "text", "review", "content", "sentence", "body"),
    *("review_text", "reviews", "raw_text", "sentences"),
)
LABEL_COLUMNS = ("label", "labels", "aspects", "opinions", "aspect_sentiments")
ASPECT_COLUMNS = ("aspect", "aspect_category", "category", "aspect_term", "term", "target", "entity")
POLARITY_COLUMNS = ("polarity", "sentiment", "aspect_polarity", "aspect_sentiment", "label", "class")
ID_COLUMNS = ("id", "review_id", "sentence_id")
_NO_ASPECT = frozenset(("", "null", "none", "nan", "noaspectterm", "n/a", "-"))
#: names of columns of 0 and 1, and what these hold
_INDICATOR = re.compile(r"(.+?)[\W_]+(?:pos|positive|neg|negative|neu|neutral)", re.IGNORECASE)
_INDICATOR_VALUES = frozenset(("", "0", "1", "0.0", "1.0", "true", "false"))


@dataclass(frozen=True)
class _Options:
    text: str | None
    label: str | None
    aspect: str | None
    polarity: str | None
    identity: str | None
    aspects: Sequence[str] | None
    words: Mapping[str, int] | None

    def code(self, cell: str) -> int:
        return polarity_code(cell, self.words)


class Reading(TypedDict, total=False):
    """Columns and encoding of a file of reviews: keyword arguments of `read_records`."""

    text_column: str | None
    label_column: str | None
    aspect_column: str | None
    polarity_column: str | None
    id_column: str | None
    encoding: str | None


def read_records(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    aspect_column: str | None = None,
    polarity_column: str | None = None,
    aspects: Sequence[str] | None = None,
    id_column: str | None = None,
    polarities: Mapping[str, int] | None = None,
    encoding: str | None = None,
) -> Records:
    """The reviews of a file.

    Args:
        path: a table (`open_table`), XML of SemEval or MAMS, or one of the text corpora in `CORPORA`.
        text_column: its header; null: one of the usual names.
        label_column: the column of fields that hold all labels of a review (`parse_field`). Where null, a column called
            ``label`` whose fields have one of those forms.
        aspect_column, polarity_column: of a table with a row for each label of a review. Where null, columns with the
            usual names whose cells are polarities, and none. In XML ``aspect_column`` says what counts as the aspect:
            ``category`` (where there are any) or ``term``.
        aspects: the columns that are aspects; where null, those whose cells are polarities.
        id_column: its header; without one, rows are named after their line.
        polarities: codes of further words or numbers, see `code_words`.
        encoding: of text files; null: UTF-8, or UTF-16 with its mark.

    Raises:
        NearfarError: an unreadable file, a missing column, labels that cannot be read, no usable row.
    """
    path = Path(path)
    options = _Options(
        text_column, label_column, aspect_column, polarity_column, id_column, aspects, polarities
    )
    require_file(path)
    suffix = full_suffix(path)
    if suffix == ".xml":
        sentences, layout, rejections = read_xml(path, aspect_column, polarities)
        require_polarities(path, sentences, polarities)
        return group_sentences(path, sentences, layout, rejections)
    if suffix in CORPUS_SUFFIXES:
        text = decode(path, content_of(path), encoding, "data.encoding")
        if kind := corpus_kind(text):
            sentences, rejections = CORPORA[kind](text, polarities)
            require_polarities(path, sentences, polarities)
            return group_sentences(path, sentences, kind, rejections)
        if suffix not in TABLE_SUFFIXES:
            raise NearfarError(
                f"{path}: its lines are none of {', '.join(CORPORA)}. A table is called .csv, .tsv or .txt."
            )
    raw = open_table(path, encoding, "data.encoding")
    if label_column is not None:
        return _from_field(raw, options, label_column)
    if aspect_column is not None or polarity_column is not None:
        return _from_rows(raw, options)
    heads = [column_key(head) for head in raw.header]
    if aspects is not None and any(column_key(aspect) in heads for aspect in aspects):
        return _from_columns(raw, options)
    fields = [head for head in raw.header if column_key(head) in LABEL_COLUMNS]
    for head in fields:
        if _is_field(raw.column(raw.header.index(head)), polarities):
            return _from_field(raw, options, head)
    if _has_row_per_label(raw, options):
        return _from_rows(raw, options)
    if fields and any(raw.column(raw.header.index(fields[0]))):
        return _from_field(raw, options, fields[0])
    return _from_columns(raw, options)


# -- fields that hold all labels of a review -----------------------------------------------------------------
def _is_field(cells: Sequence[str], words: Mapping[str, int] | None) -> bool:
    filled = [cell for cell in cells if cell.strip()][:1000]
    return bool(filled) and sum(bool(parse_field(cell, words)[0]) for cell in filled) > len(filled) / 2


def _from_field(raw: RawTable, options: _Options, column: str) -> Records:
    reader = _Reader(raw, options, {"label": [column]}, {"label": column})
    labels = reader.column("label")
    unread_rows, first = 0, ""
    for i in reader.usable():
        parsed, unread = parse_field(labels[i], options.words)
        if labels[i].strip() and not any(code != UNKNOWN for code in parsed.values()) and unread:
            unread_rows, first = unread_rows + 1, first or labels[i]
        for part in unread:
            reader.unread.add("label that cannot be read", raw.numbers[i], part)
        reader.add(i, parsed)
    filled = sum(bool(cell.strip()) for cell in labels)
    if unread_rows > filled / 2:
        raise NearfarError(
            f"{raw.path}: {unread_rows} of {filled} fields of column '{reader.used['label']}' hold no label of the "
            f"form {{ASPECT#Polarity}} or {{ASPECT, polarity}} (first: {first[:80]!r}). "
            + _advice_for_field(reader, labels, options)
        )
    return reader.records("label field")


def _advice_for_field(reader: _Reader, cells: Sequence[str], options: _Options) -> str:
    """Advice for a table whose label column has no fields of labels."""
    raw, head = reader.raw, reader.used["label"]
    others = [i for i, name in enumerate(raw.header) if name not in reader.used.values()]
    aspects = [
        raw.header[i] for i in others if mostly_polarities([options.code(cell) for cell in raw.column(i)])
    ]
    if any("{" in cell for cell in cells):
        # Fields of the right form with unknown words, behind the last separator.
        parts = [part for cell in cells for part in parse_field(cell, options.words)[1]]
        tails = [part.replace(",", "#").rsplit("#", 1)[-1].strip() for part in parts]
        return polarities_advice([word for word, _ in Counter(tails).most_common(8)], options.words)
    if aspects:
        return (
            f"Columns of polarities are there: 'data.aspects=[{','.join(aspects)}]' takes each as an aspect."
        )
    rows = f"data.aspect_column=NAME 'data.polarity_column={head}'"
    if mostly_polarities([options.code(cell) for cell in cells]):
        return (
            f"They are polarities of no aspect: 'data.aspects=[{head}]' takes them as one aspect called {head}; where "
            f"a column names the aspect of each row, give {rows}."
        )
    return (
        f"Where a column names the aspect of each row, give {rows}; where each aspect has a column, "
        "data.aspects=[NAME,NAME,…]."
    )


# -- one column per aspect -----------------------------------------------------------------------------------
def _from_columns(raw: RawTable, options: _Options) -> Records:
    reader = _Reader(raw, options)
    others = {reader.used_position("text"), reader.used_position("id")}
    positions = [i for i, head in enumerate(raw.header) if i not in others and head.strip()]
    if options.aspects is not None:
        keys = {column_key(aspect): aspect for aspect in options.aspects}
        for key, aspect in keys.items():
            if key not in [column_key(head) for head in raw.header]:
                raise NearfarError(
                    f"{raw.path} has no column {aspect!r} for that aspect; {nearest_name(aspect, raw.header)}"
                )
        positions = [i for i, head in enumerate(raw.header) if column_key(head) in keys]
    names = Counter(column_key(raw.header[i]) for i in positions)
    cells = {i: raw.column(i) for i in positions}
    codes = {i: [options.code(value) for value in cells[i]] for i in positions}
    aspects = [i for i in positions if mostly_polarities(codes[i])]
    _require_readable(raw, options, positions, aspects, cells, codes)
    for i in aspects:
        if names[column_key(raw.header[i])] > 1:
            raise NearfarError(f"{raw.path} has two columns {raw.header[i]!r}; rename one or leave it out.")
    for i in positions:
        if i not in aspects and options.aspects is None:
            words = (
                f"its commonest values are {', '.join(repr(w) for w, _ in Counter(cells[i]).most_common(3))}"
            )
            if _are_codes([cell for cell in cells[i] if cell.strip()]):
                words += "; if these are polarities, say so with data.polarities={NUMBER: MEANING, …}"
            reader.unread.add("column that is no aspect", None, raw.header[i], words)
    if options.aspects is not None:
        aspects = positions
    for i in reader.usable():
        labels = {raw.header[a].strip(): codes[a][i] for a in aspects if codes[a][i] != ABSENT}
        for a in aspects:
            if codes[a][i] == UNKNOWN:
                value = f"{raw.header[a]}: {cells[a][i]}"
                reader.unread.add("polarity that is none", raw.numbers[i], value)
        reader.add(i, labels)
    return reader.records("one column per aspect")


def _require_readable(
    raw: RawTable,
    options: _Options,
    positions: Sequence[int],
    aspects: Sequence[int],
    cells: Mapping[int, Sequence[str]],
    codes: Mapping[int, Sequence[int]],
) -> None:
    """Raise where columns that are aspects, or look like aspects, hold unknown values."""
    if options.aspects is None:
        _refuse_indicators(raw, positions, cells)
    unknown = {i: _unknown_values(cells[i], codes[i]) for i in positions if i not in aspects}
    if options.aspects is not None:
        unreadable = [i for i in unknown if unknown[i]]
    else:
        coded = [i for i in unknown if _are_codes(unknown[i])]
        # One or two columns of numbers beside aspects in words may be ratings of the review. In more columns, or
        # without aspects in words, numbers must be labels.
        unreadable = coded if not aspects or len(coded) > 2 else []
    if unreadable:
        names = ", ".join(repr(raw.header[i]) for i in unreadable[:6]) + (
            ", …" if len(unreadable) > 6 else ""
        )
        values = list(dict.fromkeys(value for i in unreadable for value in unknown[i]))
        shown = ", ".join(repr(value) for value in sorted(values)[:12])
        only = (
            ""
            if options.aspects is not None
            else " Columns that are no aspects are left out by data.aspects=[NAME,NAME,…]."
        )
        raise NearfarError(
            f"{raw.path}: {'column' if len(unreadable) == 1 else 'columns'} {names}: most values are no polarities "
            f"({shown}). {polarities_advice(values, options.words)}{only}"
        )
    if not aspects and options.aspects is None:
        usual = ", ".join(repr(head) for head in raw.header[:12])
        raise NearfarError(
            f"{raw.path} has no column of polarities (Positive, Negative, Neutral, or empty), none called label with "
            "{ASPECT#Polarity} fields, and no aspect and polarity columns. Its columns are "
            f"{usual}. Name the columns of aspects with data.aspects=[NAME,NAME,…], or, where each row is one label, "
            "those of aspect and polarity with data.aspect_column=NAME data.polarity_column=NAME."
        )
    if len(aspects) == 1 and options.aspects is None:
        _refuse_hidden_rows(raw, aspects[0], positions, cells)


def _refuse_indicators(raw: RawTable, positions: Sequence[int], cells: Mapping[int, Sequence[str]]) -> None:
    """Refuse columns of 0 and 1 called food_positive, food_negative: pairs of aspect and polarity, not aspects."""
    by_aspect: dict[str, list[str]] = {}
    for i in positions:
        match = _INDICATOR.fullmatch(raw.header[i].strip())
        if match and {cell.strip().casefold() for cell in cells[i]} <= _INDICATOR_VALUES:
            by_aspect.setdefault(match[1].casefold(), []).append(raw.header[i])
    if pairs := next((names for names in by_aspect.values() if len(names) > 1), None):
        raise NearfarError(
            f"{raw.path}: columns {', '.join(map(repr, pairs))} are one aspect by their names, a column of 0 and 1 for "
            "each polarity, which is not read. Make one column of each aspect, with the words positive, negative or "
            "neutral, and empty where it is not mentioned."
        )


def _refuse_hidden_rows(
    raw: RawTable, polarity: int, positions: Sequence[int], cells: Mapping[int, Sequence[str]]
) -> None:
    """Refuse one column of polarities where texts repeat and a further column changes: rows are labels, not reviews."""
    texts = choose_columns(raw.path, raw.header, {"text": TEXT_COLUMNS}, {}, ("text",), "")
    if "text" not in texts:
        return
    counted = Counter(raw.column(texts["text"]))
    if len(counted) > 0.8 * len(raw):
        return
    repeated = [i for i, text in enumerate(raw.column(texts["text"])) if counted[text] > 1]
    for i in positions:
        values = {cells[i][row] for row in repeated}
        pairs = {(raw.rows[row][texts["text"]], cells[i][row]) for row in repeated}
        if i != polarity and 1 < len(values) <= len(repeated) / 2 and len(pairs) > 0.9 * len(repeated):
            name, head = raw.header[i], raw.header[polarity]
            raise NearfarError(
                f"{raw.path}: {len(repeated)} rows repeat a text while '{name}' changes, and '{head}' is the only "
                f"column of polarities: is each row one label? Then give 'data.aspect_column={name}' "
                f"'data.polarity_column={head}'; if '{head}' is an aspect, give 'data.aspects=[{head}]'."
            )


def _unknown_values(cells: Sequence[str], codes: Sequence[int]) -> list[str]:
    """The different values of a column that are no polarities, where most of its values are none."""
    if mostly_polarities(codes):
        return []
    return list(
        dict.fromkeys(cell.strip() for cell, code in zip(cells, codes, strict=True) if code == UNKNOWN)
    )


def _are_codes(values: Sequence[str]) -> bool:
    """Whether values look like numbers for polarities: few whole ones between -5 and 5."""
    try:
        numbers = {float(value) for value in values}
    except ValueError:
        return False
    return 2 <= len(numbers) <= 7 and all(n.is_integer() and abs(n) <= 5 for n in numbers)


# -- one row per label ---------------------------------------------------------------------------------------
def _has_row_per_label(raw: RawTable, options: _Options) -> bool:
    """Whether a table has an aspect and a polarity column, by their names and by their cells."""
    wanted = {"aspect": ASPECT_COLUMNS, "polarity": POLARITY_COLUMNS}
    used = choose_columns(raw.path, raw.header, wanted, {}, tuple(wanted), "data.{name}_column=NAME")
    if len(used) < 2 or used["aspect"] == used["polarity"]:
        return False
    aspects, polarities = raw.column(used["aspect"]), raw.column(used["polarity"])
    if mostly_polarities([options.code(cell) for cell in aspects]) or _is_field(polarities, options.words):
        return False
    codes = [options.code(cell) for cell in polarities]
    if mostly_polarities(codes) or _are_codes([cell for cell in polarities if cell.strip()]):
        others = [i for i in range(len(raw.header)) if i not in used.values()]
        wide = sum(mostly_polarities([options.code(cell) for cell in raw.column(i)]) for i in others)
        return wide < 2
    return len(set(polarities)) <= 12


def _from_rows(raw: RawTable, options: _Options) -> Records:
    wanted = {"aspect": ASPECT_COLUMNS, "polarity": POLARITY_COLUMNS}
    overrides = {"aspect": options.aspect, "polarity": options.polarity}
    reader = _Reader(raw, options, wanted, overrides)
    aspects, polarities = reader.column("aspect"), reader.column("polarity")
    codes = [options.code(cell) for cell in polarities]
    if unknown := _unknown_values(polarities, codes):
        shown = ", ".join(repr(value) for value in sorted(unknown)[:12])
        raise NearfarError(
            f"{raw.path}: most values of column '{reader.used['polarity']}' are no polarities ({shown}). "
            + polarities_advice(unknown, options.words)
        )
    sentences = []
    for i in reader.usable():
        aspect = " ".join(aspects[i].split())
        named = aspect.casefold() not in _NO_ASPECT
        if named and codes[i] in (UNKNOWN, ABSENT):
            word = polarities[i].strip() or "empty"
            reader.unread.add("polarity that is none", raw.numbers[i], f"{aspect}: {word}")
        label = [(aspect, codes[i] if codes[i] != ABSENT else UNKNOWN)] if named else []
        sentences.append(Sentence(reader.texts[i], label, reader.identity(i), raw.numbers[i]))
    layout = f"one row per label (aspect: {reader.used['aspect']}, polarity: {reader.used['polarity']})"
    records = group_sentences(raw.path, sentences, layout, raw.rejections, raw.n_rows, reader.unread)
    records.notes[:0] = raw.notes
    return records


# -- what all layouts share ----------------------------------------------------------------------------------
class _Reader:
    """Collects the reviews of a table: texts, ids, further columns by name."""

    def __init__(
        self,
        raw: RawTable,
        options: _Options,
        further: Mapping[str, Sequence[str]] | None = None,
        overrides: Mapping[str, str | None] | None = None,
    ) -> None:
        wanted: dict[str, Sequence[str]] = {"text": TEXT_COLUMNS, "id": ID_COLUMNS, **(further or {})}
        given = {"text": options.text, "id": options.identity, **(overrides or {})}
        naming = "data.{name}_column=NAME"
        self.raw = raw
        self._used = choose_columns(raw.path, raw.header, wanted, given, ("id",), naming)
        self._table = raw.take(self._used)
        self.used = self._table.used
        self.texts = self._table["text"]
        self.unread = Rejections()
        self._taken: list[tuple[str, dict[str, int], str]] = []

    def column(self, name: str) -> list[str]:
        return self._table[name]

    def used_position(self, name: str) -> int | None:
        return self._used.get(name)

    def identity(self, i: int) -> str:
        named = "id" in self._table and self._table["id"][i].strip()
        return self._table["id"][i] if named else str(self.raw.numbers[i])

    def usable(self) -> list[int]:
        """Positions of rows with a text; the others are counted."""
        good = []
        for i, text in enumerate(self.texts):
            if not text.strip() or is_placeholder(text):
                self.raw.rejections.add("empty text", self.raw.numbers[i], text)
            else:
                good.append(i)
        return good

    def add(self, i: int, labels: dict[str, int]) -> None:
        self._taken.append((self.texts[i], labels, self.identity(i)))

    def records(self, layout: str) -> Records:
        raw = self.raw
        if not self._taken:
            raise NearfarError(
                f"{raw.path}: none of its {raw.n_rows} rows is usable; {raw.rejections.summary()}."
            )
        texts, labels, ids = (list(part) for part in zip(*self._taken, strict=True))
        return Records(
            str(raw.path),
            texts,
            labels,
            ids,
            raw.n_rows,
            layout,
            raw.rejections,
            self.unread,
            list(raw.notes),
        )
