"""What a served run searches in: items found by the vectors of their views, and shown; or a store of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from nearfar.data.files import Json
from nearfar.data.items import Items, joined
from nearfar.errors import NearfarError, nearest_name
from nearfar.serving.fill import Names, Source, open_gallery
from nearfar.serving.messages import GalleryItem
from nearfar.serving.shown import as_picture, shown_value
from nearfar.serving.stores import VectorStore, parse_where
from nearfar.terminal import short_number

if TYPE_CHECKING:
    from nearfar.serving.trained import Trained

__all__ = ["Gallery", "StoreGallery"]

#: columns of an item beside its views that are shown, and the characters of a text in one
_COLUMNS, _CHARACTERS = 24, 2000
#: spots of a slide that are sent at most
_SPOTS = 20_000
#: pictures that are kept once they are drawn
_DRAWN = 1024
#: items that are kept as they are sent
_WRITTEN = 4096
#: rows of a store that are remembered once they were hits, so that their pictures can be asked for
_REMEMBERED = 20_000

Say = Callable[[str], None]


class Gallery:
    """Items in memory, each named by its position, and for every view that is searched a store of its vectors.

    ``targets`` are the views that are searched, ``views`` those that the items have, ``others`` the columns beside
    them, by which hits are filtered.

    Args:
        trained: what embedded them.
        items: with a column for each view that there is, and others.
        stores: by view; their ids are those of the items, each once.
    """

    def __init__(
        self, trained: Trained, items: Items, stores: Mapping[str, VectorStore], source: str
    ) -> None:
        self.trained, self.items, self.stores, self.source = trained, items, dict(stores), source
        self._present = {name: items.present(name) for name in items.columns}
        self.views = [view for view in trained.views if view in items and self._present[view].any()]
        self.kinds = next(iter(self.stores.values())).kinds
        self.others = [name for name in self.kinds if name not in trained.views]
        self.targets = list(self.stores)
        self._position = {name: i for i, name in enumerate(items.ids)}
        self._places = _places(items)
        self._draw = lru_cache(maxsize=_DRAWN)(self._picture)
        self._written = lru_cache(maxsize=_WRITTEN)(self._item_as_json)
        self._generator = np.random.default_rng()

    @classmethod
    def open(
        cls,
        trained: Trained,
        source: Source,
        targets: Sequence[str] | None = None,
        say: Say = lambda text: None,
        advance: Callable[[int], None] = lambda rows: None,
        folder: Path | None = None,
    ) -> Gallery:
        """The items of a source (`file_source`, `own_source`); vectors are kept beside the run, or in ``folder``.

        Args:
            trained: what embeds them.
            source: where items come from.
            targets: the views to search in; None: all that the items have.
            say, advance: are told what is done, and how many rows.
            folder: where vectors are kept that are not beside the run yet; None: beside the run.

        Raises:
            NearfarError: a source without items, or without a view that was named.
        """
        names, parts = Names(), []
        for part in source.chunks():
            part.ids = names.distinct(part)
            parts.append(part)
        items = (
            joined([part for part in parts if len(part)] or parts[:1], source.name)
            if parts
            else Items([], {})
        )
        views = [view for view in trained.views if view in items and items.present(view).any()]
        if not views:
            wanted = " or ".join(trained.views)
            raise NearfarError(f"{source.name}: no item has a value that is read as {wanted}.")
        for target in targets or ():
            if target not in views:
                raise NearfarError(f"{source.name} has no view '{target}'; {nearest_name(target, views)}")
        stores = {}
        for view in targets or views:
            query = next((each for each in views if each != view), None)
            stores[view] = open_gallery(
                trained, source, view, query=query, folder=folder, say=say, advance=advance
            )
        return cls(trained, items, stores, source.name)

    def __len__(self) -> int:
        return len(self.items)

    # -- search ----------------------------------------------------------------------------------------------
    def conditions(self, where: Sequence[str]) -> tuple[str, ...]:
        """A filter, once it was read; ``NearfarError`` for a column that there is not, or a wrong value."""
        parse_where(list(where), self.kinds)
        return tuple(where)

    def search(
        self, vectors: Float[np.ndarray, "q d"], k: int, target: str, where: tuple[str, ...] = ()
    ) -> list[list[tuple[int, float]]]:
        """For each query the positions of the nearest items and their cosines, nearest first."""
        answers = self.stores[target].search(vectors, k, list(where) or None)
        return [
            [
                (self._named(name, row), float(score))
                for name, row, score in zip(matches.ids, matches.rows, matches.scores, strict=True)
            ]
            for matches in answers
        ]

    def _named(self, name: str, row: Mapping[str, object]) -> int:
        """The position of a hit."""
        return self._position[name]

    # -- items -----------------------------------------------------------------------------------------------
    def _item(self, position: int) -> tuple[str, Callable[[str], object], int]:
        """The id of an item, its value of a column (None: it has none), and where it stands."""
        if not 0 <= position < len(self.items):
            raise NearfarError(
                f"there is no item at position {position}; the gallery has {len(self.items):,}"
            )
        items, present = self.items, self._present
        return (
            str(items.ids[position]),
            lambda name: items[name][position] if name in present and present[name][position] else None,
            position,
        )

    def value(self, position: int, view: str) -> object:
        """An item's value of a view, to search with."""
        identity, column, _ = self._item(position)
        value = column(view) if view in self.views else None
        if value is None:
            raise NearfarError(f"the item '{identity}' has no value of '{view}' to search with")
        return value

    def drawn(self, count: int) -> list[int]:
        """Positions of so many items, drawn at random."""
        size = len(self.items)
        if size <= 10**6:
            return [int(i) for i in self._generator.choice(size, min(count, size), replace=False)]
        return list({int(i) for i in self._generator.integers(size, size=count)})

    def listed(self, start: int, count: int) -> list[int]:
        """Positions of items in order."""
        return list(range(start, min(start + count, len(self.items))))

    def shown(self, position: int) -> Json:
        """An item as a page shows it: the fields of `GalleryItem`."""
        identity, column, _ = self._item(position)
        views = {}
        for number, view in enumerate(self.views):
            value = column(view)
            if value is not None:
                tower = self.trained.system.towers[view]
                views[view] = shown_value(value, tower, f"gallery/{position}/{number}")
        columns = {name: _brief(column(name)) for name in self.others[:_COLUMNS]}
        return {
            "position": position,
            "id": identity,
            "shown": views,
            "columns": {name: value for name, value in columns.items() if value is not None},
            "spot": self._spot(position),
        }

    def hit(self, rank: int, position: int, score: float) -> str:
        """A hit as JSON: the fields of `HitModel`. What an item shows never changes, and is written once."""
        return f'{{"rank":{rank},"score":{score:.6f},{self._written(position)[1:]}'

    def _item_as_json(self, position: int) -> str:
        return GalleryItem.model_validate(self.shown(position)).model_dump_json()

    def picture(self, position: int, view: int) -> tuple[str, bytes]:
        """Media type and bytes of a picture of a value: PNG, or SVG of a molecule."""
        self._item(position)
        if not 0 <= view < len(self.views):
            raise NearfarError(f"there is no view of number {view}; the gallery has {len(self.views)}")
        return self._draw(position, self.views[view])

    def _picture(self, position: int, view: str) -> tuple[str, bytes]:
        value = self._item(position)[1](view)
        if value is None:
            raise NearfarError(f"item {position} has no value of '{view}'")
        return as_picture(value, self.trained.system.towers[view])

    # -- slides ----------------------------------------------------------------------------------------------
    def _spot(self, position: int) -> Json | None:
        if self._places is None:
            return None
        slides, x, y = self._places
        return {"slide": slides[position], "x": float(x[position]), "y": float(y[position])}

    @property
    def slides(self) -> list[str]:
        """The slides on which items have a place."""
        return [] if self._places is None else list(dict.fromkeys(self._places[0]))

    def slide(self, name: str) -> Json:
        """Positions and places of the items on a slide: the fields of `Slide`."""
        if self._places is None or name not in self.slides:
            raise NearfarError(f"there is no slide '{name}'; {nearest_name(name, self.slides or ['none'])}")
        slides, x, y = self._places
        at = np.flatnonzero(np.asarray(slides) == name)
        if len(at) > _SPOTS:
            at = at[:: -(-len(at) // _SPOTS)]
        return {"slide": name, "positions": at.tolist(), "x": x[at].tolist(), "y": y[at].tolist()}


class StoreGallery(Gallery):
    """A store that was filled before, of any size: rows are fetched when they are hits, and none is in memory.

    A row gets its position when it is shown for the first time; the last of these are remembered.

    Raises:
        NearfarError: a store that was filled by a different model.
    """

    def __init__(self, trained: Trained, store: VectorStore) -> None:
        about = store.about
        target = str(about.get("view", trained.views[0]))
        kinds = dict(about.get("kinds", {}))
        shown = [view for view in trained.views if view in store.kinds and view in kinds]
        empty = Items([], {view: [] for view in trained.views})
        super().__init__(trained, empty, {target: store}, str(about.get("source", store.shown)))
        self.views = shown
        self._rows: OrderedDict[int, tuple[str, Mapping[str, object]]] = OrderedDict()
        self._known: dict[str, int] = {}
        self._next, self._size, self._lock = 0, len(store), threading.Lock()

    def __len__(self) -> int:
        return self._size

    def _named(self, name: str, row: Mapping[str, object]) -> int:
        with self._lock:
            position = self._known.get(name)
            if position is None:
                position, self._next = self._next, self._next + 1
                self._known[name] = position
            self._rows[position] = (name, row)
            self._rows.move_to_end(position)
            while len(self._rows) > _REMEMBERED:
                _, (forgotten, _) = self._rows.popitem(last=False)
                del self._known[forgotten]
            return position

    def _item(self, position: int) -> tuple[str, Callable[[str], object], int]:
        with self._lock:
            known = self._rows.get(position)
        if known is None:
            raise NearfarError(f"item {position} was shown too long ago, or never; search for it")
        return known[0], known[1].get, position

    def value(self, position: int, view: str) -> object:
        value = super().value(position, view)
        if (isinstance(value, str) and value.startswith("data:image/")) or self.kinds.get(view) != "text":
            raise NearfarError(
                f"the store does not keep values of '{view}' as they were; use a query of your own"
            )
        return value

    def drawn(self, count: int) -> list[int]:
        """The nearest rows to vectors of random directions."""
        (target,) = self.stores
        vectors = self._generator.normal(size=(count, self.stores[target].dim)).astype(np.float32)
        hits = self.search(vectors, 1, target)
        return list(dict.fromkeys(position for each in hits for position, _ in each))

    def listed(self, start: int, count: int) -> list[int]:
        with self._lock:
            return [position for position in self._rows if start <= position < start + count][:count]


def _places(items: Items) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Slide, x and y of every item, where there are such columns: ``x`` and ``y``, or ``position`` (n, 2)."""
    try:
        if "position" in items and items.array("position").ndim == 2:
            x, y = np.asarray(items["position"], np.float64).T
        elif "x" in items and "y" in items:
            x, y = (np.asarray(items[name], np.float64) for name in ("x", "y"))
        else:
            return None
    except (TypeError, ValueError):
        return None
    if x.ndim != 1 or y.ndim != 1 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    slides = items["slide"] if "slide" in items else [""] * len(items)
    return [str(slide) for slide in slides], x, y


def _brief(value: object) -> str | None:
    if value is None or value != value:
        return None
    if isinstance(value, (float, np.floating)):
        return short_number(float(value)) if float(value) != int(value) else str(int(value))
    text = str(value)
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
