"""Arrays and columns too large for memory, kept by what they were computed from and mapped from disk.

The counterpart of `nearfar.data.cache` for what is filled once and then read in pieces, in any order: one ``.npy`` file
for each array, one Arrow file for the columns of a table, in a folder that appears whole by an atomic rename.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nearfar.data.cache import cache_dir, caching, content_key
from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.items import Column
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["IdPlaces", "MappedColumn", "mapped_arrays", "mapped_columns"]


#: shape and dtype of an array
Layout = tuple[tuple[int, ...], DTypeLike]


def mapped_arrays(
    kind: str,
    key: object,
    layout: Mapping[str, Layout],
    fill: Callable[[dict[str, np.ndarray]], None],
) -> dict[str, np.ndarray]:
    """Arrays of the given shapes, from the cache if they are there, else made and filled by ``fill``.

    Args:
        kind, key: as in `nearfar.data.cache.cached_arrays`.
        layout: shape and dtype of each array, by name.
        fill: writes into all of them; they begin as zeros.

    What is returned is mapped copy-on-write: changing it changes no file. An entry of a different layout or length is
    made anew with a warning; where the disk has no room or cannot be written, arrays are filled in memory, with one.

    >>> os.environ["NEARFAR_CACHE"] = tempfile.mkdtemp()
    >>> def fill(arrays):
    ...     arrays["x"][:] = [1, 2]
    >>> mapped_arrays("example", "numbers", {"x": ((2,), "int16")}, fill)["x"].tolist()
    [1, 2]
    >>> mapped_arrays("example", "numbers", {"x": ((2,), "int16")}, None)["x"].tolist()  # not filled again
    [1, 2]
    >>> del os.environ["NEARFAR_CACHE"]
    """
    if not caching():
        arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
        fill(arrays)
        return arrays
    place = cache_dir() / kind / content_key(key)
    entry = _open(place, layout)
    if entry is not None:
        return entry
    beside: Path | None = None
    try:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(dir=place.parent, prefix=".writing-"))
            arrays = {name: _create(beside / f"{name}.npy", *shape) for name, shape in layout.items()}
        except OSError as error:
            warnings.warn(f"{place} was not written: {error}; arrays are held in memory", stacklevel=2)
            try:
                in_memory = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
            except MemoryError:
                size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
                raise NearfarError(
                    f"{size / 1e9:,.1f} GB are needed, more than there is in memory, and {place.parent} cannot take "
                    f"them ({error}): make room there, or set NEARFAR_CACHE to a folder that has it."
                ) from None
            fill(in_memory)
            return in_memory
        fill(arrays)
        for array in arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        del arrays
        if os.path.lexists(place):  # another process was first, or what was there is damaged
            if (existing := _open(place, layout, warn=False)) is not None:
                return existing
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink()
        try:
            os.rename(beside, place)
        except OSError:  # another process was first, just now
            if _open(place, layout, warn=False) is None:
                raise
        entry = _open(place, layout)
        assert entry is not None
        return entry
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _create(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array on disk, of zeros. Its room is reserved: running out of it later would kill the process."""
    array: np.ndarray = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate") and array.nbytes:
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    return array


def _open(place: Path, layout: Mapping[str, Layout], warn: bool = True) -> dict[str, np.ndarray] | None:
    if not os.path.lexists(place):
        return None
    try:
        arrays = {}
        for name, (shape, dtype) in layout.items():
            path = place / f"{name}.npy"
            if not path.is_file() or path.is_symlink() or place.is_symlink():  # a pipe would be waited for
                raise ValueError(f"{name}.npy is no file of its own")
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
                raise ValueError(f"{name} is {array.dtype} {array.shape}")
            arrays[name] = array
        return arrays
    except Exception as error:  # numpy raises whatever the text in a file's head leads to
        if warn:
            warnings.warn(f"cache entry {place} is damaged ({error}); it is made anew", stacklevel=3)
        return None


_ROWS = 65_536  # of a batch


class IdPlaces:
    """At which position an id stands: 13 bytes for each beside the ids themselves, which are kept as texts.

    >>> places = IdPlaces(["b", "a", "c", "b"])
    >>> places.of(["c", "x", "b"]).tolist()
    [2, -1, 0]
    """

    def __init__(self, ids: Column) -> None:
        self.ids = _texts(ids)
        self._salt = ""
        while True:
            keys = self._hashes(self.ids)
            self._order = np.argsort(keys, kind="stable").astype(np.int32)
            self._keys, ordered = keys[self._order], self.ids[self._order]
            self._new = np.ones(len(self.ids), bool)  # in that order, whether an id is a different one
            self._new[1:] = self._keys[1:] != self._keys[:-1]
            if not (ordered[1:] != ordered[:-1])[~self._new[1:]].any():
                break
            self._salt += "+"  # two different ids had the same hash

    def __len__(self) -> int:
        return len(self.ids)

    def _hashes(self, texts: np.ndarray) -> NDArray[np.int64]:
        salted = (self._salt + text for text in texts) if self._salt else texts
        return np.fromiter(map(hash, salted), np.int64, len(texts))

    def of(self, names: Column) -> NDArray[np.int64]:
        """The position of each name, the first one where an id repeats, -1 where it is unknown."""
        wanted = _texts(names)
        if not len(self):
            return np.full(len(wanted), -1, np.int64)
        at = np.searchsorted(self._keys, self._hashes(wanted)).clip(max=len(self.ids) - 1)
        place = self._order[at].astype(np.int64)
        return np.where((self.ids[place] == wanted).astype(bool), place, -1)

    @property
    def first(self) -> NDArray[np.int32]:
        """For each position the first one with its id, (n,).

        >>> IdPlaces(["b", "a", "b"]).first.tolist()
        [0, 1, 0]
        """
        first = np.empty(len(self), np.int32)
        first[self._order] = self._order[np.flatnonzero(self._new)][self._new.cumsum() - 1]
        return first

    def every(self, positions: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All positions with the ids that stand at these: of which entry each is one, and the positions.

        >>> [each.tolist() for each in IdPlaces(["b", "a", "b"]).every(np.array([1, 0]))]
        [[0, 1, 1], [1, 0, 2]]
        """
        if self._new.all():
            return np.arange(len(positions)), positions.astype(np.int64)
        wanted = self._hashes(self.ids[positions])
        low, high = (np.searchsorted(self._keys, wanted, side=side) for side in ("left", "right"))
        which = np.repeat(np.arange(len(wanted)), high - low)
        begin = np.repeat(low - (np.cumsum(high - low) - (high - low)), high - low)
        return which, self._order[begin + np.arange(len(which))].astype(np.int64)


def _texts(values: Column) -> np.ndarray:
    """Texts as objects: an array of fixed width would be as wide as the longest of them everywhere."""
    listed = values.tolist() if isinstance(values, np.ndarray) else values
    return np.fromiter(map(str, listed), object, len(values))


@dataclass(frozen=True)
class MappedColumn:
    """Values of rows in an Arrow file: ``column[positions]`` is a list, iterating gives all in order."""

    batches: Sequence[pyarrow.Array]
    rows: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: NDArray[np.integer]) -> list[object]:
        import pyarrow

        rows = self.rows[positions]
        order = np.argsort(rows, kind="stable")
        ends = np.searchsorted(rows[order], np.arange(len(self.batches) + 1) * _ROWS)
        values: list[object] = [None] * len(rows)
        for batch, low, high in zip(self.batches, ends[:-1], ends[1:], strict=True):
            if high > low:
                some = order[low:high]
                taken = batch.take(pyarrow.array(rows[some] % _ROWS)).to_pylist()
                for at, value in zip(some.tolist(), taken, strict=True):
                    values[at] = value
        return values

    def __iter__(self) -> Iterator[object]:
        for begin in range(0, len(self), _ROWS):
            yield from self[np.arange(begin, min(begin + _ROWS, len(self)))]


def mapped_columns(
    path: Path, names: Sequence[str], ids: IdPlaces, file: Path, id_column: str | None = None
) -> Mapping[str, MappedColumn]:
    """Columns of a table in the order of ``ids``, kept in ``file``; the table is read in chunks.

    Values become texts; a whole number that the table stores as floating point, as one with gaps is, becomes the text
    of that number. Rows of ``ids`` with the same id have the same values.

    Raises ``NearfarError`` where the table lacks a column, or rows of some ids.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "t.csv").write_text("id,word\\na,near\\nb,far\\n")
    >>> columns = mapped_columns(folder / "t.csv", ["word"], IdPlaces(["b", "a"]), folder / "t.arrow")
    >>> list(columns["word"]), columns["word"][np.array([1])]
    (['far', 'near'], ['near'])
    """
    import pyarrow

    names = list(dict.fromkeys(names))
    rows, count = np.full(len(ids), -1, np.int32), 0
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    waiting: dict[str, list[object]] = {name: [] for name in names}
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:

        def flush(size: int) -> None:
            parts = [list(map(_text, waiting[name][:size])) for name in names]
            writer.write_batch(pyarrow.record_batch(parts, schema=schema))
            for name in names:
                del waiting[name][:size]

        for items in read_chunks(
            NewData(path, id_column=id_column, rows=_ROWS), {name: [name] for name in names}
        ):
            for name in names:
                if name not in items:
                    raise NearfarError(f"{path} has no column '{name}'.")
            place = ids.of(items.ids)
            known = place >= 0
            rows[place[known]] = count + np.flatnonzero(known)
            count += len(items)
            for name in names:
                waiting[name].extend(items[name])
            while len(waiting[names[0]]) >= _ROWS:
                flush(_ROWS)
        if waiting[names[0]]:
            flush(_ROWS)
    rows = rows[ids.first]
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise NearfarError(
            f"{path}: {len(missing)} of {len(ids)} embedded rows are not in it (first: {str(ids.ids[missing[0]])!r}); "
            "give the table that was embedded, with --id-column where its ids have a different name."
        )
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
    return {name: MappedColumn([batch.column(name) for batch in batches], rows) for name in names}


def _text(value: object) -> str | None:
    if isinstance(value, (float, np.floating)):
        if value != value:
            return None
        value = int(value) if float(value).is_integer() else value
    return None if value is None else str(value)
