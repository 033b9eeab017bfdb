"""Vectors in files, read a stretch at a time: ``.npy`` shards of any number, or an array that is in memory already."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nearfar.arguments import array
from nearfar.data.files import make_folder, write_atomically
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

__all__ = ["VectorShards", "shards_of_table", "write_shards"]

_ROWS = 65_536  # rows looked at together
_NEEDS = "an array (n, d), a .npy file, several of them, or a folder of .npy files"


@dataclass(frozen=True)
class VectorShards:
    """Rows of one number of dimensions, in one array or in several files, numbered through from 0.

    Files are mapped, never read whole; float16 takes half the room of float32, and a cosine changes by at most .001.

    >>> shards = VectorShards.of(np.eye(3, dtype=np.float16))
    >>> shards.n, shards.dim, shards.read(1, 3).tolist()
    (3, 3, [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """

    files: tuple[Path, ...]
    held: Float[np.ndarray, "n d"] | None = None

    @classmethod
    def of(cls, source: object) -> VectorShards:
        """Shards of an array, a file, a list of files, or a folder (its files by their names)."""
        if isinstance(source, VectorShards):
            return source
        if isinstance(source, (str, Path)):
            path = Path(source).expanduser()
            files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
            if not files:
                raise NearfarError(f"{path} holds no .npy file; give {_NEEDS}")
        elif (
            isinstance(source, Sequence) and source and all(isinstance(each, (str, Path)) for each in source)
        ):
            files = [Path(each).expanduser() for each in source]
        else:
            rows = array("vectors", source, _NEEDS, "f")
            if rows.ndim != 2 or not rows.size:
                raise NearfarError(f"vectors are {rows.shape}; give {_NEEDS}")
            return cls((), rows)
        shards = cls(tuple(file.absolute() for file in files))
        shape = shards._arrays[0].shape
        for file, part in zip(files, shards._arrays, strict=True):
            if part.ndim != 2 or part.dtype.kind != "f" or part.shape[1:] != shape[1:]:
                raise NearfarError(
                    f"{file} holds {part.dtype} {part.shape}; floating-point rows of {shape[1:]} numbers are needed, "
                    "as in the first shard"
                )
        if not shards.n:
            raise NearfarError(f"{files[0]} and the shards after it hold no row")
        return shards

    @cached_property
    def _arrays(self) -> list[Float[np.ndarray, "rows d"]]:
        if self.held is not None:
            return [self.held]
        parts = []
        for file in self.files:
            try:
                parts.append(np.load(file, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise NearfarError(f"{file} is no .npy file of vectors ({error}); give {_NEEDS}") from None
        return parts

    def __getstate__(self) -> dict[str, object]:
        """Names of files go to a different process, not what is mapped."""
        return {"files": self.files, "held": self.held}

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(part) for part in self._arrays)])

    @property
    def n(self) -> int:
        """Rows of all shards."""
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """Numbers of a row."""
        return int(self._arrays[0].shape[1])

    def read(self, begin: int, end: int) -> NDArray[np.float32]:
        """Rows ``begin`` to ``end``, as float32, across shards."""
        return self.take(np.arange(begin, end))

    def take(self, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Rows at rising positions, which may repeat, as float32; each shard is read in one go."""
        rows = np.asarray(rows)
        if len(rows) and not (rows[0] >= 0 and rows[-1] < self.n and (rows[1:] >= rows[:-1]).all()):
            raise NearfarError(
                f"rows {rows.min()} to {rows.max()} were asked for; rising ones from 0 to {self.n - 1} are there"
            )
        out = np.empty((len(rows), self.dim), np.float32)
        cuts = np.searchsorted(rows, self._starts)
        for part, start, low, high in zip(self._arrays, self._starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if high > low:
                at = rows[low:high] - start
                whole = bool((at[1:] - at[:-1] == 1).all())
                out[low:high] = part[at[0] : at[-1] + 1] if whole else part[at]
        return out

    def state(self) -> object:
        """What changes when rows are written anew: name, size and time of each file, or a digest of an array."""
        if self.held is None:
            named = ((file.name, file.stat()) for file in self.files)
            return [[name, each.st_size, each.st_mtime_ns] for name, each in named]
        whole = hashlib.blake2b(str(self.held.dtype).encode(), digest_size=16)
        for begin, end in self.pieces(_ROWS):
            whole.update(np.ascontiguousarray(self.held[begin:end]).data)
        return whole.hexdigest()

    def pieces(self, rows: int) -> Iterator[tuple[int, int]]:
        """Stretches of at most so many rows."""
        for begin in range(0, self.n, rows):
            yield begin, min(begin + rows, self.n)


def write_shards(
    batches: Iterator[Float[np.ndarray, "rows d"]], folder: Path, rows: int = 1 << 20
) -> list[Path]:
    """Write batches of vectors as float16 shards ``00000.npy``, … of at most about so many rows.

    Raises ``NearfarError`` for numbers beyond float16, and for rows that are zero only as float16.

    >>> import tempfile
    >>> files = write_shards(iter([np.ones((2, 4)), np.zeros((1, 4))]), Path(tempfile.mkdtemp()), rows=2)
    >>> [file.name for file in files], VectorShards.of(files).n
    (['00000.npy', '00001.npy'], 3)
    """
    make_folder(folder)
    files: list[Path] = []
    waiting: list[Float[np.ndarray, "rows d"]] = []

    def flush() -> None:
        path = folder / f"{len(files):05}.npy"
        rows_ = np.concatenate(waiting)
        write_atomically(path, lambda file: np.save(file, rows_, allow_pickle=False))
        files.append(path)
        waiting.clear()

    seen = 0
    for batch in batches:
        waiting.append(_as_half(np.asarray(batch), seen))
        seen += len(batch)
        if sum(map(len, waiting)) >= rows:
            flush()
    if waiting:
        flush()
    return files


def _as_half(given: Float[np.ndarray, "rows d"], first: int) -> Float[np.ndarray, "rows d"]:
    """Rows as float16, which must hold them."""
    with np.errstate(over="ignore"):
        half = given.astype(np.float16)
    beyond = (np.isfinite(given) & ~np.isfinite(half)).any(axis=1)
    zero = given.any(axis=1) & ~half.any(axis=1)
    for bad, what in (
        (beyond, "holds numbers beyond float16 (65,504)"),
        (zero, "is zero as float16 (below 6e-8)"),
    ):
        if bad.any():
            at = int(bad.argmax())
            raise NearfarError(
                f"row {first + at} {what}: its largest number is {np.abs(given[at]).max():.3g}. Multiply all vectors "
                "by one factor, which changes no cosine, and no order of products"
            )
    return half


def shards_of_table(path: Path, column: str, folder: Path, naming: str) -> Shaped[np.ndarray, " n"]:
    """Write a column of vectors of a table as float16 shards into a folder, which is made anew; the ids of its rows.

    What is read at once fits in memory. ``naming`` says how a different column is named. Raises ``NearfarError`` where
    rows have no vector.
    """
    from nearfar.data.chunks import NewData, read_chunks

    ids: list[np.ndarray] = []

    def batches() -> Iterator[Float[np.ndarray, "rows d"]]:
        for items in read_chunks(NewData(path, rows=16_384), {column: [column]}):
            present = items.present(column)
            if not present.all():
                first = items.ids[int(present.argmin())]
                raise NearfarError(
                    f"{path}: {int((~present).sum())} rows have no '{column}' (first: {first!r}); leave them out, or "
                    f"name a different column with {naming}."
                )
            ids.append(np.asarray(items.ids))
            yield items.array(column)

    shutil.rmtree(folder, ignore_errors=True)
    files = write_shards(batches(), folder)
    if not files:
        raise NearfarError(f"{path} has no rows.")
    written = path.stat().st_mtime_ns
    for file in files:  # whoever goes on with shards of the table sees whether it has changed
        os.utime(file, ns=(written, written))
    return np.concatenate(ids)
