"""Galleries as stores: filled from a user's data or the run's own, kept, and opened again in a blink."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.data.cache import cache_dir, content_key
from nearfar.data.chunks import NewData
from nearfar.data.files import Json
from nearfar.data.images import thumbnail
from nearfar.data.items import Column, Items
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name
from nearfar.serving.stores import (
    Kind,
    VectorStore,
    column_kind,
    create_store,
    open_store,
    plain_column,
    plain_value,
    store_exists,
)
from nearfar.serving.stream import state_of
from nearfar.systems import build_system
from nearfar.towers.build import tower_folder
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from nearfar.serving.trained import Trained

__all__ = ["Names", "Source", "file_source", "open_gallery", "own_source", "value_store"]

_SIDE = 96  # pixels of a picture that is kept in the store, because it lies in no file
_QUERIES = 256  # values of the query's view by which the recall of a large gallery is measured

Say = Callable[[str], None]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Source:
    """What a gallery is made of: ``name`` for people, ``key`` equal where the content is the same, items in chunks."""

    name: str
    key: str
    chunks: Callable[[], Iterable[Items]]
    advice: str = ""


def file_source(trained: Trained, data: NewData) -> Source:
    """A user's table or folder, with all of its columns."""
    path = Path(data.path).expanduser().absolute()  # pictures are shown from any folder later
    if not path.exists():
        raise NearfarError(f"{path}: no such file or folder to search in.")
    named = [dict(data.columns), data.id_column, data.encoding, str(data.images), dict(data.options)]
    key = content_key(state_of(path), named)
    whole = replace(data, path=path, others=True)
    advice = "Name it with --column {view}=HEADER, or search {others} with --target."
    return Source(str(path), key, lambda: trained.system.new_items(whole), advice)


def own_source(trained: Trained) -> Source:
    """The data of the run, read again, of which every item has its split in the column ``split``.

    Raises:
        NearfarError: data that is not there any more, or has changed since the run was trained.
    """
    folder = RunFolder(trained.path)
    layout = folder.read_json("dataset_layout.json") if folder.has("dataset_layout.json") else {}
    trained_on = layout.get("data_hash")
    advice = "Give a table to search in: --gallery FILE."
    if trained_on is None:
        raise NearfarError(f"{trained.path} does not say which data it was trained on. {advice}")

    def chunks() -> Iterator[Items]:
        system = build_system(trained.config)
        try:
            splits, current = system.own_data(lambda _: None)
        except NearfarError as error:
            raise NearfarError(
                f"{trained.path}: the run's data cannot be read again ({error}) {advice}"
            ) from None
        if current != trained_on:
            raise NearfarError(
                f"{trained.path}: its data files have changed since it was trained (content hash {trained_on} then, "
                f"{current} now). {advice}"
            )
        ids = [identity for items in splits.values() for identity in items.ids]
        distinct = len(set(ids)) == len(ids)
        for name, items in splits.items():
            columns = (
                dict(items.columns) if "split" in items else items.columns | {"split": [name] * len(items)}
            )
            names = items.ids if distinct else [f"{name}/{identity}" for identity in items.ids]
            yield from _parts(replace(items, ids=names, columns=columns, rejections=Rejections()))

    key = content_key(trained_on, [state_of(path) for path in _paths_in(trained.config)])
    return Source("the run's data", key, chunks, "This run has no such column.")


def _parts(items: Items, rows: int = 4096) -> Iterator[Items]:
    for start in range(0, len(items), rows):
        yield items.take(range(start, min(start + rows, len(items))))


def _paths_in(config: object) -> list[Path]:
    """Files and folders that the options of a run's data name."""
    data = getattr(config, "data", None)
    values = list(vars(data).values()) if hasattr(data, "__dict__") else []
    values += [each for value in values if isinstance(value, (list, tuple)) for each in value]
    named = {str(value) for value in values if isinstance(value, (str, Path)) and str(value)}
    return [Path(name) for name in sorted(named) if os.sep in name or os.path.exists(name)]


# -- opening -------------------------------------------------------------------------------------------------
def open_gallery(
    trained: Trained,
    source: Source | None,
    target: str | None,
    *,
    query: str | None = None,
    place: str | None = None,
    folder: Path | None = None,
    refill: bool = False,
    say: Say = lambda _: None,
    advance: Advance = lambda _: None,
) -> VectorStore:
    """The store of a gallery, filled if it is not yet; its view stands in ``about["view"]``.

    Args:
        trained: the run.
        source: what is searched; None: what the store holds, or else the run's own data.
        target: the view that is embedded; None: the first that the source has and that is not the query's.
        query: the view of the queries, some of which measure the recall of a large gallery.
        place: of the store (`create_store`); None: ``galleries/`` beside the run, or in the cache where nothing can be
            written there.
        folder: where a store is kept that is not beside the run yet, in the place of ``galleries/``.
        refill: fill the store anew.
        say, advance: are told what is done, and how many rows.

    Raises:
        NearfarError: a source without the view, a store that holds something else, that was filled by a different
        model.
    """
    if target is not None and target not in trained.views:
        raise NearfarError(f"{trained.path} has no view '{target}': {nearest_name(target, trained.views)}")
    if not trained.views:
        trained.view_of(())  # says that this run embeds nothing
    if place is not None and store_exists(place) and not refill:
        store = open_store(place)
        try:
            _check(trained, store, source, target)
        except BaseException:
            store.close()
            raise
        if store.about.get("complete", True):
            return store
        target, source = store.about["view"], source or _source_again(trained, store)
        return _fill(trained, source, target, place, store, query, say, advance)
    source = source or own_source(trained)
    wanted = [target]
    if target is None:
        wanted = [*(view for view in trained.views if view != query), query]
    if place is None:
        own = {view: _own_place(trained, source, view, folder) for view in wanted if view is not None}
        kept = None if refill else _kept(own)
        if kept is not None:
            return kept
        target = _first_view(trained, source, wanted)
        place = own[target]
        _remove_outdated(place, source, target)
    else:
        target = _first_view(trained, source, wanted)
    begun = open_store(place) if store_exists(place) and not refill else None
    return _fill(trained, source, target, place, begun, query, say, advance)


def _own_place(trained: Trained, source: Source, view: str, folder: Path | None) -> str:
    key = content_key(trained.weights_key, source.key, view)[:16]
    name = f"{tower_folder(view)}-{key}.faiss"
    beside = trained.path / "galleries"
    if folder is not None and not store_exists(str(beside / name)):
        return str(folder / name)
    if folder is None and not os.access(beside if beside.exists() else trained.path, os.W_OK):
        return str(cache_dir() / "galleries" / name)
    return str(beside / name)


def _kept(places: dict[str, str]) -> VectorStore | None:
    """The complete gallery of the first view that its source has, if it is there."""
    before: list[str] = []
    for view, place in places.items():
        if store_exists(place):
            store = open_store(place)
            if store.about.get("complete") and not set(before) & set(store.about.get("views", ())):
                return store
            store.close()
        before.append(view)
    return None


def _remove_outdated(place: str, source: Source, view: str) -> None:
    """Galleries of the same file in an earlier state: nothing opens them again."""
    for path in Path(place).parent.glob(f"{tower_folder(view)}-*.faiss"):
        if str(path) != place and store_exists(str(path)):
            try:
                about = open_store(str(path)).about
            except NearfarError:
                continue
            if about.get("source") == source.name:
                shutil.rmtree(path, ignore_errors=True)


def _first_view(trained: Trained, source: Source, wanted: Sequence[str | None]) -> str:
    first = next(iter(source.chunks()), None)
    if first is None:
        raise NearfarError(f"{source.name}: nothing to search in.")
    for view in wanted:
        if view is not None and view in first:
            return view
    raise _lacks(trained, source, first, wanted[0])


def _lacks(trained: Trained, source: Source, items: Items, view: str | None) -> NearfarError:
    others = " or ".join(each for each in trained.views if each in items and each != view) or "nothing"
    advice = source.advice.format(view=view, others=others)
    return NearfarError(f"{source.name} has no column of '{view}' to search. {advice}")


def _check(trained: Trained, store: VectorStore, source: Source | None, target: str | None) -> None:
    about, place = store.about, store.shown
    anew = "Give a different --store, or fill it anew with --refill."
    if about.get("weights", trained.weights_key) != trained.weights_key:
        raise NearfarError(
            f"{place} was filled by a different model ({about.get('run')}), whose vectors mean nothing to this one. "
            f"{anew}"
        )
    if store.dim != trained.dim:
        raise NearfarError(
            f"{place} holds vectors of {store.dim} numbers, and this run's have {trained.dim}. {anew}"
        )
    view = about.get("view")
    if target is not None and view is not None and view != target:
        raise NearfarError(f"{place} holds vectors of '{view}', and not of '{target}'. {anew}")
    if source is not None and about.get("key") != source.key:
        held = about.get("source", "something else")
        same = " in an earlier state" if held == source.name else ""
        raise NearfarError(
            f"{place} holds {held}{same}, and not {source.name}{' as it is now' if same else ''}. Leave --gallery "
            f"out to search what it holds. {anew}"
        )


def _source_again(trained: Trained, store: VectorStore) -> Source:
    """The source of a store whose fill was interrupted, where that is the run's own data."""
    source = own_source(trained)
    if store.about.get("key") != source.key:
        raise NearfarError(
            f"{store.shown} was not filled to the end. Give its data again ({store.about.get('source')}) with "
            "--gallery."
        )
    return source


# -- filling -------------------------------------------------------------------------------------------------
def _fill(
    trained: Trained,
    source: Source,
    target: str,
    place: str,
    store: VectorStore | None,
    query: str | None,
    say: Say,
    advance: Advance,
) -> VectorStore:
    """Fill a store chunk by chunk; one that was begun goes on after its last chunk."""
    done = 0 if store is None else int(store.about.get("rows", 0))
    if done:
        say(f"{place}: goes on after {done:,} rows")
    rejections, empty = Rejections(), Rejections()
    names = Names()
    asked = _Sample(_QUERIES)
    position = 0
    for items in source.chunks():
        rejections.extend(items.rejections)
        if target not in items:
            raise _lacks(trained, source, items, target)
        present = np.flatnonzero(items.present(target))
        for row in sorted(set(range(len(items))) - set(present.tolist())):
            number = items.rows[row] if items.rows else None
            rejections.add(f"no '{target}'", number, items.ids[row])
        ids = names.distinct(items)
        if query is not None and query != target and query in items:
            asked.extend(items.take(np.flatnonzero(items.present(query)))[query])
        if store is None:
            columns = _columns(trained, items)
            kinds = _kinds(trained, columns)
            store = create_store(place, trained.dim, kinds, _about(trained, source, target, items))
        if position >= done and len(present):
            chosen = items.take(present)
            vectors = trained.vectors(chosen[target], target)
            values = _fitting(store.kinds, _columns(trained, chosen), chosen, empty)
            store.add([ids[i] for i in present.tolist()], vectors, values, {"rows": position + len(items)})
        position += len(items)
        advance(len(items))
    if store is None or not len(store):
        raise NearfarError(f"{source.name}: nothing to search in; {rejections.summary()}.")
    if len(rejections):
        say(f"{source.name}: {rejections.summary()}")
    if len(empty):
        say(f"{source.name}: values left empty: {empty.summary().partition(': ')[2]}")
    if names.repeated:
        say(
            f"{source.name}: {names.repeated:,} ids were there already and got a number, such as {names.example}"
        )
    if store.approximate_from is not None and len(store) >= store.approximate_from:
        say(f"{source.name}: {len(store):,} rows, for which an index is built")
        some = asked.values
        queries = trained.vectors(some, query) if query is not None and len(some) >= 50 else None
        store.finish(queries, f"values of '{query}'")
    else:
        store.finish()
    store.note(complete=True)
    return store


def _about(trained: Trained, source: Source, target: str, items: Items) -> Json:
    views = [view for view in trained.views if view in items]
    return {
        "run": str(trained.path),
        "weights": trained.weights_key,
        "view": target,
        "views": views,
        "kinds": {view: trained.kind(view) for view in views},
        "source": source.name,
        "key": source.key,
        "rows": 0,
        "complete": False,
    }


class Names:
    """Ids that differ: one that was there already gets a number behind it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.repeated, self.example = 0, ""

    def distinct(self, items: Items) -> list[str]:
        names = []
        for identity in items.ids:
            name, number = identity, 1
            while name in self.seen or not name:
                number += 1
                name = f"{identity}#{number}"
            if name != identity:
                self.repeated += 1
                self.example = self.example or name
            self.seen.add(name)
            names.append(name)
        return names


class _Sample:
    """So many of the values of a stream, each as likely as any other."""

    def __init__(self, size: int) -> None:
        self.size, self.values, self.count = size, list[object](), 0
        self._generator = np.random.default_rng(0)

    def extend(self, values: Iterable[object]) -> None:
        for value in values:
            self.count += 1
            if len(self.values) < self.size:
                self.values.append(value)
            elif (at := int(self._generator.integers(self.count))) < self.size:
                self.values[at] = value


def _columns(trained: Trained, items: Items) -> dict[str, list[object]]:
    """The columns of items that a store keeps: texts, numbers, Booleans, and pictures by their paths.

    A picture that lies in no file is kept itself, small, as a data address. Ids are no column.
    """
    columns: dict[str, list[object]] = {}
    for name, values in items.columns.items():
        if name in trained.views and trained.kind(name) == "image":
            columns[name] = [_picture(value) for value in values]
        elif isinstance(values, np.ndarray):
            if values.ndim == 1 and values.dtype.kind in "biufUS":
                columns[name] = values.tolist()
        elif all(value is None or isinstance(value, (str, int, float, Path)) for value in values):
            columns[name] = [str(value) if isinstance(value, Path) else value for value in values]
    return {
        name: values
        for name, values in columns.items()
        if any(value is not None for value in values) and list(map(str, values)) != items.ids
    }


def _kinds(trained: Trained, columns: Mapping[str, Sequence[object]]) -> dict[str, Kind]:
    """What columns hold, by their first rows: those of views as they are, of others also numbers in writing."""
    return {
        name: column_kind(values if name in trained.views else plain_column(values))
        for name, values in columns.items()
    }


def _picture(value: object) -> str | None:
    if value is None or isinstance(value, (str, Path)):
        return None if value is None else str(value)
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8:
        return None
    return "data:image/png;base64," + base64.b64encode(thumbnail(pixels, _SIDE)).decode()


def _fitting(
    kinds: Mapping[str, Kind], columns: Mapping[str, list[object]], items: Items, empty: Rejections
) -> dict[str, list[object]]:
    """Every column of the store; a value that does not fit its kind, as the first rows gave it, is left empty."""
    fitting: dict[str, list[object]] = {}
    for name, kind in kinds.items():
        values = columns.get(name, [None] * len(items))
        if kind != "text":
            values = [plain_value(value) for value in values]
            for i, value in enumerate(values):
                if value is not None and column_kind([value]) != kind and value == value:
                    number = items.rows[i] if items.rows else None
                    empty.add(f"no {kind} in '{name}'", number, value)
                    values[i] = None
        fitting[name] = values
    return fitting


def value_store(trained: Trained, values: Column, view: str) -> VectorStore:
    """A list of values as a store in a temporary folder, which goes when the store does; ids are their positions."""
    folder = tempfile.mkdtemp(prefix="nearfar-")
    vectors = trained.embed(values, view)
    items = Items([str(i) for i in range(len(values))], {view: values})
    columns = _columns(trained, items)
    kinds = _kinds(trained, columns)
    about = {
        "view": view,
        "kinds": {view: trained.kind(view)},
        "source": "the values",
        "weights": trained.weights_key,
    }
    store = create_store(os.path.join(folder, "values.faiss"), trained.dim, kinds, about)
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    store.add(items.ids, vectors, columns)
    store.finish()
    return store
