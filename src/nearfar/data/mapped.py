"""Arrays too large for memory, kept by what they were computed from and mapped from disk.

The counterpart of `nearfar.data.cache` for arrays that are filled once and then read in pieces, in any order: one
``.npy`` file each, in a folder that appears whole by an atomic rename.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from nearfar.data.cache import cache_dir, caching, content_key
from nearfar.errors import NearfarError

__all__ = ["mapped_arrays"]

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
