"""Labels of items, one or several each, as codes that all splits share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from nearfar.errors import NearfarError
from nearfar.labels import is_missing

if TYPE_CHECKING:
    from nearfar.data.items import Column

__all__ = ["Classes", "class_codes", "item_labels"]

Labels = tuple[str, ...]


def item_labels(values: Column, name: str = "label", separator: str | None = ";") -> list[Labels]:
    """The labels of each item as texts; none where they are missing (None, NaN, −1, an empty cell or list).

    A value is a text, a whole number, or a list of these; ``separator`` parts several labels in one text.

    Raises:
        NearfarError: numbers with fractions, which are no classes, and values that are neither.

    >>> item_labels(["cat; dog", " cat ", None, ""]), item_labels(np.array([2.0, np.nan, -1.0]))
    ([('cat', 'dog'), ('cat',), (), ()], [('2',), (), ()])
    """
    listed = values.tolist() if isinstance(values, np.ndarray) else values
    return [tuple(dict.fromkeys(_of(value, name, separator))) for value in listed]


def _of(value: object, name: str, separator: str | None) -> list[str]:
    if isinstance(value, (list, tuple, set, np.ndarray)):
        return [label for each in value for label in _of(each, name, separator)]
    if is_missing(value):
        return []
    if isinstance(value, str):
        parts = [value] if separator is None else value.split(separator)
        return [part.strip() for part in parts if not is_missing(part)]
    if isinstance(value, (bool, int, np.integer, np.bool_)):
        return [str(value)]
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return [str(int(value))]
    raise NearfarError(
        f"{name}: {value!r} is no class; texts or whole numbers are needed. Name the column of classes with label=."
    )


@dataclass(frozen=True)
class Classes:
    """The classes of all splits by number, first those of training in order, then those that training lacks.

    ``codes``: by split the class of each item (n,), −1 where it is missing, or with ``several`` labels an item a row of
    0 and 1 (n, classes). ``known``: how many classes training has.
    """

    names: list[str]
    known: int
    codes: dict[str, Int[np.ndarray, " n"] | Int[np.ndarray, "n classes"]]
    several: bool

    @property
    def counts(self) -> Int[np.ndarray, " known"]:
        """Training items of each class that training has."""
        codes = self.codes["train"]
        if self.several:
            return np.asarray(codes.sum(0)[: self.known])
        return np.bincount(codes[codes >= 0], minlength=self.known)

    def lacking(self, split: str) -> int:
        """Items of a split with no class that training has; those without any label are not counted."""
        codes = self.codes[split]
        if self.several:
            return int(((codes[:, : self.known].sum(1) == 0) & (codes.sum(1) > 0)).sum())
        return int((codes >= self.known).sum())


def class_codes(labels: Mapping[str, Sequence[Labels]], several: bool) -> Classes:
    """Codes of the labels of every split; ``train`` is among them.

    Raises:
        NearfarError: an item with several labels where one each is needed.

    >>> classes = class_codes({"train": [("b",), ("a",), ()], "val": [("c",), ("a",)]}, several=False)
    >>> classes.names, classes.known, classes.codes["train"].tolist(), classes.codes["val"].tolist()
    (['a', 'b', 'c'], 2, [1, 0, -1], [2, 0])
    """
    count: Counter[str] = Counter(label for each in labels["train"] for label in each)
    names = _ordered(count)
    others = {label for part in labels.values() for each in part for label in each} - set(names)
    known, names = len(names), names + _ordered(others)
    number = {name: i for i, name in enumerate(names)}
    codes: dict[str, np.ndarray] = {}
    for split, part in labels.items():
        if several:
            rows = np.zeros((len(part), len(names)), np.int64)
            for i, each in enumerate(part):
                rows[i, [number[label] for label in each]] = 1
            codes[split] = rows
            continue
        most = max(part, key=len, default=())
        if len(most) > 1:
            raise NearfarError(
                f"an item of {split} has the labels {', '.join(most)}, and one each is needed: take loss=multilabel or "
                "loss=cross_entropy; or data.separator=null where this is the name of one class."
            )
        codes[split] = np.array([number[each[0]] if each else -1 for each in part], np.int64)
    return Classes(names, known, codes, several)


def _ordered(names: Iterable[str]) -> list[str]:
    """Texts in alphabetical order, whole numbers by size."""
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)
