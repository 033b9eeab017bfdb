"""Columns of a table that is not held in memory: kept as an Arrow file that is mapped, and read by position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nearfar.data.chunks import NewData, read_chunks
from nearfar.data.items import Column
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["IdPlaces", "MappedColumn", "mapped_columns"]

_ROWS = 65_536  # of a batch


class IdPlaces:
    """At which position an id stands: about 12 bytes for each beside the ids themselves.

    >>> IdPlaces(["b", "a", "c"]).of(["c", "x", "b"]).tolist()
    [2, -1, 0]
    """

    def __init__(self, ids: Column) -> None:
        self.ids = np.asarray(ids).astype(str)
        self._order = np.argsort(self.ids, kind="stable").astype(np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, names: Column) -> NDArray[np.int64]:
        """The position of each name, -1 where it is unknown."""
        wanted = np.asarray(names).astype(str)
        at = np.searchsorted(self.ids, wanted, sorter=self._order).clip(max=len(self.ids) - 1)
        place = self._order[at]
        return np.where(self.ids[place] == wanted, place, -1)


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

    Raises ``NearfarError`` where the table lacks a column, or rows of some ids.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "t.csv").write_text("id,word\\na,near\\nb,far\\n")
    >>> columns = mapped_columns(folder / "t.csv", ["word"], IdPlaces(["b", "a"]), folder / "t.arrow")
    >>> list(columns["word"]), columns["word"][np.array([1])]
    (['far', 'near'], ['near'])
    """
    import pyarrow

    rows, count = np.full(len(ids), -1, np.int32), 0
    schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
    waiting: dict[str, list[object]] = {name: [] for name in names}
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:

        def flush(size: int) -> None:
            parts = [[None if v is None else str(v) for v in waiting[name][:size]] for name in names]
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
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise NearfarError(
            f"{path}: {len(missing)} of {len(ids)} embedded rows are not in it (first: {str(ids.ids[missing[0]])!r}); "
            "give the table that was embedded, with --id-column where its ids have a different name."
        )
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
    batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
    return {name: MappedColumn([batch.column(name) for batch in batches], rows) for name in names}
