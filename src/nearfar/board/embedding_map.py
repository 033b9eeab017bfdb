"""A map of a run's embeddings: items in the plane, what they show, columns to colour them by; all of it as Parquet."""

from __future__ import annotations

import importlib.util
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nearfar.board.discover import Place
from nearfar.data.files import Json
from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.terminal import metric_words
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from nearfar.board.models import Models, Say
    from nearfar.data.items import Items
    from nearfar.serving.trained import Trained

__all__ = ["EmbeddingMap", "Maps", "methods", "stored_map"]

#: items of a map: what a browser draws without a delay
ITEMS = 2000
#: maps that are kept, with the items that they show
KEPT = 3
#: characters of a text that are sent, and classes of a column that are coloured
CHARACTERS, CLASSES = 240, 24
#: scores of single items that a map can be coloured by
SCORES = 8
#: pixels of a picture in a Parquet file
SIDE = 96


def methods() -> dict[str, str]:
    """The projections that the installed libraries give.

    >>> methods()["pca"]
    'principal components'
    """
    known = {"pca": "principal components"}
    if importlib.util.find_spec("umap"):
        known["umap"] = "UMAP"
    if importlib.util.find_spec("sklearn"):
        known["tsne"] = "t-SNE"
    return known


def stored_map(place: Place) -> Json | None:
    """``map.npz`` of a finished run: some rows of the evaluated split in the plane, without what they are."""
    folder = RunFolder(place.path)
    if not place.own or not folder.has("map.npz"):
        return None
    arrays = folder.read_arrays("map.npz")
    views = {name[5:]: array for name, array in arrays.items() if name.startswith("view/")}
    for name, array in views.items():
        if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind != "f":
            raise NearfarError(
                f"{folder.path / 'map.npz'}: {name} is {array.dtype} {array.shape}, not coordinates."
            )
    explained = arrays.get("explained")
    return {
        "method": "pca",
        "explained": None if explained is None or explained.size != 1 else float(explained),
        "views": [
            {"name": name, "x": array[:, 0].tolist(), "y": array[:, 1].tolist()}
            for name, array in views.items()
        ],
        "columns": [],
    }


@dataclass
class EmbeddingMap:
    """Items with the vectors of their views; ``coordinates`` by method, each (items, 2) by view.

    Attributes:
        trained: what embedded them.
        items: those of one split that have every view, or some of them where there are many.
        split: its name.
        among: how many items the split has.
        vectors: (items, dim) unit vectors by view.
        columns: values by name to colour by, and whether they are numbers or classes.
    """

    trained: Trained
    items: Items
    split: str
    among: int
    vectors: Mapping[str, np.ndarray]
    columns: dict[str, tuple[str, Sequence[object]]]
    coordinates: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    explained: float | None = None

    def project(self, method: str) -> dict[str, np.ndarray]:
        """Coordinates of every view in one plane."""
        if method not in methods():
            raise NearfarError(f"there is no projection '{method}' here; there are {', '.join(methods())}.")
        if method not in self.coordinates:
            self.coordinates[method] = self._principal() if method == "pca" else self._neighbouring(method)
        return self.coordinates[method]

    def _principal(self) -> dict[str, np.ndarray]:
        import torch

        from nearfar.training.fit import project

        arrays = project(
            {name: torch.from_numpy(each) for name, each in self.vectors.items()}, rows=len(self.items)
        )
        if arrays is None:
            raise NearfarError(
                "these embeddings have no plane: fewer than two items, or numbers that are not finite."
            )
        self.explained = float(arrays["explained"])
        return {name[5:]: array for name, array in arrays.items() if name.startswith("view/")}

    def _neighbouring(self, method: str) -> dict[str, np.ndarray]:
        together = np.concatenate(list(self.vectors.values()))
        if len(together) < 10:
            raise NearfarError(
                "too few items for a projection by neighbours; principal components show them."
            )
        if method == "umap":
            from umap import UMAP

            plane = UMAP(n_components=2, metric="cosine", random_state=0).fit_transform(together)
        else:
            from sklearn.manifold import TSNE

            perplexity = min(30.0, (len(together) - 1) / 3)
            plane = TSNE(2, init="pca", metric="cosine", perplexity=perplexity, random_state=0).fit_transform(
                together
            )
        parts = np.split(np.asarray(plane, np.float32), len(self.vectors))
        return dict(zip(self.vectors, parts, strict=True))

    # -- what is sent ------------------------------------------------------------------------------------------
    def content(self, method: str) -> Json:
        """As the page draws it."""
        plane = self.project(method)
        shown = {view: [self.shown(row, view) for row in range(len(self.items))] for view in plane}
        return {
            "method": method,
            "methods": methods(),
            "explained": self.explained if method == "pca" else None,
            "split": self.split,
            "among": self.among,
            "ids": [str(each) for each in self.items.ids],
            "views": [
                {
                    "name": view,
                    "x": xy[:, 0].round(5).tolist(),
                    "y": xy[:, 1].round(5).tolist(),
                    "texts": [str(each.get("text") or "")[:CHARACTERS] for each in shown[view]],
                    "pictures": any("url" in each for each in shown[view]),
                }
                for view, xy in plane.items()
            ],
            "columns": [
                {"name": n, "kind": kind, "values": values} for n, (kind, values) in self.columns.items()
            ],
        }

    def shown(self, row: int, view: str) -> Json:
        """What an item shows of a view: text, and ``url`` where it has a picture."""
        from nearfar.serving.shown import shown_value

        return shown_value(self.items[view][row], self.trained.system.towers[view], "picture")

    def picture(self, row: int, view: str) -> tuple[str, bytes]:
        """Media type and bytes of an item's picture."""
        from nearfar.serving.shown import as_picture

        if view not in self.vectors or not 0 <= row < len(self.items):
            raise NearfarError(f"the map has no item {row} with a view '{view}'.")
        return as_picture(self.items[view][row], self.trained.system.towers[view])

    def parquet(self, method: str) -> bytes:
        """A table with a row for each point: id, view, split, x, y, text, the columns, and pictures as PNG.

        ``embedding-atlas map.parquet --x x --y y --text text`` opens it.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        plane = self.project(method)
        views, n = list(plane), len(self.items)
        coordinates = np.concatenate(list(plane.values()))
        columns: dict[str, list[object] | np.ndarray | pa.Array] = {
            "id": [str(each) for each in self.items.ids] * len(views),
            "view": [view for view in views for _ in range(n)],
            "split": [self.split] * (n * len(views)),
            "x": coordinates[:, 0].astype(np.float32),
            "y": coordinates[:, 1].astype(np.float32),
            "text": [str(self.shown(row, view).get("text") or "") for view in views for row in range(n)],
        }
        pictured = [view for view in views if self.trained.kind(view) == "image"]
        if pictured:
            kept = [
                self._thumbnail(row, view) if view in pictured else None for view in views for row in range(n)
            ]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns["picture"] = pa.array(
                [None if p is None else {"bytes": p, "path": None} for p in kept], kind
            )
        for name, (_, values) in self.columns.items():
            columns[f"{name} (column)" if name in columns else name] = [*values] * len(views)
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer, compression="zstd")
        return buffer.getvalue()

    def _thumbnail(self, row: int, view: str) -> bytes | None:
        from nearfar.data.images import thumbnail

        try:
            return thumbnail(self.items[view][row], SIDE)
        except (NearfarError, OSError):
            return None


class Maps:
    """Maps of runs, embedded once for each state of a run's model."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._kept: OrderedDict[str, EmbeddingMap] = OrderedDict()

    def get(self, place: Place) -> EmbeddingMap:
        """The map that was drawn of a run; ``NearfarError`` where none was, or it is too long ago."""
        known = self._kept.get(place.key)
        if known is None:
            raise NearfarError("the map of this run is not in memory (any more): draw it first.")
        return known

    def draw(self, place: Place, method: str, say: Say) -> Json:
        """Embed items of the run's evaluated split and project them."""
        trained = self.models.trained(place, say)
        known = self._kept.get(place.key)
        if known is None or known.trained is not trained:
            known = embedded_items(place, trained, say)
            self._kept[place.key] = known
            self._kept.move_to_end(place.key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        say(f"projecting {len(known.items):,} items")
        return known.content(method)


def embedded_items(place: Place, trained: Trained, say: Say) -> EmbeddingMap:
    """Items of the split that a run was judged on, drawn by a seed where there are many, and their vectors."""
    from nearfar.data.items import joined
    from nearfar.serving.fill import own_source

    if not trained.views:
        raise NearfarError(f"a run of '{trained.config.system}' embeds nothing: there is no map of it.")
    say("reading the run's data")
    items = joined([part for part in own_source(trained).chunks() if len(part)], place.name)
    splits = np.asarray([str(each) for each in items["split"]])
    split = next((name for name in ("test", "val") if (splits == name).any()), str(splits[0]))
    views = [view for view in trained.views if view in items]
    whole = (splits == split) & np.all([items.present(view) for view in views], axis=0)
    at = np.flatnonzero(whole)
    if not len(at):
        raise NearfarError(f"no item of '{split}' has every view ({', '.join(views)}).")
    among = len(at)
    if among > ITEMS:
        at = np.sort(np.random.default_rng(0).choice(at, ITEMS, replace=False))
    chosen = items.take(at)
    vectors = {}
    for view in views:
        say(f"embedding {len(at):,} items: {view}")
        vectors[view] = trained.vectors(chosen[view], view)
    columns = {name: column for name in chosen.columns if name not in (*trained.views, "split")
               if (column := colour_column(chosen[name])) is not None}  # fmt: skip
    if len(views) > 1:
        cosines = np.einsum("nd,nd->n", vectors[views[0]], vectors[views[1]])
        columns["cosine with the partner"] = "number", cosines.astype(float).round(5).tolist()
    columns |= item_scores(place, chosen, split)
    return EmbeddingMap(trained, chosen, split, among, vectors, columns)


def colour_column(values: Column) -> tuple[str, Sequence[object]] | None:
    """A column as points are coloured by it: numbers, or a class of each; None of one that has no few classes.

    >>> colour_column(["a", "b", "a"]), colour_column([0.5, None, 2])
    (('class', ['a', 'b', 'a']), ('number', [0.5, None, 2.0]))
    """
    if isinstance(values, np.ndarray) and values.ndim != 1:
        return None
    plain = [each.item() if isinstance(each, np.generic) else each for each in values]
    known = [each for each in plain if each is not None and each == each]
    if known and all(isinstance(each, int | float) and not isinstance(each, bool) for each in known):
        return "number", [
            float(each) if isinstance(each, int | float) and each == each else None for each in plain
        ]
    if not all(isinstance(each, str | bool | int | float) for each in known):
        return None
    words = ["" if each is None else str(each) for each in plain]
    return ("class", words) if len(set(words)) <= CLASSES else None


def item_scores(place: Place, items: Items, split: str) -> dict[str, tuple[str, Sequence[object]]]:
    """Each item's scores of the final evaluation, where its ids are those of the items."""
    folder = RunFolder(place.path)
    if not folder.has("per_item.npz"):
        return {}
    arrays = folder.read_arrays("per_item.npz")
    ids = arrays.get(f"{split}/ids")
    if ids is None:
        return {}
    position = {str(each): i for i, each in enumerate(ids.tolist())}
    names = [str(each).removeprefix(f"{split}/") for each in items.ids]
    at = [position.get(str(whole), position.get(name)) for whole, name in zip(items.ids, names, strict=True)]
    if sum(each is not None for each in at) < len(at) / 2:
        return {}
    scores: dict[str, tuple[str, Sequence[object]]] = {}
    for name, array in arrays.items():
        if (
            name.startswith(f"{split}/")
            and name != f"{split}/ids"
            and array.ndim == 1
            and len(scores) < SCORES
        ):
            values = [None if each is None else float(array[each]) for each in at]
            scores[metric_words(name.removeprefix(f"{split}/"))] = "number", values
    return scores
