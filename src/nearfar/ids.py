"""Ids of items in one canonical form, so that equal ids are equal wherever they are compared or hashed.

An id is a whole number, a text, or a tuple of such. The container (list, tuple, NumPy array, pandas Series or
Index, torch tensor) and the width of a number or of a text never matter; bytes are text in UTF-8, paths, UUIDs and
dates are their text, and a whole number that a table stored as floating point is that whole number. ``1`` and
``"1"`` are different ids everywhere. A missing id (None, NaN, NaT, pandas' NA) is an error: it names no item.
Ids may repeat; what needs distinct ones says so.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID

import numpy as np

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ids", "canonical_ids", "first_difference", "kind_of", "plain_ids", "split_hash"]

#: names of items, one each, in order
Ids: TypeAlias = "Sequence[Hashable] | np.ndarray"

_ADVICE = "give one id per item: a list, an array, a pandas Series or a tensor of whole numbers or texts"


def canonical_ids(ids: object, what: str = "ids") -> np.ndarray:
    """One id per item as an array (n,): int64, text of the least width, or objects where ids are of several kinds.

    Whole numbers beyond int64 come as uint64 or objects. ``what`` names the argument in messages. Raises
    ``NearfarError`` for anything that is no flat collection in an order (a single text, a table, a set, ragged
    lists), and for a missing id.

    >>> canonical_ids([1, 2]).dtype == canonical_ids(np.array([1, 2], np.uint8)).dtype
    True
    >>> canonical_ids(np.array(["a", "b"], "<U9")).dtype, canonical_ids([b"a", 1]).tolist()
    (dtype('<U1'), ['a', 1])
    """
    if isinstance(ids, (Set, Mapping)) and not hasattr(ids, "mapping"):  # the views of a dict are in order
        raise NearfarError(f"{what} are a {type(ids).__name__}, which has no order; {_ADVICE}")
    return _canonical(ids, what)


def plain_ids(ids: object, what: str = "ids") -> list[Hashable]:
    """Ids as Python's own numbers and texts; sets and generators too.

    >>> plain_ids(np.array([3, 4], np.int16)), plain_ids(name for name in (np.str_("a"), b"b"))
    ([3, 4], ['a', 'b'])
    """
    values: list[Hashable] = _canonical(ids, what).tolist()
    return values


def kind_of(ids: np.ndarray) -> str:
    """What canonical ids are, in words."""
    return {"i": "whole numbers", "u": "whole numbers", "U": "text"}.get(ids.dtype.kind, "of several kinds")


def first_difference(left: np.ndarray, right: np.ndarray) -> tuple[int, int]:
    """At how many places equally long canonical ids differ, and the first of them (-1 where none).

    >>> first_difference(canonical_ids(["a", "b", "c"]), canonical_ids(["a", "c", "b"]))
    (2, 1)
    """
    if left.dtype.kind == right.dtype.kind and left.dtype.kind != "O":
        bad = np.flatnonzero(left != right)
    else:
        pairs = zip(left.tolist(), right.tolist(), strict=True)
        bad = np.array([at for at, (a, b) in enumerate(pairs) if a != b or type(a) is not type(b)], np.int64)
    return len(bad), int(bad[0]) if len(bad) else -1


def _canonical(ids: object, what: str) -> np.ndarray:
    values = _flat(ids, what)
    if isinstance(values, np.ndarray):
        if values.dtype.kind == "i" or (
            values.dtype.kind == "u" and not (len(values) and values.max() > np.iinfo(np.int64).max)
        ):
            return np.ascontiguousarray(values, np.int64)
        if values.dtype.kind == "U":
            return np.array(values.tolist(), dtype=np.str_).reshape(-1)
        if values.dtype.kind == "M" and not np.isnat(values).any():
            values = values.astype(str)
        values = values.tolist()
    kinds = set(map(type, values))
    plain = (
        values if kinds in ({int}, {str}) else [_plain(value, at, what) for at, value in enumerate(values)]
    )
    kinds = set(map(type, plain))
    if kinds == {str}:
        return np.array(plain, dtype=np.str_)
    if kinds <= {int}:
        try:
            return np.array(plain, np.int64)
        except OverflowError:
            pass
    mixed = np.empty(len(plain), object)
    for at, value in enumerate(plain):  # a slice would take tuples apart
        mixed[at] = value
    return mixed


def _flat(ids: object, what: str) -> np.ndarray | list[object]:
    """The values in a row: an array (n,), or a list."""
    if ids is None or isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        shown = repr(ids) if len(repr(ids)) < 60 else f"a {type(ids).__name__}"
        raise NearfarError(f"{what} are {shown}; {_ADVICE}")
    values: Iterable[object] = ids
    if isinstance(values, (list, tuple, range, Set, Iterator)):
        return list(values)
    if hasattr(values, "detach"):  # a tensor, which this floor need not import
        tensor: Tensor = values.detach().cpu()
        values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    elif not isinstance(values, np.ndarray) and hasattr(values, "to_pylist"):
        values = values.to_pylist()
    elif not isinstance(values, np.ndarray) and hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise NearfarError(f"{what} have shape {values.shape}; {_ADVICE}")
        return values
    return list(values)


def _plain(value: object, at: int, what: str) -> Hashable:
    if (
        hasattr(value, "item") and getattr(value, "shape", None) == ()
    ):  # NumPy's scalars, 0-d arrays and tensors
        value = str(value) if isinstance(value, np.datetime64) and value == value else value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        raise NearfarError(
            f"{what}: item {at} has none ({value!r}); an id that is missing names no item. Give it one, or leave "
            "the item out"
        )
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise NearfarError(f"{what}: item {at} is {value!r}, which is no text in UTF-8") from None
    if isinstance(value, float):
        if math.isnan(value):
            return _plain(None, at, what)
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, tuple):
        return tuple(_plain(part, at, what) for part in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (UUID, date, Decimal)):
        return str(value)
    raise NearfarError(f"{what}: item {at} is a {type(value).__name__}; {_ADVICE}")


def split_hash(ids: Iterable[object]) -> str:
    """Sixteen hexadecimal digits that identify a set of item ids, in whatever order they come.

    Equal ids in a different container or integer width are equal, 1 and "1" are not. An id that comes
    twice counts twice. Raises ``NearfarError`` for a missing id, and for anything that is no collection of ids.

    >>> split_hash(["b", "a"]) == split_hash(["a", "b"])
    True
    """
    # repr tells 1 from "1"; the length prefix keeps ("ab", "c") apart from ("a", "bc").
    digest = hashlib.sha256()
    for name in sorted(map(repr, plain_ids(ids))):
        digest.update(f"{len(name)}:{name}".encode())
    return digest.hexdigest()[:16]
