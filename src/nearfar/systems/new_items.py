"""What a trained system of views does with new items: reads them, makes batches of them, compares them.

What runs of earlier versions did not keep for it is made anew from the data that they were trained on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from nearfar.data.batch import Batch, Field, Inputs, ItemDataset, Partial, Rows
from nearfar.data.cache import without_cache
from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.files import read_json
from nearfar.data.items import Column, Items, value_keys
from nearfar.errors import NearfarError
from nearfar.metrics import Ranks, retrieval_ranks
from nearfar.models.views import ViewModel
from nearfar.towers import Tower
from nearfar.towers.build import load_towers
from nearfar.training.system import Comparison, System

__all__ = ["PRESENT", "NewItems", "ViewComparison", "nearest_keys", "prepare_again", "some_of"]


def prepare_again(system: System, folder: Path, what: str) -> None:
    """Let a system read the data of its run again, and check that it is the same.

    Args:
        system: built from the configuration of the run.
        folder: that run.
        what: what the run did not keep, for messages.

    Raises:
        NearfarError: data that is not where it was, or has changed since.
    """
    lacking = f"{folder} is a run of an earlier version, which did not keep {what}"
    try:
        system.prepare(lambda _: None)
    except NearfarError as error:
        raise NearfarError(
            f"{lacking}; it can be made anew from the data of the run, which cannot be read: {error} Put the data "
            "where config.yaml in that folder names it, or train again."
        ) from None
    path = folder / "dataset_layout.json"
    before = read_json(path, {}).get("data_hash") if path.is_file() else None
    now = system.layout().get("data_hash")
    if before is not None and before != now:
        raise NearfarError(
            f"{lacking}; it can be made anew from the data of the run, which has changed since (hash {now}, then "
            f"{before}). Bring back the data of then, or train again."
        )


_TILE = 1 << 24  # similarities in memory at a time


@torch.no_grad()
def nearest_keys(
    queries: Float[Tensor, "m d"], keys: Float[Tensor, "n d"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Cosines and positions of the ``k`` keys (or all, if there are fewer) nearest to each query, nearest first.

    >>> cosines, at = nearest_keys(torch.tensor([[3.0, 0.1]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), k=5)
    >>> at.tolist()
    [[1, 0]]
    """
    k = min(k, len(keys))
    unit = normalize(keys.float(), dim=1)
    cosines, positions = [torch.zeros(0, k)], [torch.zeros(0, k, dtype=torch.int64)]
    for part in normalize(queries.float(), dim=1).split(max(1, _TILE // max(1, len(keys)))):
        values, at = (part @ unit.T).topk(k, dim=1)
        cosines.append(values)
        positions.append(at)
    return torch.cat(cosines), torch.cat(positions)


class ViewComparison:
    """Compares views of items: the items that were added with each other, or others with them.

    Args:
        pairs: the views that are compared, in both directions.
        k: how many nearest items are given.
        answers: the column whose equal values make items answers of each other; None: an item answers itself alone.

    For each direction, such as ``text_to_picture``, the columns are: ``/nearest`` and ``/cosine``, ids and cosines of
    the k nearest items of the other view; ``/rank``, the expected rank of the item's own partner, or of its best
    answer; ``/R@1`` and ``/MRR``, what it contributes to these metrics, whose means they are. Embeddings are held in
    memory.

    >>> comparison = ViewComparison([("text", "picture")], k=1)
    >>> items = Items(["a", "b"], {"text": ["x", "y"], "picture": ["x.png", "y.png"]})
    >>> comparison.add({"text": torch.eye(2), "picture": torch.tensor([[1.0, 0.1], [0.8, 1.0]])}, items)
    >>> columns = comparison.of_all(0, 2)
    >>> columns["text_to_picture/nearest"], columns["text_to_picture/rank"], columns["picture_to_text/MRR"]
    ([['a'], ['b']], [1.0, 1.0], [1.0, 1.0])
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], k: int = 10, answers: str | None = None) -> None:
        if k < 1:
            raise NearfarError(f"k={k}: at least one answer is needed.")
        self.pairs, self.k, self.answers = list(pairs), k, answers
        self.ids: list[str] = []
        self._rows: dict[str, list[Tensor]] = {}
        self._present: dict[str, list[np.ndarray]] = {}
        self._answers: list[object] = []
        self._ranks: dict[str, dict[str, np.ndarray]] | None = None

    @property
    def views(self) -> list[str]:
        """Every view that is compared, once."""
        return list(dict.fromkeys(view for pair in self.pairs for view in pair))

    def add(self, outputs: Mapping[str, Float[Tensor, "n d"]], items: Items) -> None:
        """Further items to compare with; they may lack views."""
        for view in self.views:
            here = items.present(view) if view in items else np.zeros(len(items), bool)
            self._present.setdefault(view, []).append(here)
            if here.any():
                at = torch.from_numpy(np.flatnonzero(here))
                self._rows.setdefault(view, []).append(outputs[view][at].detach().float().cpu())
        self.ids.extend(items.ids)
        if self.answers is not None and self.answers in items:
            self._answers.extend(value_keys(items[self.answers]))
        else:
            self._answers.extend([None] * len(items))
        self._ranks = None

    def __len__(self) -> int:
        return len(self.ids)

    def _whole(self, view: str) -> tuple[Float[Tensor, "n d"], Int[np.ndarray, " n"]]:
        """The embeddings of a view, and the positions of the items that have it."""
        parts = self._rows.get(view, [])
        if len(parts) > 1:  # joined once
            parts[:] = [torch.cat(parts)]
        present = np.concatenate(self._present.get(view, [np.zeros(0, bool)]))
        return (parts[0] if parts else torch.zeros(0, 1)), np.flatnonzero(present)

    def directions(self) -> list[tuple[str, str]]:
        """Query and key of every comparison for which there are keys."""
        both = [direction for first, second in self.pairs for direction in ((first, second), (second, first))]
        return [(query, key) for query, key in both if len(self._whole(key)[0])]

    # -- with each other -------------------------------------------------------------------------------------
    def of_all(self, start: int, stop: int) -> dict[str, Sequence[object]]:
        """Columns of the items that were added, from ``start`` to ``stop``; their partners are ranked among the items
        that have both views, so that means of the columns are what the evaluation of a run says of the same items."""
        columns: dict[str, Sequence[object]] = {}
        if self._ranks is None:
            self._ranks = self._own_ranks()
        for query, key in self.directions():
            name = f"{query}_to_{key}"
            vectors, at = self._whole(query)
            if not len(vectors):
                continue
            first, last = np.searchsorted(at, (start, stop))
            columns |= self._nearest(name, key, vectors[first:last], at[first:last] - start, stop - start)
            for metric, values in self._ranks.get(name, {}).items():
                columns[f"{name}/{metric}"] = _or_none(values[start:stop])
        if not columns:
            raise NearfarError(
                f"these {len(self)} items have one view alone, and {' and '.join(self.views)} are compared: there is "
                "nothing to compare with. Give the items of the other view: --gallery FILE."
            )
        return columns

    def _own_ranks(self) -> dict[str, dict[str, Float[np.ndarray, " n"]]]:
        """By direction rank and contributions of every item, NaN where it has no partner."""
        known: dict[str, dict[str, np.ndarray]] = {}
        for first, second in self.pairs:
            (queries, a), (keys, b) = self._whole(first), self._whole(second)
            both = np.intersect1d(a, b)
            if len(both) < 2:
                continue
            relevant = None
            if self.answers is not None:
                numbers = self._numbers([self._answers[i] for i in both])
                relevant = (numbers, numbers)
            of_first, of_second = (torch.from_numpy(np.searchsorted(own, both)) for own in (a, b))
            ranks = retrieval_ranks(queries[of_first], keys[of_second], relevant, both=True)
            for name, direction in zip((f"{first}_to_{second}", f"{second}_to_{first}"), ranks, strict=True):
                known[name] = _contributions(direction, both, len(self))
        return known

    # -- with others -----------------------------------------------------------------------------------------
    def of_others(
        self, outputs: Mapping[str, Float[Tensor, "m d"]], items: Items
    ) -> dict[str, Sequence[object]]:
        """The columns of other items. The partner of one is the item of its id, where there is such."""
        columns: dict[str, Sequence[object]] = {}
        for query, key in self.directions():
            here = items.present(query) if query in items else np.zeros(len(items), bool)
            at = np.flatnonzero(here)
            if not len(at) and query not in items:
                continue
            name = f"{query}_to_{key}"
            vectors = outputs[query][torch.from_numpy(at)].detach().float().cpu()
            columns |= self._nearest(name, key, vectors, at, len(items))
            relevant = self._partners(items, at, key)
            if relevant is not None:
                ranks = _contributions(
                    retrieval_ranks(vectors, self._whole(key)[0], relevant), at, len(items)
                )
                columns |= {f"{name}/{metric}": _or_none(values) for metric, values in ranks.items()}
        if not columns:
            keys = " or ".join(dict.fromkeys(key for _, key in self.directions()))
            raise NearfarError(
                f"{items.source} has no view that could be compared with what the gallery has ({keys or 'nothing'}); "
                f"the views that are compared are {' and '.join(self.views)}."
            )
        return columns

    def _partners(self, items: Items, at: Int[np.ndarray, " q"], key: str) -> object:
        """What is relevant of the gallery to these items; None: nothing is to any."""
        owners = self._whole(key)[1]
        if self.answers is not None:
            if self.answers not in items:
                return None
            values = value_keys(items[self.answers])
            own = [values[i] for i in at.tolist()]
            theirs = [self._answers[i] for i in owners.tolist()]
            if not (set(own) & set(theirs)) - {None}:
                return None
            numbers = self._numbers([*own, *theirs])
            return numbers[: len(own)], numbers[len(own) :]
        place = {self.ids[owner]: i for i, owner in enumerate(owners.tolist())}
        partners = [place.get(items.ids[i], -1) for i in at.tolist()]
        return partners if max(partners, default=-1) >= 0 else None

    @staticmethod
    def _numbers(values: Sequence[object]) -> Int[np.ndarray, " n"]:
        """Equal numbers for equal values, −1 for a missing one."""
        seen: dict[object, int] = {}
        return np.array([-1 if value is None else seen.setdefault(value, len(seen)) for value in values])

    def _nearest(
        self, name: str, key: str, vectors: Tensor, at: Int[np.ndarray, " q"], n: int
    ) -> dict[str, Sequence[object]]:
        keys, owners = self._whole(key)
        cosines, positions = nearest_keys(vectors, keys, self.k)
        nearest: list[object] = [None] * n
        similar: list[object] = [None] * n
        for i, row, values in zip(at.tolist(), positions.tolist(), cosines.tolist(), strict=True):
            nearest[i] = [self.ids[owners[each]] for each in row]
            similar[i] = values
        return {f"{name}/nearest": nearest, f"{name}/cosine": similar}


def _contributions(ranks: Ranks, at: Int[np.ndarray, " q"], n: int) -> dict[str, Float[np.ndarray, " n"]]:
    """Expected rank, R@1 and reciprocal rank of the queries, which are the items ``at`` of n; NaN of the others."""
    numbers = {"rank": ranks.expected(), "R@1": ranks.hits(1), "MRR": ranks.reciprocal()}
    columns = {}
    for name, values in numbers.items():
        columns[name] = np.full(n, np.nan)
        columns[name][at[ranks.queries]] = values
    return columns


def _or_none(values: Float[np.ndarray, " n"]) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


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
