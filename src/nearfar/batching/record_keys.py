"""What records are equal by: a field, several, a function, or a digest of all that a record holds."""

from __future__ import annotations

import datetime
import decimal
import enum
import hashlib
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath

import numpy as np
import torch

from nearfar.data.record_streams import Record
from nearfar.errors import NearfarError, nearest_name

__all__ = ["Key", "key_of", "record_digest"]

Key = str | Sequence[str] | Callable[[Record], object] | None

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
    """Add a value: its kind, its length, and its bytes, so that no two values give the same bytes."""
    if isinstance(value, Mapping):
        _put(whole, "mapping", str(len(value)).encode())
        for name, each in sorted(value.items(), key=lambda pair: repr(pair[0])):
            _add(whole, name, where)
            _add(whole, each, f"{where}.{name}" if where else f"field {name!r}")
    elif isinstance(value, (list, tuple)):
        if value and {*map(type, value)} == {float}:  # as quick as an array
            _put(whole, "floats", np.asarray(value).tobytes())
            return
        _put(whole, "list", str(len(value)).encode())
        for each in value:
            _add(whole, each, where)
    elif isinstance(value, (set, frozenset)):
        _put(whole, "set", b"".join(sorted(_digest(each, where) for each in value)))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _put(whole, "bytes", bytes(value))
    elif isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        kind = f"array {array.dtype} {array.shape}"
        if array.dtype.hasobject or array.dtype.kind == "T":  # whose bytes are addresses
            _put(whole, kind, b"")
            _add(whole, array.tolist(), where)
        else:
            _put(whole, kind, array.tobytes())
    elif isinstance(value, torch.Tensor):
        dense = value.detach().cpu().to_dense().resolve_conj().resolve_neg()
        numbers = dense.contiguous().reshape(-1).view(torch.uint8).numpy()  # NumPy has no bfloat16
        _put(whole, f"tensor {dense.dtype} {tuple(dense.shape)}", numbers.tobytes())
    elif _is_picture(value):
        seen = (value.mode, value.size, value.getpalette(), value.info.get("transparency"))  # type: ignore[attr-defined]
        _put(whole, f"picture {seen}", value.tobytes())  # type: ignore[attr-defined]
    elif value is None or isinstance(value, (str, int, float, *_BY_TEXT)):
        _put(whole, type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))
    else:
        raise NearfarError(
            f"{where or 'a record'} holds a {type(value).__module__}.{type(value).__name__}, of which it is not known "
            "when two are equal; say with key= by which fields records are equal, or by a function that gives a text, "
            "a number, bytes, or an array"
        )


def _put(whole: hashlib.blake2b, kind: str, data: bytes) -> None:
    whole.update(f"{kind}\x1f{len(data)}\x1f".encode())
    whole.update(data)


def _is_picture(value: object) -> bool:
    pillow = sys.modules.get("PIL.Image")  # where a value is one of its pictures, it is imported
    return pillow is not None and isinstance(value, pillow.Image)
