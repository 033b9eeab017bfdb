"""What a trained system of views does with new items: reads them, makes batches of them, compares them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from nearfar.data.batch import Batch, Field, Inputs, ItemDataset, Partial, Rows
from nearfar.data.cache import without_cache
from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.items import Column, Items
from nearfar.models.views import ViewModel
from nearfar.systems.comparison import ViewComparison
from nearfar.towers import Tower
from nearfar.towers.build import load_towers
from nearfar.training.system import Comparison, System

__all__ = ["PRESENT", "NewItems", "some_of"]

#: what the field of a batch begins with that says which rows have a view
PRESENT = "present:"


class NewItems(System[Batch, ViewModel]):
    """The part of a `ViewSystem` that a run needs once it is trained; it needs towers and none of the run's data."""

    towers: dict[str, Tower]

    @abstractmethod
    def pairs(self) -> list[tuple[str, str]]:
        """The views that are contrasted and judged with each other."""

    def load_assets(self, folder: Path) -> None:
        self.towers = load_towers(folder / "towers")

    def embed_view(self, model: ViewModel, view: str, field: Field) -> Tensor:
        return model.encode(view, field)

    def view_headers(self) -> dict[str, Sequence[str]]:
        """For each view the headers under which a table of new items may have it, best first."""
        return {view: [view] for view in self.views}

    def further_headers(self) -> dict[str, Sequence[str]]:
        """The same of columns beyond the views, without which new items can be read, too."""
        return {}

    def id_headers(self) -> Sequence[str]:
        """The headers under which a table of new items may have ids, best first: that of the run's own data."""
        own = getattr(getattr(self.config, "data", None), "id_column", None)
        return [] if own is None else [str(own)]

    def new_items(self, source: NewData) -> Iterator[Items]:
        """A table, a folder, shards: items with those of the views that are there; see `usable`."""
        for items in read_chunks(source, self.view_headers(), self.further_headers(), self.id_headers()):
            yield self.usable(items)

    def usable(self, items: Items) -> Items:
        """Without values that a tower cannot read, and without items that then have none; each is counted."""
        with without_cache():
            items, reasons = self.checked(items)
        columns, rejections = dict(items.columns), items.rejections
        rows: Sequence[int | None] = items.rows or [None] * len(items)
        usable, wrong = np.zeros(len(items), bool), np.zeros(len(items), bool)
        for view, own in reasons.items():
            values, present = items[view], items.present(view)
            for i, reason in zip(np.flatnonzero(present).tolist(), own, strict=True):
                if reason is not None:
                    rejections.add(
                        f"{view}: {reason}", rows[i], "" if isinstance(values, np.ndarray) else values[i]
                    )
                    present[i], wrong[i] = False, True
            columns[view] = _only(values, present)
            usable |= present
        for i in np.flatnonzero(~usable & ~wrong).tolist():
            rejections.add("no value", rows[i], items.ids[i])
        return replace(replace(items, columns=columns).take(np.flatnonzero(usable)), rejections=rejections)

    def checked(self, items: Items) -> tuple[Items, dict[str, list[str | None]]]:
        """New items with values as the run's own data had them, and by view why each value that is there cannot be
        read; None where it can."""
        return items, {
            view: self.towers[view].check(some_of(items[view], np.flatnonzero(items.present(view))))
            for view in self.views
            if view in items
        }

    def new_dataset(self, items: Items) -> ItemDataset:
        towers = {view: tower for view, tower in self.towers.items() if view in items}
        return ItemDataset(self.tower_inputs(items, towers))

    def comparison(self, gallery: bool, k: int | None = None) -> Comparison | None:
        """The nearest items of the other view, for every two views that are contrasted: see `ViewComparison`.

        None for a system with ``predictions`` of its own.
        """
        if self.defines("predictions"):
            return None
        return ViewComparison(self.pairs(), 10 if k is None else k, self.answer_column())

    def answer_column(self) -> str | None:
        """The column behind `answers`; None: an item answers itself alone."""
        return None

    @staticmethod
    def tower_inputs(items: Items, towers: Mapping[str, Tower]) -> dict[str, Inputs]:
        """What these towers read of the items, and which items have a view that some of them lack."""
        inputs: dict[str, Inputs] = {}
        for view, tower in towers.items():
            present = items.present(view)
            read = tower.read(some_of(items[view], np.flatnonzero(present)))
            inputs[view] = read if present.all() else Partial(read, present)
            if not present.all():
                inputs[f"{PRESENT}{view}"] = Rows(present)
        return inputs


def some_of(values: Column, at: np.ndarray) -> Column:
    """The values at these positions, as they are where these are all."""
    if isinstance(values, np.ndarray):
        return values if len(at) == len(values) else values[at]
    return [values[i] for i in at.tolist()]


def _only(values: Column, present: np.ndarray) -> Column:
    """The values where ``present``, and none elsewhere."""
    if present.all():
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values = values.copy()
        values[~present] = np.nan
        return values
    return [value if has else None for value, has in zip(values, present.tolist(), strict=True)]
