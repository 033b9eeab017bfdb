"""Pairs that are no negatives of each other: those that somebody marked, and those that a frozen guide model finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nearfar.data.items import Items
from nearfar.data.sources import read_items
from nearfar.errors import NearfarError, nearest_name
from nearfar.mining.false_negatives import is_marked
from nearfar.systems.new_items import some_of
from nearfar.towers import Tower, build_tower, guess_tower
from nearfar.towers.vector import VectorTower

__all__ = ["Guides", "column_margins", "guide_columns", "read_excluded"]


def read_excluded(path: Path, ids: Sequence[str], say: Callable[[str], None]) -> Int[np.ndarray, "n k"]:
    """For each item the numbers of those that are no negatives of it, −1 behind the last.

    The table has the columns ``query_id`` and ``negative_id``; where it has a column ``false_negative``, the rows count
    that are marked in it (1, yes), otherwise all. Both items of a pair leave each other out. Rows of items that are
    not in training are counted and said.

    Raises:
        NearfarError: a file that cannot be read, a column that is missing, a mark that is no mark, or no pair at all.
    """
    table = read_items(path)
    for name in ("query_id", "negative_id"):
        if name not in table:
            raise NearfarError(
                f"exclude={path}: there is no column '{name}'; it has {', '.join(table.columns) or 'none'}."
            )
    rows = range(len(table))
    if "false_negative" in table:
        present = table.present("false_negative")
        marks = table["false_negative"]
        rows = [i for i in rows if present[i] and is_marked(marks[i], f"exclude={path}, row {i + 1}")]  # type: ignore[assignment]
    number = {str(identity): i for i, identity in enumerate(ids)}
    pairs: set[tuple[int, int]] = set()
    unknown = 0
    for i in rows:
        first, second = (number.get(str(table[name][i])) for name in ("query_id", "negative_id"))
        if first is None or second is None:
            unknown += 1
        elif first != second:
            pairs |= {(first, second), (second, first)}
    if unknown:
        say(
            f"exclude: {unknown} of {len(rows)} pairs name items that are not in training; they have no effect"
        )
    if not pairs:
        marked = (
            " that is marked in its column false_negative (1 or yes)" if "false_negative" in table else ""
        )
        raise NearfarError(f"exclude={path}: it has no pair of training items{marked}; leave exclude out.")
    say(f"exclude: {len(pairs) // 2} pairs are no negatives of each other")
    lists: list[list[int]] = [[] for _ in ids]
    for first, second in sorted(pairs):
        lists[first].append(second)
    width = max(map(len, lists))
    return np.array([each + [-1] * (width - len(each)) for each in lists], dtype=np.int64)


def guide_columns(guide: Mapping[str, object]) -> list[str]:
    """The columns that hold vectors of a guide; views with the options of a tower have none."""
    return [str(given) for given in guide.values() if not isinstance(given, Mapping)]


class Guides:
    """The guide of each view: a column of its vectors, or a tower, fitted on the training values of all views that
    name the same one."""

    def __init__(self, guide: Mapping[str, object], train: Items) -> None:
        self.train = train
        self.columns = {view: str(given) for view, given in guide.items() if not isinstance(given, Mapping)}
        self.towers: dict[str, Tower] = {}
        readers: dict[str, tuple[Tower, list[str]]] = {}
        for view, given in guide.items():
            if not isinstance(given, Mapping):
                continue
            own = dict(given)
            kind = str(own.pop("tower", None) or guess_tower(train[view]))
            key = f"{kind} {sorted((name, str(value)) for name, value in own.items())}"
            if key not in readers:
                readers[key] = (build_tower(kind, f"guide.{view}", **own), [])
            readers[key][1].append(view)
        for tower, views in readers.values():
            tower.fit([value for view in views for value in self._values(view, view)])
            self.towers |= dict.fromkeys(views, tower)

    def _values(self, column: str, view: str) -> Sequence[object]:
        return list(some_of(self.train[column], np.flatnonzero(self.train.present(view))))

    def vectors(self, view: str) -> np.ndarray:
        """Of each training item (n, g); 0 where it lacks the view."""
        present = self.train.present(view)
        if view in self.towers:
            return _scattered(self._read(view, view), present)
        column = self.columns[view]
        if column not in self.train:
            raise NearfarError(
                f"guide.{view}={column}: {self.train.source} has no such column; "
                f"{nearest_name(column, list(self.train.columns))}. Options of a tower are given by name, such as "
                f"guide.{view}.encoder=minilm."
            )
        missing = int((present & ~self.train.present(column)).sum())
        if missing:
            raise NearfarError(
                f"guide.{view}={column}: {missing} training items have a value of '{view}' and none in this column; "
                "give the guide's vector of each."
            )
        values = self._values(column, view)
        reasons = [reason for reason in VectorTower().check(values) if reason is not None]
        if reasons:
            raise NearfarError(
                f"guide.{view}={column}: {len(reasons)} of {len(values)} values are no vectors ({reasons[0]})."
            )
        return _scattered(VectorTower.matrix(values), present)

    def negatives(self, view: str, columns: Sequence[str]) -> np.ndarray | None:
        """Of the further negatives of a view (n, k, g); None where the guide is a column, which has none of them."""
        if view not in self.towers:
            return None
        return np.stack([self._read(view, column) for column in columns], axis=1)

    def _read(self, view: str, column: str) -> np.ndarray:
        tower = self.towers[view]
        vectors = tower.reference(self._values(column, column))
        if vectors is None:
            raise NearfarError(
                f"guide.{view}: its tower has no vectors before training ({tower.description}). Take a pretrained "
                "or n-gram encoder, or a column of vectors."
            )
        return np.asarray(vectors, dtype=np.float32)


def _scattered(vectors: np.ndarray, present: np.ndarray) -> np.ndarray:
    if present.all():
        return np.ascontiguousarray(vectors, dtype=np.float32)
    whole = np.zeros((len(present), vectors.shape[1]), dtype=np.float32)
    whole[present] = vectors
    return whole


def column_margins(items: Items, view: str, columns: Sequence[str]) -> np.ndarray:
    """A teacher's margins (n, k) of the negatives of a view; NaN in empty cells."""
    read = []
    for column in columns:
        values = [np.nan if value is None else value for value in items[column]]
        try:
            read.append(np.asarray(values, dtype=np.float32).reshape(len(values)))
        except (TypeError, ValueError) as error:
            raise NearfarError(f"margins.{view}={column}: this column holds no numbers ({error}).") from None
    return np.stack(read, axis=1)
