"""What a column of texts is: texts, vectors or paths of pictures, by nine in ten of its values."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.data.tables import is_placeholder
from nearfar.errors import NearfarError

__all__ = ["PICTURE_SUFFIXES", "Reasons", "stack_vectors", "typed", "without_placeholders"]

PICTURE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".webp"),
        *(".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm"),
    )
)
"""How files of pictures end, in small letters."""
_MOST = 0.9  # the share of a column's values that decides what all of them are

Reasons = list[str | None]
"""For each row why it is rejected, or None."""


def without_placeholders(name: str, values: Sequence[object], notes: Json) -> list[object]:
    """Texts without blanks around them; empty ones, and words for *missing*, are None."""
    texts: list[object] = []
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


def typed(
    source: str, name: str, values: Sequence[object], folder: Path | None, asked: bool, about: Json
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


def _listed(values: Sequence[object], name: str, about: Json) -> tuple[Column, Reasons | None]:
    """Texts in square brackets: lists of numbers are vectors, lists of words are texts joined by ``; ``."""
    vectors: list[np.ndarray | None] = []
    reasons: Reasons = []
    for value in values:
        vector = _numbers(str(value)) if value is not None else None
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
    source: str, name: str, values: Sequence[object], folder: Path, asked: bool, about: Json
) -> tuple[Column, Reasons | None]:
    """Paths of pictures that are on disk; the others get a reason."""
    known: dict[object, str | None] = {None: None}
    for value in values:
        if value not in known:
            known[value] = _picture(str(value), folder)
    paths = [known[value] for value in values]
    missing = [value for value in values if value is not None and known[value] is None]
    if missing and not any(paths):
        shown = f"'{missing[0]}'"
        if not asked:
            about.setdefault("pictures that are not here", []).append(name)
            return values, None
        if "://" in str(missing[0]):
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
