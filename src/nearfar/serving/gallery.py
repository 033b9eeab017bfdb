"""What a served run searches in: items with a vector for each of their views, found by it, and shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from nearfar.data.items import Items, joined
from nearfar.errors import NearfarError, nearest_name
from nearfar.serving.shown import as_picture, shown_value
from nearfar.systems import build_system
from nearfar.terminal import short_number

if TYPE_CHECKING:
    from nearfar.data.chunks import NewData
    from nearfar.serving.trained import Trained

__all__ = ["Gallery"]

#: columns of an item beside its views that are shown, and the characters of a text in one
_COLUMNS, _CHARACTERS = 24, 2000
#: a number as a table writes it; what begins with a needless 0 is a code
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,2})?")
#: spots of a slide that are sent at most
_SPOTS = 20_000
#: pictures that are kept once they are drawn
_DRAWN = 1024


class Gallery:
    """Items in memory, with an exact index of the vectors of each view that is searched.

    An item is named by its position. ``targets`` are the views that are searched: those that at least one item has.

    Args:
        trained: what embedded them.
        items: with a column for each view that there is, and others that are shown and filtered by.
        targets: the views to search in; None: all that there are.
        say: announces what is embedded.
    """

    def __init__(
        self,
        trained: Trained,
        items: Items,
        targets: Sequence[str] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.trained, self.items, self.source = trained, items, items.source
        self.views = [view for view in trained.views if view in items and items.present(view).any()]
        if not self.views:
            raise NearfarError(
                f"{items.source}: no item has a value that is read as {' or '.join(trained.views)}."
            )
        for target in targets or ():
            if target not in self.views:
                raise NearfarError(
                    f"{items.source} has no view '{target}'; {nearest_name(target, self.views)}"
                )
        self.targets = list(targets or self.views)
        self._rows: dict[str, np.ndarray] = {}
        self._index: dict[str, Any] = {}
        for view in self.targets:
            say(f"embedding {int(items.present(view).sum()):,} values of '{view}'")
            self._add(view)
        self.others = {
            name: _numbers_of(items[name])
            for name in items.columns
            if name not in trained.views and np.ndim(items[name][0]) == 0 and name.casefold() != "id"
        }
        self._places = _places(items)
        self._draw = lru_cache(maxsize=_DRAWN)(self._picture)
        self._generator = np.random.default_rng()

    @classmethod
    def read(
        cls,
        trained: Trained,
        data: NewData,
        targets: Sequence[str] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Gallery:
        """The items of a user's file or folder; values that cannot be read are counted and said."""
        parts = list(trained.new_items(data))
        items = joined([part for part in parts if len(part)] or parts[:1], str(data.path))
        rejected = sum(len(part.rejections) for part in parts)
        if rejected:
            say(f"{rejected:,} values cannot be read and are left out; {parts[0].rejections.summary()}")
        if not len(items):
            raise NearfarError(f"{data.path}: nothing to search in.")
        return cls(trained, items, targets, say)

    @classmethod
    def of_run(
        cls,
        trained: Trained,
        targets: Sequence[str] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Gallery:
        """All items that the run was trained and judged on, where its data is still there.

        Raises:
            NearfarError: data that is not there any more, or that this system does not keep as items.
        """
        system: Any = build_system(trained.config)  # towers of its own, which reading data makes anew
        advice = "Give what is searched: --gallery DATA."
        try:
            splits = getattr(system.load_data(say), "splits", {}) if hasattr(system, "load_data") else {}
        except NearfarError as error:
            raise NearfarError(
                f"{trained.path}: the run's own data cannot be searched ({error}) {advice}"
            ) from None
        parts = [part for part in splits.values() if isinstance(part, Items)]
        if not parts:
            raise NearfarError(
                f"{trained.path}: a run of '{trained.config.system}' keeps no items to search. {advice}"
            )
        return cls(trained, joined(parts, "the run's own data"), targets, say)

    def _add(self, view: str) -> None:
        import faiss

        rows = np.flatnonzero(self.items.present(view))
        values = self.items[view]
        chosen = values[rows] if isinstance(values, np.ndarray) else [values[i] for i in rows.tolist()]
        vectors = self.trained.vectors(chosen, view)
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, np.float32))
        self._rows[view], self._index[view] = rows, index

    def __len__(self) -> int:
        return len(self.items)

    # -- search ----------------------------------------------------------------------------------------------
    def conditions(self, where: Sequence[str]) -> tuple[str, ...]:
        """A filter, once it was read; ``NearfarError`` for a column that there is not, or a wrong value."""
        if where:
            self._passing(tuple(where))
        return tuple(where)

    def search(
        self, vectors: Float[np.ndarray, "q d"], k: int, target: str, where: tuple[str, ...] = ()
    ) -> list[list[tuple[int, float]]]:
        """For each query the positions of the nearest items and their cosines, nearest first."""
        import faiss

        index, rows = self._index[target], self._rows[target]
        options: Any = None
        count = len(rows)
        if where:
            passing = self._passing(where)[rows]
            count = int(passing.sum())
            stubs: Any = faiss  # the stubs of FAISS lack what its Python layer adds
            bits = np.packbits(passing, bitorder="little")
            options = stubs.SearchParameters(sel=stubs.IDSelectorBitmap(bits))
        if not count:
            return [[] for _ in vectors]
        queries = np.ascontiguousarray(vectors, np.float32)
        scores, at = index.search(queries, min(k, count), params=options)
        return [
            [(int(rows[i]), float(score)) for score, i in zip(*pair, strict=True) if i >= 0]
            for pair in zip(scores, at, strict=True)
        ]

    def _passing(self, where: tuple[str, ...]) -> np.ndarray:
        from nearfar.serving.stores.base import column_kind
        from nearfar.serving.stores.filters import parse_where

        kinds = {name: column_kind(values) for name, values in self.others.items()}
        passing = np.ones(len(self.items), bool)
        for condition in parse_where(list(where), kinds):
            passing &= np.array([_passes(value, condition) for value in self.others[condition.column]])
        return passing

    # -- items -----------------------------------------------------------------------------------------------
    def _check(self, position: int) -> None:
        if not 0 <= position < len(self.items):
            raise NearfarError(
                f"there is no item at position {position}; the gallery has {len(self.items):,}"
            )

    def value(self, position: int, view: str) -> Any:
        """An item's value of a view, to search with."""
        self._check(position)
        if view not in self.views or not self.items.present(view)[position]:
            raise NearfarError(f"item {position} has no value of '{view}'")
        return self.items[view][position]

    def drawn(self, count: int) -> list[int]:
        """Positions of so many items, drawn at random."""
        size = len(self.items)
        chosen = self._generator.choice(size, min(count, size), replace=False) if size <= 10**6 else None
        if chosen is None:
            chosen = self._generator.integers(size, size=count)
        return [int(i) for i in chosen]

    def shown(self, position: int) -> dict[str, Any]:
        """An item as a page shows it: the fields of `GalleryItem`."""
        self._check(position)
        items = self.items
        views = {}
        for view in self.views:
            value = items[view][position]
            if items.present(view)[position]:
                tower = self.trained.system.towers[view]
                views[view] = shown_value(value, tower, f"gallery/{position}/{self.views.index(view)}")
        columns = {name: _brief(values[position]) for name, values in list(self.others.items())[:_COLUMNS]}
        place = None
        if self._places is not None:
            slides, x, y = self._places
            place = {"slide": slides[position], "x": float(x[position]), "y": float(y[position])}
        return {
            "position": position,
            "id": str(items.ids[position]),
            "shown": views,
            "columns": {name: value for name, value in columns.items() if value is not None},
            "spot": place,
        }

    def picture(self, position: int, view: int) -> tuple[str, bytes]:
        """Media type and bytes of a picture of a value: PNG, or SVG of a molecule."""
        self._check(position)
        if not 0 <= view < len(self.views):
            raise NearfarError(f"there is no view of number {view}; the gallery has {len(self.views)}")
        return self._draw(position, self.views[view])

    def _picture(self, position: int, view: str) -> tuple[str, bytes]:
        return as_picture(self.value(position, view), self.trained.system.towers[view])

    # -- slides ----------------------------------------------------------------------------------------------
    @property
    def slides(self) -> list[str]:
        """The slides on which items have a place."""
        return [] if self._places is None else list(dict.fromkeys(self._places[0]))

    def slide(self, name: str) -> dict[str, Any]:
        """Positions and places of the items on a slide: the fields of `Slide`."""
        if self._places is None or name not in self.slides:
            raise NearfarError(f"there is no slide '{name}'; {nearest_name(name, self.slides or ['none'])}")
        slides, x, y = self._places
        at = np.flatnonzero(np.asarray(slides) == name)
        if len(at) > _SPOTS:
            at = at[:: -(-len(at) // _SPOTS)]
        return {
            "slide": name,
            "positions": at.tolist(),
            "x": np.asarray(x, float)[at].tolist(),
            "y": np.asarray(y, float)[at].tolist(),
        }


def _places(items: Items) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Slide, x and y of every item, where there are such columns: ``x`` and ``y``, or ``position`` (n, 2)."""
    try:
        if "position" in items and np.ndim(items["position"]) == 2:
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


def _numbers_of(column: Sequence[Any] | np.ndarray) -> list[Any]:
    """A column as a list; texts that are all written as numbers, as a text table has them, as numbers.

    >>> _numbers_of(["1", None, "2.5"]), _numbers_of(["007", "1"])
    ([1.0, None, 2.5], ['007', '1'])
    """
    values = column.tolist() if isinstance(column, np.ndarray) else list(column)
    texts = [value for value in values if value is not None]
    if not texts or not all(isinstance(value, str) and _NUMBER.fullmatch(value) for value in texts):
        return values
    return [None if value is None else float(value) for value in values]


def _passes(value: Any, condition: Any) -> bool:
    """Whether a value meets a condition; what is missing meets none."""
    if value is None or value != value:
        return False
    plain = (
        value if condition.kind == "boolean" else float(value) if condition.kind == "number" else str(value)
    )
    if condition.operator in ("in", "not in"):
        return (plain in condition.values) == (condition.operator == "in")
    limit = condition.values[0]
    answers: Mapping[str, bool] = {
        "<": plain < limit, "<=": plain <= limit, ">": plain > limit, ">=": plain >= limit,
    }  # fmt: skip
    return answers[condition.operator]


def _brief(value: Any) -> str | None:
    if value is None or value != value:
        return None
    if isinstance(value, (float, np.floating)):
        return short_number(float(value)) if float(value) != int(value) else str(int(value))
    text = str(value)
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
