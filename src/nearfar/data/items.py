"""Items: rows with ids and named columns, whatever they were read from; and how they are split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int

from nearfar.data.cache import content_key
from nearfar.data.files import Json
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name
from nearfar.ids import split_hash

__all__ = [
    "Column",
    "ItemSplits",
    "Items",
    "hold_out",
    "joined",
    "linked_groups",
    "value_groups",
    "value_keys",
]

#: the values of a column: a text, a path, … for each item, None where it has none; or an array (n, …) of numbers
Column = Sequence[object] | np.ndarray


@dataclass
class Items:
    """The items of a split: an id for each, and named columns of values.

    A value is a text, the path of a picture, or a row of an array of numbers; None (in an array of floats: NaN) where
    an item lacks it. ``groups`` are what splits keep together (a patient, a ring scaffold); None: each item by itself.
    ``rows`` are the lines (or rows) of the source they were read from.

    >>> items = Items(["a", "b", "c"], {"word": ["near", "far", None], "x": np.array([1.0, np.nan, 3.0])})
    >>> items.present("word").tolist(), items.present("x").tolist(), items.take([2, 0])["x"].tolist()
    ([True, True, False], [True, False, True], [3.0, 1.0])
    >>> items["wrod"]
    Traceback (most recent call last):
    nearfar.errors.NearfarError: items have no column 'wrod'; did you mean 'word'?
    """

    ids: list[str]
    columns: dict[str, Column]
    source: str = "items"
    groups: Column | None = None
    rows: list[int] | None = None
    rejections: Rejections = field(default_factory=Rejections)
    notes: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        wrong = {name: n for name, n in lengths.items() if n != len(self.ids)}
        if wrong:
            name, n = next(iter(wrong.items()))
            raise NearfarError(f"{self.source}: column '{name}' has {n} values for {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Sequence[Any] | np.ndarray:  # who asks for a column knows its values
        if name not in self.columns:
            raise NearfarError(f"{self.source} have no column '{name}'; {nearest_name(name, self.columns)}")
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """A column of texts in which no value is missing."""
        return [str(value) for value in self[name]]

    def array(self, name: str) -> np.ndarray:
        """A column as an array."""
        return np.asarray(self[name])

    def present(self, name: str) -> Bool[np.ndarray, " n"]:
        """Which items have a value in this column."""
        values = self[name]
        if isinstance(values, np.ndarray):
            if values.dtype.kind != "f":
                return np.ones(len(values), bool)
            return np.asarray(~np.isnan(values.reshape(len(values), -1)).any(axis=1))
        return np.array([value is not None for value in values], dtype=bool)

    def take(self, positions: Sequence[int] | Int[np.ndarray, " k"]) -> Items:
        """The items at these positions; notes and rejections stay with the whole."""
        at = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            ids=[self.ids[i] for i in at],
            columns={name: _taken(values, at) for name, values in self.columns.items()},
            groups=None if self.groups is None else _taken(self.groups, at),
            rows=None if self.rows is None else [self.rows[i] for i in at],
            rejections=Rejections(),
        )

    def rejecting(self, name: str, reasons: Sequence[str | None], detail: str = "") -> Items:
        """The items without those that have a reason, which are counted under it as rejections of this source."""
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        if len(kept) == len(self):
            return self
        rejections = self.rejections
        values = self.columns.get(name)
        for i, reason in enumerate(reasons):
            if reason is not None:
                row = None if self.rows is None else self.rows[i]
                value = None if values is None or isinstance(values, np.ndarray) else values[i]
                rejections.add(reason, row, self.ids[i] if value is None else value, detail)
        return replace(self.take(kept), rejections=rejections)

    @property
    def hash(self) -> str:
        """A hash of the ids that ignores their order: two estimates are comparable only if it is the same."""
        return split_hash(self.ids)

    def content_hash(self, *names: str) -> str:
        """A hash of ids and of these columns (all without names), in order: sixteen hexadecimal digits."""
        chosen = {name: _hashable(self[name]) for name in (names or self.columns)}
        return content_key(self.ids, chosen)[:16]

    def layout(self) -> Json:
        """Counts for ``dataset_layout.json``."""
        counts = {name: int(self.present(name).sum()) for name in self.columns}
        return {
            "source": self.source,
            "rows": len(self),
            "split_hash": self.hash,
            "values": counts,
            **({} if self.groups is None else {"groups": len(set(_plain(self.groups)))}),
            "rejections": self.rejections.as_dict(),
            "notes": dict(self.notes),
        }


def _taken(values: Column, at: Int[np.ndarray, " k"]) -> Column:
    return values[at] if isinstance(values, np.ndarray) else [values[i] for i in at]


def _hashable(values: Column) -> np.ndarray | list[object]:
    if isinstance(values, np.ndarray):
        return values
    return [
        value if value is None or isinstance(value, (str, int, float)) else str(value) for value in values
    ]


def _plain(values: Column) -> list[object]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


class LoadedData(Protocol):
    """The data of an experiment as a command shows them: lines to read, and what ``dataset_layout.json`` holds."""

    def summary(self) -> str: ...

    def layout(self) -> Json: ...


@dataclass
class ItemSplits:
    """The splits of an experiment as a command shows them: what was taken, what was rejected and why."""

    splits: dict[str, Items]

    def summary(self) -> str:
        """A line for each split, and one for its rejections."""
        lines = []
        for name, items in self.splits.items():
            counts = ", ".join(f"{column} {int(items.present(column).sum())}" for column in items.columns)
            lines.append(f"{name}: {len(items)} items ({items.source}); values: {counts}")
            if len(items.rejections):
                lines.append(f"{name}: {items.rejections.summary()}")
        return "\n".join(lines)

    def layout(self) -> Json:
        """Counts and rejections of every split."""
        return {"splits": {name: items.layout() for name, items in self.splits.items()}}


def value_groups(
    splits: Mapping[str, Items], column: str, keys: Callable[[Column], Sequence[object]] | None = None
) -> dict[str, Int[np.ndarray, " n"]]:
    """Numbers that are equal exactly where the value of a column is, across all splits; −1 where it is missing.

    Two items of one group are no negatives of each other. ``keys`` turns values into what is compared (`value_keys`:
    texts without letter case and blanks).

    >>> a, b = Items(["1", "2"], {"t": ["Near", None]}), Items(["3"], {"t": ["near "]})
    >>> {name: groups.tolist() for name, groups in value_groups({"train": a, "val": b}, "t").items()}
    {'train': [0, -1], 'val': [0]}
    """
    seen: dict[object, int] = {}
    groups = {}
    for name, items in splits.items():
        at = np.flatnonzero(items.present(column))
        numbers = np.full(len(items), -1, dtype=np.int64)
        for i, same in zip(at, (keys or value_keys)(_taken(items[column], at)), strict=True):
            numbers[i] = seen.setdefault(same, len(seen))
        groups[name] = numbers
    return groups


def value_keys(values: Column) -> list[object]:
    """For each value what is equal exactly where two values count as the same: texts without letter case and blanks.

    >>> value_keys(["Near  it", "near it", 3])
    ['near it', 'near it', 3]
    """
    return [_same(value) for value in values]


def _same(value: object) -> object:
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value


def linked_groups(items: Items, columns: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Numbers of groups such that no value of these columns, and no group of the items, is in two of them.

    Captions that share a picture are linked, pictures that share a caption are, and so on. What is missing links
    nothing.

    >>> items = Items(["1", "2", "3", "4"], {"image": ["a", "a", "b", "c"], "text": ["x", "y", "Y ", None]})
    >>> linked_groups(items, ["image", "text"]).tolist(), linked_groups(items, ["image"]).tolist()
    ([0, 0, 0, 3], [0, 0, 2, 3])
    """
    first = list(range(len(items)))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    keys = [value_groups({"": items}, name)[""].tolist() for name in columns]
    if items.groups is not None:
        seen: dict[object, int] = {}
        keys.append([seen.setdefault(group, len(seen)) for group in _plain(items.groups)])
    for numbers in keys:
        met: dict[int, int] = {}
        for i, number in enumerate(numbers):
            a, b = root(i), root(met.setdefault(number, i)) if number >= 0 else root(i)
            first[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(items))], dtype=np.int64)


def joined(parts: Sequence[Items], source: str) -> Items:
    """Items of several files one after the other; where files share ids, the number of the file stands before them.

    Raises:
        NearfarError: columns that differ, or arrays that do not fit.

    >>> both = joined([Items(["1"], {"x": ["a"]}), Items(["1"], {"x": ["b"]})], "two files")
    >>> both.ids, both["x"]
    (['1/1', '2/1'], ['a', 'b'])
    """
    if len(parts) == 1:
        return parts[0]
    names = list(parts[0].columns)
    for part in parts[1:]:
        if set(part.columns) != set(names):
            differing = ", ".join(sorted(set(part.columns) ^ set(names)))
            raise NearfarError(f"{part.source} and {parts[0].source} differ in their columns: {differing}")
    ids = [name for part in parts for name in part.ids]
    if len(set(ids)) < len(ids):
        ids = [f"{number}/{name}" for number, part in enumerate(parts, start=1) for name in part.ids]
    columns: dict[str, Column] = {}
    for name in names:
        values = [part[name] for part in parts]
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        if len(arrays) == len(values) and len({array.shape[1:] for array in arrays}) == 1:
            columns[name] = np.concatenate(arrays)
        elif arrays and any(array.ndim > 1 for array in arrays):
            shapes = ", ".join(sorted({str(array.shape[1:]) for array in arrays}))
            raise NearfarError(
                f"{source}: the column '{name}' differs in shape from file to file ({shapes} and others)"
            )
        else:
            columns[name] = [value for part in values for value in _plain(part)]
    rejections = Rejections()
    notes: Json = {"files": len(parts)}
    for part in parts:
        rejections.extend(part.rejections)
        for key, note in part.notes.items():
            notes.setdefault(key, note)
    groups = None
    if all(part.groups is not None for part in parts):
        groups = [group for part in parts for group in _plain(part.groups or [])]
    rows = [row for part in parts for row in part.rows or []]
    return Items(ids, columns, source, groups, rows if len(rows) == len(ids) else None, rejections, notes)


def shared_values(
    groups: Mapping[str, Mapping[str, Int[np.ndarray, " n"]]], ids: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Json]]:
    """What two splits share: values of each view, and whole items, all of whose views are the same.

    ``groups[view][split]`` are the numbers that `value_groups` gives, ``ids[split]`` the ids of the items. Of each two
    splits that share something: by view (``item`` for whole items) how many are ``shared``, how many ``rows`` of the
    second split have one, and the ``first`` ids of these.

    >>> groups = {"a": {"train": np.array([0, 1]), "val": np.array([1, 2])}}
    >>> shared_values(groups, {"train": ["x", "y"], "val": ["z", "w"]})["train/val"]["a"]
    {'shared': 1, 'rows': 1, 'first': ['z']}
    """
    shared: dict[str, dict[str, Json]] = {}
    rows: dict[str, dict[str, list[object]]] = {
        view: {split: each.tolist() for split, each in known.items()} for view, known in groups.items()
    }
    rows["item"] = {split: list(zip(*(rows[view][split] for view in groups), strict=True)) for split in ids}
    for first, second in combinations(ids, 2):
        for what, known in rows.items():
            common = (set(known[first]) & set(known[second])) - {-1}
            if common:
                having = [
                    id_ for id_, value in zip(ids[second], known[second], strict=True) if value in common
                ]
                entry = {"shared": len(common), "rows": len(having), "first": having[:3]}
                shared.setdefault(f"{first}/{second}", {})[what] = entry
    return shared


def hold_out(
    items: Items,
    fractions: Mapping[str, float],
    seed: int = 0,
    keys: Column | None = None,
) -> dict[str, Items]:
    """Parts of the items, drawn at random by whole groups: ``fractions`` of them by name, and the rest as ``train``.

    ``keys`` are the groups; None takes those of the items, or each item by itself. Positions keep their order. A share
    is met as nearly as groups allow: a group larger than the share is drawn only where there are no others.

    >>> items = Items([str(i) for i in range(10)], {}, groups=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    >>> {name: len(part) for name, part in hold_out(items, {"val": 0.2}).items()}
    {'train': 8, 'val': 2}
    """
    given = keys if keys is not None else items.groups
    groups = list(range(len(items))) if given is None else _plain(given)
    distinct = list(dict.fromkeys(groups))
    if not distinct:
        raise NearfarError(f"{items.source}: there is no item to split")
    order = np.random.default_rng(seed).permutation(len(distinct))
    sizes = np.zeros(len(distinct), dtype=np.int64)
    place = {group: i for i, group in enumerate(distinct)}
    code = np.array([place[group] for group in groups])
    np.add.at(sizes, code, 1)
    part_of = np.full(len(distinct), -1)
    for number, (name, fraction) in enumerate(fractions.items()):
        if not 0 < fraction < 1:
            raise NearfarError(f"the share of {name} is {fraction}; it lies between 0 and 1")
        wanted, taken = max(1, math.floor(fraction * len(items) + 0.5)), 0
        free = [group for group in order if part_of[group] == -1]
        fitting = [group for group in free if sizes[group] <= wanted]
        for group in fitting or free:  # a group that is larger than the share is left where others will do
            if taken >= wanted:
                break
            part_of[group] = number
            taken += int(sizes[group])
    parts = {"train": items.take(np.flatnonzero(part_of[code] == -1))}
    for number, name in enumerate(fractions):
        parts[name] = items.take(np.flatnonzero(part_of[code] == number))
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        raise NearfarError(
            f"{items.source}: {len(items)} items in {len(distinct)} groups leave {empty[0]} empty at the shares "
            f"{dict(fractions)}. Give a file of its own for it, or change the share."
        )
    return parts
