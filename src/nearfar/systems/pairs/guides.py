"""What a second, frozen model says of the training items: its vectors of views and their negatives, and its margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nearfar.data.items import Items
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.new_items import some_of
from nearfar.towers import Tower, build_tower, guess_tower
from nearfar.towers.vector import VectorTower

__all__ = ["Guides", "column_margins", "guide_columns"]


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
