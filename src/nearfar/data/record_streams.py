"""Records of Parquet files, WebDataset shards or anything that is iterated, from any place of the stream."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from nearfar.arguments import whole_number
from nearfar.data.files import parse_json, read_array
from nearfar.data.shards import _PICKLED, _TEXTS, is_shard, sample_name, shard_members
from nearfar.data.table_formats import PARQUET_SUFFIXES
from nearfar.errors import NearfarError, nearest_name

if TYPE_CHECKING:
    import pyarrow

__all__ = ["FileRecords", "RecordStream", "open_stream"]

#: one record of a stream: values under names
Record = Mapping[str, object]
Place = TypeVar("Place")

_ROWS = 1024  # of a Parquet file that are decoded together


class RecordStream(Generic[Place]):
    """Records in an order that ``epoch`` determines, and the place after the last that was read.

    ``start(epoch, place)`` gives the records of an epoch from a place on, from None the first; ``place()`` is plain
    data. Two starts with the same arguments give the same records.
    """

    def start(self, epoch: int, place: Place | None = None) -> Iterator[Record]:
        raise NotImplementedError

    def place(self) -> Place:
        raise NotImplementedError

    def identity(self) -> str:
        """What must agree between a stream whose state was saved and the one that goes on."""
        return type(self).__name__


class FileRecords(RecordStream[Sequence[int]]):
    """Rows of Parquet files, or samples of WebDataset shards: files in random order in each epoch, rows in theirs.

    A row is a dictionary of its columns, in which lists of floating-point numbers are arrays; a sample one of
    ``__key__`` and its endings: text of ``txt`` and ``cls``, what ``json`` and ``npy`` hold, bytes of everything else.
    Pickles are refused and counted in ``refused``; files that cannot be decoded are None, and counted there, too.
    ``columns`` are read alone; one that a file lacks is an error. With ``seed=None`` files keep their order.
    """

    def __init__(
        self, files: Sequence[str | Path], columns: Sequence[str] | None = None, seed: int | None = 0
    ) -> None:
        self.files = [Path(file).expanduser() for file in files]
        for file in self.files:
            if not (is_shard(file) or file.suffix.lower() in PARQUET_SUFFIXES):
                raise NearfarError(
                    f"{file}: a stream is read from Parquet files and WebDataset shards (.tar)"
                )
            if not file.is_file():
                raise NearfarError(f"{file} does not exist")
        if not self.files:
            raise NearfarError("a stream needs at least one file")
        self.columns = None if columns is None else list(columns)
        self.seed = None if seed is None else whole_number("seed", seed, 0)
        self.refused: Counter[str] = Counter()
        self._at = (0, 0)

    def start(self, epoch: int, place: Sequence[int] | None = None) -> Iterator[Record]:
        order = np.arange(len(self.files))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        first, row = (0, 0) if place is None else (int(place[0]), int(place[1]))
        self._at = (first, row)
        return self._from(order, first, row)

    def _from(self, order: np.ndarray, first: int, row: int) -> Iterator[Record]:
        for number in range(first, len(order)):
            file = self.files[order[number]]
            read = self._samples if is_shard(file) else self._rows
            for record in read(file, row):
                row += 1
                self._at = (number, row)
                yield record
            row = 0
            self._at = (number + 1, 0)

    def place(self) -> list[int]:
        return list(self._at)

    def identity(self) -> str:
        return f"{len(self.files)} files, {self.files[0].name} to {self.files[-1].name}, seed {self.seed}"

    def _rows(self, file: Path, skip: int) -> Iterator[Record]:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(file, memory_map=True)
            self._check_columns(file, table.schema_arrow.names, [each.path for each in table.schema])
            groups = []
            for group in range(table.metadata.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if skip >= rows:
                    skip -= rows
                else:
                    groups.append(group)
                    if len(groups) == 1:
                        left = skip
                    skip = 0
            if not groups:
                return
            for batch in table.iter_batches(_ROWS, groups, self.columns):
                if left >= batch.num_rows:
                    left -= batch.num_rows
                    continue
                yield from _records(batch.slice(left))
                left = 0
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise NearfarError(f"{file} is damaged ({reason}): copy it again, or leave it out") from None

    def _check_columns(self, file: Path, names: Sequence[str], paths: Sequence[str]) -> None:
        """A reader of Parquet passes over a column that is not there; a part of a structure is ``column.part``."""
        for column in self.columns or ():
            if not any(name == column or name.startswith(f"{column}.") for name in (*names, *paths)):
                raise NearfarError(f"{file} has no column {column!r}; {nearest_name(column, names)}")

    def _samples(self, file: Path, skip: int) -> Iterator[Record]:
        sample: dict[str, object] | None = None
        number = -1
        endings: set[str] = set()
        try:
            for name, content in shard_members(file):
                parts = sample_name(name)
                if parts is None:
                    continue
                key, ending = parts
                endings.add(ending)
                if sample is None or key != sample["__key__"]:
                    if sample is not None and number >= skip:
                        yield sample
                    number += 1
                    sample = {"__key__": key}
                if number >= skip and (self.columns is None or ending in self.columns):
                    self._take(sample, ending, content)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise NearfarError(
                f"{file} is damaged after {number} samples ({error or type(error).__name__}): copy it again, or leave "
                "it out"
            ) from None
        if self.columns and endings.isdisjoint(self.columns):
            raise NearfarError(
                f"{file} holds no file with the ending {self.columns[0]!r}; "
                f"{nearest_name(self.columns[0], endings)}"
            )
        if sample is not None and number >= skip:
            yield sample

    def _take(self, sample: dict[str, object], ending: str, content: Callable[[], bytes]) -> None:
        last = ending.rsplit(".", 1)[-1]
        if last in _PICKLED:
            self.refused[f"{ending}: a pickle, which runs code"] += 1
            return
        data = content()
        try:
            if last == "npy":
                sample[ending] = read_array(io.BytesIO(data), len(data))
            elif last == "json":
                sample[ending] = parse_json(data.decode("utf-8-sig"))
            else:
                sample[ending] = data.decode("utf-8-sig") if last in _TEXTS else data
        except (ValueError, EOFError, SyntaxError, OverflowError, MemoryError):
            sample[ending] = None
            self.refused[f"{ending}: cannot be decoded"] += 1


def _records(batch: pyarrow.RecordBatch) -> Iterator[Record]:
    names = batch.schema.names
    for values in zip(*map(_values, batch.columns), strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: pyarrow.Array) -> list[object]:
    """Python's own values; lists of floating-point numbers are arrays, which costs a tenth."""
    import pyarrow

    kind, types = column.type, pyarrow.types
    fixed = types.is_fixed_size_list(kind)
    if not (
        (fixed or types.is_list(kind) or types.is_large_list(kind)) and types.is_floating(kind.value_type)
    ):
        return list(column.to_pylist())
    every = column.offset + np.arange(len(column) + 1)
    bounds = every * kind.list_size if fixed else column.offsets.to_numpy()
    flat = column.values.to_numpy(zero_copy_only=False)
    rows: list[object] = [flat[begin:end] for begin, end in pairwise(bounds.tolist())]
    if column.null_count:
        present = column.is_valid().to_pylist()
        rows = [row if valid else None for row, valid in zip(rows, present, strict=True)]
    return rows


@runtime_checkable
class _WithState(Protocol):
    """Records that can be iterated again and know their place, such as an ``IterableDataset`` of Hugging Face."""

    def __iter__(self) -> Iterator[Record]: ...

    def state_dict(self) -> Mapping[str, object]: ...

    def load_state_dict(self, state: Mapping[str, object] | None) -> None: ...


class _Stateful(RecordStream[Mapping[str, object]]):
    """An iterable with a state of its own."""

    def __init__(self, source: _WithState) -> None:
        self.source = source

    def start(self, epoch: int, place: Mapping[str, object] | None = None) -> Iterator[Record]:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)
        self.source.load_state_dict(deepcopy(place))
        return iter(self.source)

    def place(self) -> Mapping[str, object]:
        return deepcopy(self.source.state_dict())

    def identity(self) -> str:
        return f"a stream of {type(self.source).__name__}"


class _Counted(RecordStream[int]):
    """Anything that can be iterated again: the place is a count, and what lies before it is read and passed over."""

    def __init__(self, source: Iterable[Record]) -> None:
        self.source, self._count = source, 0

    def start(self, epoch: int, place: int | None = None) -> Iterator[Record]:
        if hasattr(self.source, "set_epoch"):
            self.source.set_epoch(epoch)
        self._count = 0
        return self._from(place or 0)

    def _from(self, place: int) -> Iterator[Record]:
        for record in self.source:
            self._count += 1
            if self._count > place:
                yield record
        if self._count < place:
            raise NearfarError(
                f"the stream ended after {self._count} records, and its state is at {place}: it is not the stream "
                "whose state was saved, or it can be read only once"
            )

    def place(self) -> int:
        return self._count

    def identity(self) -> str:
        return f"a stream of {type(self.source).__name__}"


def open_stream(source: object) -> RecordStream[Any]:
    """Files (a folder, a path, a list), a `RecordStream`, a dataset of Hugging Face, or any iterable of dictionaries.

    A state that leaves out a shuffle buffer (that of ``datasets``) is not used: what lies before is read again instead.
    An iterator can be read only once, and is refused.
    """
    if isinstance(source, RecordStream):
        return source
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            named = sorted(path.iterdir())
            return FileRecords([p for p in named if is_shard(p) or p.suffix.lower() in PARQUET_SUFFIXES])
        return FileRecords([path])
    if isinstance(source, Sequence) and source and all(isinstance(each, (str, Path)) for each in source):
        return FileRecords(source)
    if isinstance(source, (Iterator, Mapping, bytes)) or not isinstance(source, Iterable):
        raise NearfarError(
            f"source is a {type(source).__name__}; give files of Parquet or WebDataset, an IterableDataset, or an "
            "iterable of dictionaries that starts again when it is iterated again (a list, an object with __iter__)"
        )
    if isinstance(source, _WithState) and not _buffered(source):
        return _Stateful(source)
    return _Counted(source)


def _buffered(source: object) -> bool:
    """Whether a dataset of Hugging Face shuffles in a buffer, which its state does not hold."""
    part = getattr(source, "_ex_iterable", None)
    while part is not None:
        if "BufferShuffled" in type(part).__name__:
            return True
        part = getattr(part, "ex_iterable", None)
    return False
