"""Windows of a stream: what its records are equal by, and the neighbours within a window.

Records are equal by a field, several, a function, or a digest of all that they hold. A window is searched once and used
once.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import hashlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import faiss
import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from nearfar.batching.neighbors import Neighbors, _as_rows, nearest_neighbors
from nearfar.data.record_streams import Record
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Key", "key_of", "record_digest", "window_neighbors"]


Key = str | Sequence[str] | Callable[[Record], object] | None

_PLAIN = frozenset({int, float, bool, type(None)})
# Their text is exact.
_BY_TEXT = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    uuid.UUID,
    enum.Enum,
    PurePath,
    complex,
)


def key_of(key: Key) -> Callable[[Record], object]:
    """A function that gives what a record is compared by; None: this record has no equal.

    A record has no equal where the field, each of several, or what the function gives, is None or NaN.
    """
    if key is None:
        return record_digest
    if callable(key):
        return lambda record: _value(key(record), "what key gives")
    names = [key] if isinstance(key, str) else list(key)
    if len(names) == 1:
        return lambda record: _value(_field(record, names[0]), f"field {names[0]!r}")
    return lambda record: _values({name: _field(record, name) for name in names})


def record_digest(record: Record) -> bytes:
    """A digest of all fields of a record but its ``__key__``, equal for equal contents in every process.

    Texts, numbers, bytes, dates, arrays and tensors (kind, shape, numbers), pictures of Pillow, and lists, sets and
    dictionaries of these. Raises ``NearfarError`` for anything else.

    >>> record_digest({"x": np.arange(3)}) == record_digest({"x": np.arange(3), "__key__": "b"})
    True
    >>> record_digest({"x": np.zeros((2, 8))}) == record_digest({"x": np.zeros((4, 4))})
    False
    """
    return _digest({name: value for name, value in record.items() if name != "__key__"})


def _field(record: Record, name: str) -> object:
    if name not in record:
        raise NearfarError(
            f"key names the field {name!r}, which a record lacks; {nearest_name(name, map(str, record))}"
        )
    return record[name]


def _value(value: object, where: str) -> object:
    """A text or a whole number as it is, of anything else a digest."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    return value if isinstance(value, (str, int)) else _digest(value, where)


def _values(fields: dict[str, object]) -> bytes | None:
    return None if all(_value(value, name) is None for name, value in fields.items()) else _digest(fields)


def _digest(value: object, where: str = "") -> bytes:
    whole = hashlib.blake2b(digest_size=16)
    _add(whole, value, where)
    return whole.digest()


def _add(whole: hashlib.blake2b, value: object, where: str) -> None:
    """Add a value: its kind, its length, and its bytes, so that no two values give the same bytes.

    What most records hold comes first: this runs for each of them.
    """
    kind = type(value)
    if kind is str:
        _put(whole, "str", value.encode("utf-8", "surrogatepass"))  # type: ignore[attr-defined]
    elif kind in _PLAIN:
        _put(whole, kind.__name__, repr(value).encode())
    elif isinstance(value, (np.ndarray, np.generic)):
        dtype = value.dtype
        # The name of a kind is slow to make, and only structures need it.
        named = f"array {dtype if dtype.names else dtype.str} {value.shape}"
        if dtype.hasobject or dtype.kind == "T":  # whose bytes are addresses
            _put(whole, named, b"")
            _add(whole, value.tolist(), where)
        else:
            _put(whole, named, value.tobytes())
    elif isinstance(value, (dict, Mapping)):
        _put(whole, "mapping", str(len(value)).encode())
        for name in sorted(value) if {*map(type, value)} <= {str} else sorted(value, key=repr):
            _add(whole, name, where)
            _add(whole, value[name], f"{where}.{name}" if where else f"field {name!r}")
    elif isinstance(value, (list, tuple)):
        if value and {*map(type, value)} == {float}:  # as quick as an array
            _put(whole, "floats", np.asarray(value).tobytes())
            return
        _put(whole, "list", str(len(value)).encode())
        for each in value:
            _add(whole, each, where)
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _put(whole, "bytes", bytes(value))
    elif isinstance(value, torch.Tensor):
        dense = value.detach().cpu().to_dense().resolve_conj().resolve_neg()
        numbers = dense.contiguous().reshape(-1).view(torch.uint8).numpy()  # NumPy has no bfloat16
        _put(whole, f"tensor {dense.dtype} {tuple(dense.shape)}", numbers.tobytes())
    elif isinstance(value, (set, frozenset)):
        _put(whole, "set", b"".join(sorted(_digest(each, where) for each in value)))
    elif _is_picture(value):
        seen = (value.mode, value.size, value.getpalette(), value.info.get("transparency"))  # type: ignore[attr-defined]
        _put(whole, f"picture {seen}", value.tobytes())  # type: ignore[attr-defined]
    elif isinstance(value, (str, int, float, *_BY_TEXT)):
        _put(whole, kind.__name__, repr(value).encode("utf-8", "surrogatepass"))
    else:
        raise NearfarError(
            f"{where or 'a record'} holds a {kind.__module__}.{kind.__name__}, of which it is not known when two are "
            "equal; say with key= by which fields records are equal, or by a function that gives a text, a number, "
            "bytes, or an array"
        )


def _put(whole: hashlib.blake2b, kind: str, data: bytes) -> None:
    whole.update(b"%b\x1f%d\x1f%b" % (kind.encode(), len(data), data))


def _is_picture(value: object) -> bool:
    pillow = sys.modules.get("PIL.Image")  # where a value is one of its pictures, it is imported
    return pillow is not None and isinstance(value, pillow.Image)


_CELL = 128  # rows of a cell
_LEAST = 1024  # rows below which all pairs are as quick
_SHARE = 8  # a row is compared with the rows of every eighth cell, the nearest, and of at least so many:
_CELLS = 4
_ROUNDS = 4  # of k-means


def window_neighbors(vectors: NDArray[np.floating], k: int, seed: int = 0) -> Neighbors:
    """The ``k`` nearest others of every row by cosine, among those of the cells that are nearest to its own.

    k-means puts about 128 rows into a cell; the rows of a cell are compared with those of the nearest eighth of the
    cells. That takes a third of the time of all pairs; the neighbours that differ are nearly as near (docs/scale.md).
    Below 1,024 rows, and for more than 128 neighbours, all pairs are compared. Errors are those of `nearest_neighbors`.

    >>> rng = np.random.default_rng(0)
    >>> points = rng.standard_normal((20, 16))[rng.integers(20, size=2000)] + 0.3 * rng.standard_normal((2000, 16))
    >>> near, all_pairs = window_neighbors(points, 10), nearest_neighbors(points, 10)
    >>> bool(near.similarities.mean() > 0.99 * all_pairs.similarities.mean())
    True
    """
    n = len(vectors)
    cells = n // _CELL
    if n < _LEAST or k > _CELL:
        return nearest_neighbors(vectors, k, seed=seed, exact=True)
    rows = _as_rows(vectors, "cosine")
    model = faiss.Kmeans(
        rows.shape[1], cells, niter=_ROUNDS, spherical=True, seed=1 + seed % 2**31, min_points_per_centroid=1,
        max_points_per_centroid=_CELL,
    )  # fmt: skip
    model.train(rows)
    centres = model.centroids
    assert centres is not None
    of = (rows @ centres.T).argmax(1)
    order = np.argsort(of, kind="stable")
    ends = np.cumsum(np.bincount(of, minlength=cells))
    ordered, sizes = rows[order], np.diff(ends, prepend=0)
    begins = ends - sizes
    indices, similarities = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    closeness = centres @ centres.T
    np.fill_diagonal(closeness, np.inf)  # the cell itself comes first
    nearest = np.argsort(-closeness, axis=1, kind="stable")
    for cell in np.flatnonzero(sizes).tolist():
        count = max(_CELLS, cells // _SHARE)
        while sizes[nearest[cell, :count]].sum() <= k:
            count += 1
        among = np.concatenate([np.arange(begins[each], ends[each]) for each in nearest[cell, :count]])
        own = np.arange(begins[cell], ends[cell])
        product = ordered[own] @ ordered[among].T
        product[np.arange(len(own)), np.arange(len(own))] = -np.inf  # nobody is its own neighbour
        indices[order[own]], similarities[order[own]] = _largest(product, order[among].astype(np.int32), k)
    np.clip(similarities, -1.0, 1.0, out=similarities)
    how = f"{cells} cells, {max(_CELLS, cells // _SHARE)} of them compared"
    return Neighbors(indices, similarities, index=how)


@njit(cache=True, nogil=True)
def _largest(product: Any, names: Any, k: int) -> Any:
    """The ``k`` largest of each row, falling, and the names of their columns."""
    rows, columns = product.shape
    chosen, value = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
    for row in range(rows):
        size = 0
        for column in range(columns):
            each = product[row, column]
            if size < k:
                at = size
                size += 1
            elif each > value[row, k - 1]:
                at = k - 1
            else:
                continue
            while at > 0 and value[row, at - 1] < each:
                value[row, at], chosen[row, at] = value[row, at - 1], chosen[row, at - 1]
                at -= 1
            value[row, at], chosen[row, at] = each, names[column]
    return chosen, value
