"""A trained run as a tool: its best model with everything that new values need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from nearfar.config.compose import read_config
from nearfar.config.training import RunOptions
from nearfar.config.views import ViewOptions
from nearfar.data.cache import content_key, without_cache
from nearfar.data.chunks import NewData
from nearfar.data.files import Json
from nearfar.data.items import Column, Items
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name
from nearfar.serving.exported import download, exported_name, is_exported, is_hub_name, read_members
from nearfar.systems import build_system
from nearfar.towers.build import guess_tower
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.evaluation import consecutive
from nearfar.training.run_folder import RunFolder
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import System, collect, rows_of

if TYPE_CHECKING:
    from nearfar.serving.search import Searched

__all__ = ["Predictions", "Trained", "load"]

#: values that are read before they are embedded; what their tower reads of them is in memory at once
_CHUNK = 1024

#: new data: a file or folder, items, a column of values for each view, or the values of the only view
Data = Items | NewData | str | Path | Mapping[str, Column] | Sequence[object]


@dataclass
class Predictions:
    """Predictions for new items: named columns with a value for each id, and what could not be read.

    >>> predictions = Predictions(["a", "b"], {"class": ["cat", "dog"], "p": [0.9, 0.6]})
    >>> len(predictions), next(iter(predictions))
    (2, {'id': 'a', 'class': 'cat', 'p': 0.9})
    """

    ids: list[str]
    columns: dict[str, list[object]]
    rejections: Rejections = field(default_factory=Rejections)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Json]:
        for at, identity in enumerate(self.ids):
            yield {"id": identity, **{name: values[at] for name, values in self.columns.items()}}

    def __getitem__(self, column: str) -> list[object]:
        if column not in self.columns:
            raise NearfarError(f"predictions have no column '{column}'; {nearest_name(column, self.columns)}")
        return self.columns[column]


@dataclass(frozen=True)
class _Member:
    """One trained model: a system without its training data, and the model of its best checkpoint."""

    system: System
    model: nn.Module


class Trained:
    """A trained run, ready to embed, search and predict; `load` makes it.

    ``views`` are what can be embedded. The model is that of the best checkpoint, in eval mode on ``device``. Of an
    ensemble every member is loaded: embeddings are the members' side by side, so that a cosine is the mean of theirs,
    and predictions come from their averaged outputs.
    """

    def __init__(self, path: Path, members: Sequence[_Member], device: torch.device) -> None:
        if not members:
            raise NearfarError(f"{path}: no model is here.")
        self.path, self.device = path, device
        self.members = list(members)
        self.system: System = members[0].system
        self.model = members[0].model
        self.config: RunOptions = self.system.config

    @property
    def name(self) -> str:
        """The name of the run or folder; of an exported one that of its run."""
        return exported_name(self.path) or self.path.resolve().name

    @property
    def views(self) -> list[str]:
        """The views that can be embedded, in order; none of a system that embeds nothing, such as a detector."""
        return self.system.views

    def kind(self, tower: str | None = None) -> str:
        """The kind of a view's tower: text, image, molecule, vector, expression, …"""
        return str(self.system.towers[self.view_of((), tower)].kind)

    @property
    def dim(self) -> int:
        """The length of an embedding: of every view the same."""
        if not self.views:
            raise NearfarError(self._embeds_nothing())
        return sum(each.system.view_dim(each.model, self.views[0]) for each in self.members)

    def __repr__(self) -> str:
        views = ", ".join(f"{view} ({self.kind(view)})" for view in self.views) or "no views"
        return f"<{type(self).__name__} {self.path}: {self.config.system}; {views}>"

    def _embeds_nothing(self) -> str:
        return f"{self.path}: a run of '{self.config.system}' embeds nothing; it predicts: nearfar predict."

    # -- embedding -------------------------------------------------------------------------------------------
    def view_of(self, values: Column, tower: str | None = None) -> str:
        """The view whose tower embeds these values: the one that is named, the only one, or the only one whose kind
        the values call for."""
        views = self.views
        if not views:
            raise NearfarError(self._embeds_nothing())
        if tower is not None:
            if tower not in views:
                raise NearfarError(f"{self.path} has no view '{tower}': {nearest_name(tower, views)}")
            return tower
        if len(views) == 1:
            return views[0]
        wanted = guess_tower(values) if len(values) else None
        fitting = [view for view in views if self.system.towers[view].kind == wanted]
        if len(fitting) != 1:
            raise NearfarError(
                f"{self.path} embeds {', '.join(views)}: say which is meant, as tower={views[0]!r} (--tower "
                f"{views[0]})."
            )
        return fitting[0]

    def check(self, values: Column, tower: str | None = None) -> list[str | None]:
        """For each value why it cannot be embedded; None where it can."""
        with (
            without_cache()
        ):  # values that are seen once: what is decoded to be checked, `vectors` need not read again
            return self.system.towers[self.view_of(values, tower)].check(values)

    def embed(
        self,
        values: Column,
        tower: str | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Float[np.ndarray, "n dim"]:
        """Unit vectors of values, float32, in their order; computed in batches, and nothing is kept in the cache.

        They are computed in single precision, whatever the run was evaluated in.

        Args:
            values: texts, paths of pictures or arrays of their pixels, SMILES, rows of numbers: what the tower reads.
            tower: the view whose tower embeds them; needed where several could.
            batch_size: rows that are computed at once; None: ``trainer.eval_batch_size`` of the run.
            progress: shows a bar.

        Raises:
            NearfarError: an unknown tower, a value that cannot be read (which, and why).
        """
        if isinstance(values, (str, bytes, Path)):
            raise NearfarError("embed takes a list of values; put a single one into [ ].")
        view = self.view_of(values, tower)
        if not len(values):
            return np.zeros((0, self.dim), np.float32)
        for at, reason in enumerate(self.check(values, view)):
            if reason is not None:
                shown = "" if isinstance(values, np.ndarray) else f" ({str(values[at])[:80]!r})"
                raise NearfarError(f"value {at}{shown} cannot be embedded as '{view}': {reason}.")
        return self.vectors(values, view, batch_size=batch_size, progress=progress)

    def vectors(
        self,
        values: Column,
        view: str,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Float[np.ndarray, "n dim"]:
        """As `embed`, of values that were checked."""
        size = batch_size or self.config.trainer.eval_batch_size
        if size < 1:
            raise NearfarError(f"batch_size={size}: at least one row is needed.")
        parts: list[list[np.ndarray]] = [[] for _ in self.members]
        with _bar(len(values), progress) as advance, without_cache(), torch.inference_mode():
            for start in range(0, len(values), _CHUNK):
                some = values[start : start + _CHUNK]
                for member, own in zip(self.members, parts, strict=True):
                    inputs = member.system.towers[view].read(some)
                    for positions in consecutive(len(inputs), size):
                        field = inputs.batch(torch.tensor(positions)).to(self.device)
                        rows = member.system.embed_view(member.model, view, field).float()
                        own.append(normalize(rows, dim=1).cpu().numpy())
                advance(len(some))
        joined = [np.concatenate(own) for own in parts]
        if len(joined) == 1:
            return joined[0]
        return np.concatenate(joined, axis=1) / np.float32(np.sqrt(len(joined)))

    # -- prediction ------------------------------------------------------------------------------------------
    def outputs(self, items: Items) -> dict[str, Tensor]:
        """What the system's ``embed`` gives of new items, as the run's own evaluation computes it; of an ensemble the
        average."""
        every = []
        size = self.config.trainer.eval_batch_size
        with without_cache(), torch.inference_mode(), self._precision():
            for member in self.members:
                dataset = member.system.new_dataset(items)
                parts = [
                    member.system.embed(member.model, dataset.__getitems__(positions).to(self.device))
                    for positions in consecutive(len(dataset), size)
                ]
                every.append(collect(parts))
        return every[0] if len(every) == 1 else self.system.average(every)

    def _precision(self) -> AbstractContextManager[object]:
        """The precision that the run was evaluated in, where this device has it."""
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.config.trainer.precision)
        if dtype is None or (dtype is torch.float16 and self.device.type != "cuda"):
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    def new_items(self, data: NewData | str | Path) -> Iterator[Items]:
        """The items of a file or folder, in chunks, as the system reads new data."""
        source = data if isinstance(data, NewData) else NewData(Path(data))
        known = self.system.new_options
        for name in source.options:
            if name not in known:
                listed = nearest_name(name, known) if known else "there are none"
                raise NearfarError(
                    f"data of '{self.config.system}' is read without an option '{name}': {listed}"
                )
        return self.system.new_items(source)

    def predict(
        self,
        data: Data,
        *,
        gallery: Data | None = None,
        k: int | None = None,
        progress: bool = False,
    ) -> Predictions:
        """Predictions for new items, as the run's own evaluation would have made them.

        Args:
            data: a file or folder, a list of values of the only view, or a column of values for each view.
            gallery: what items are compared with, of a system whose predictions are comparisons, or that can make such:
                the same kinds of data. None: with each other.
            k: how many nearest items are given; None: as many as the system says.
            progress: shows a bar.
        """
        whole = Predictions([], {})
        with _bar(None, progress) as advance:
            chunks, predict = self.prediction(data, gallery, k)
            for items in chunks:
                whole.rejections.extend(items.rejections)
                if len(items):
                    rows, columns = rows_of(predict(items), items)
                    whole.ids.extend(rows.ids)
                    for name, values in columns.items():
                        whole.columns.setdefault(name, []).extend(_plain(values))
                    advance(len(items))
        return whole

    def prediction(
        self, data: Data, gallery: Data | None = None, k: int | None = None
    ) -> tuple[Iterator[Items], Callable[[Items], Mapping[str, Sequence[object]]]]:
        """Items in chunks, and what gives the predictions of the chunk that was handed out last.

        Where items are compared with each other, all are embedded first, and chunks have ids alone.
        """
        comparison = self.system.comparison(gallery is not None, k)
        if comparison is None:
            if gallery is not None or k is not None:
                raise NearfarError(
                    f"a run of '{self.config.system}' predicts each item by itself; leave --gallery and --k out."
                )
            return self._chunks(data), lambda items: self.system.predictions(self.outputs(items), items)
        if gallery is not None:
            unread = Rejections()
            for items in self._chunks(gallery):
                unread.extend(items.rejections)
                if len(items):
                    comparison.add(self.outputs(items), items)
            rest = _counting(self._chunks(data), unread.named("gallery: "))
            return rest, lambda items: comparison.of_others(self.outputs(items), items)
        seen: list[Items] = []
        for items in self._chunks(data):
            if len(items):
                comparison.add(self.outputs(items), items)
            seen.append(replace(items, columns={}))
        place = [0, 0]

        def chunks() -> Iterator[Items]:
            for items in seen:
                place[:] = place[1], place[1] + len(items)
                yield items

        return chunks(), lambda _: comparison.of_all(*place)

    def _chunks(self, data: Data) -> Iterator[Items]:
        if isinstance(data, (str, Path, NewData)):
            source = data if isinstance(data, NewData) else NewData(Path(data))
            size = self.config.trainer.eval_batch_size  # whole batches, as in the run's evaluation
            return self.new_items(replace(source, rows=max(size, source.rows - source.rows % size)))
        return iter([self.items_of(data)])

    def items_of(self, data: Items | Mapping[str, Column] | Sequence[object]) -> Items:
        """Values as items; one that cannot be read is an error that names it."""
        if isinstance(data, Items):
            return data
        if not isinstance(data, Mapping) and not self.views:
            return self.system.items_of(data)
        if not isinstance(data, Mapping):
            if len(self.views) != 1:
                known = ", ".join(self.views) or "none"
                raise NearfarError(
                    f"give a column for each view, as {{view: values}}; the views are: {known}."
                )
            data = {self.views[0]: data}
        for view in data:
            if view not in self.views:
                raise NearfarError(f"{self.path} has no view '{view}': {nearest_name(str(view), self.views)}")
        n = len(next(iter(data.values()), ()))
        items = Items([str(i) for i in range(n)], dict(data), "the values")
        usable = self.system.usable(items) if hasattr(self.system, "usable") else items
        if len(usable.rejections):
            raise NearfarError(f"the values: {usable.rejections.summary()}.")
        return usable

    # -- search ----------------------------------------------------------------------------------------------
    @cached_property
    def weights_key(self) -> str:
        """Names the weights: what they embedded means nothing to others."""
        return content_key(
            [
                [
                    [name, value.detach().float().cpu().numpy()]
                    for name, value in each.model.state_dict().items()
                ]
                for each in self.members
            ]
        )

    def search(
        self,
        query: object,
        gallery: Searched = None,
        k: int = 10,
        *,
        tower: str | None = None,
        target: str | None = None,
        where: str | Sequence[str] | None = None,
        exact: bool = False,
    ) -> Any:
        """The nearest items of a gallery: `Hits` for a query, and a list of these for a list of queries.

        Args:
            query: a text, the path of a picture, a SMILES, a row of numbers: what one of the towers reads; or a list.
            gallery: a list of values; a table or folder; a store or its place (``lance:FOLDER``, docs/search.md); None:
                the data that the run was trained on. What is no list is embedded once, and kept beside the run.
            k: how many; fewer come where fewer are there.
            tower: the view whose tower reads the query; None: the only one, or the one that it looks like.
            target: the view that is searched; None: the first that the gallery has and that is not the query's.
            where: a filter by columns, such as ``"price<10,lang in de,en"``.
            exact: compare with every item, also where a large gallery has an index.

        Raises:
            NearfarError: a query that cannot be read, a gallery without the target, data that has changed.
        """
        from nearfar.serving.search import gallery_of, query_view, search

        queries: Column
        if isinstance(query, np.ndarray):  # a row of numbers or the pixels of a picture, or several of these
            picture = query.dtype == np.uint8 and query.ndim > 1
            many = query.ndim > (2 + (query.shape[-1] in (3, 4)) if picture else 1)
            queries = query if many else np.asarray(query)[None]
        elif isinstance(query, (list, tuple)):
            many, queries = True, query
        else:
            many, queries = False, [query]
        if not len(queries):
            return []
        view = query_view(self, queries, tower)
        store = gallery_of(self, gallery, target, view)
        try:
            answers = search(self, queries, store, k, view=view, where=where, exact=exact)
        finally:
            if store is not gallery:
                store.close()
        return answers if many else answers[0]

    # -- what it is ------------------------------------------------------------------------------------------
    def describe(self) -> Json:
        """What this is: system, views with their towers, data and results of the run, as plain values."""
        about: Json = {
            "name": self.name,
            "system": self.config.system,
            "members": len(self.members),
            "views": {
                view: {"kind": tower.kind, "tower": tower.description}
                for view, tower in self.system.towers.items()
            },
            "device": str(self.device),
        }
        if self.views:
            about["dim"] = self.dim
        folder = RunFolder(self.path)
        for name, file in (("data", "dataset_layout.json"), ("results", "metrics.json")):
            if folder.has(file):
                about[name] = folder.read_json(file)
        return about


def load(path: str | os.PathLike[str], device: str = "auto") -> Trained:
    """A trained run as a tool: embed, search, predict.

    Args:
        path: a run folder, a checkpoint in one, an ensemble, an exported folder, or a name on the Hugging Face hub.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto": a GPU where there is one.

    Raises:
        NearfarError: no such run, one without a checkpoint, files that are damaged or of a newer version.

    >>> import nearfar
    >>> model = nearfar.load("runs/NAME")                                    # doctest: +SKIP
    >>> model.embed(["a review", "a second one"]).shape                      # doctest: +SKIP
    (2, 128)
    """
    place = Path(path).expanduser()
    if not place.exists() and is_hub_name(str(path)) and not place.parent.is_dir():
        place = download(str(path))
    members = _members(place)
    chosen = _device(device)
    built = [_Member(system, model.to(chosen).eval()) for system, model in members]
    return Trained(place if place.is_dir() else RunFolder.of(place).path, built, chosen)


def _members(place: Path) -> list[tuple[System, nn.Module]]:
    """System and model of a run, or of each member of an ensemble."""
    if is_exported(place):
        return read_members(place)
    folder = RunFolder(place)
    if place.is_dir() and folder.has("metrics.json"):
        members = folder.read_json("metrics.json").get("members")
        if members:
            loaded = [_of_run(_beside(place, Path(str(member)))) for member in members]
            loaded[0][0].load_results(place)
            return loaded
    return [_of_run(place)]


def _beside(ensemble: Path, member: Path) -> Path:
    """A member's folder as the ensemble names it, or of that name near the ensemble, where all were moved."""
    for tried in (member, ensemble.parent / member.name, ensemble.parent / member.parent.name / member.name):
        if tried.is_dir():
            return tried
    raise NearfarError(
        f"{ensemble} is an ensemble, and its member {member.name} is not to be found, neither at {member} nor beside "
        "it. Put the members beside it."
    )


def _of_run(place: Path) -> tuple[System, nn.Module]:
    path = find_checkpoint(place, prefer="best")
    folder = RunFolder.of(path)
    folder.check_format()
    config = read_config(folder.config(), saved=True)
    if isinstance(config, ViewOptions):
        config = replace(config, memory=0)  # of earlier batches, for training alone
    system: System = build_system(config)
    system.load_assets(folder.path)
    model = initial_model(system, config.seed)
    load_weights(model, Checkpoint.load(path), system, str(path))
    return system, model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise NearfarError(f"device={name!r} cannot be used here ({first}); take cpu.") from None
    return device


def _bar(total: int | None, show: bool) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar as a context that gives a function to advance it."""
    if not show:
        return nullcontext(lambda _: None)
    from nearfar.terminal import progress_bar

    return progress_bar(total)


def _counting(chunks: Iterator[Items], unread: Rejections) -> Iterator[Items]:
    """The chunks, the first of which also has these rejections."""
    for items in chunks:
        whole = Rejections()
        whole.extend(items.rejections)
        whole.extend(unread)
        yield replace(items, rejections=whole)
        unread = Rejections()


def _plain(values: Column) -> list[object]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
