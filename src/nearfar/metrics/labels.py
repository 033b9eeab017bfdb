"""Labels of items, of whatever type, as codes: equal labels have one code, a missing label has none.

What says that a label is not known (−1, NaN, None and the like) is the rule of ``nearfar.labels``. Such an item is
relevant to nobody and has nobody relevant to it, not even items that miss their label too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.errors import NearfarError
from nearfar.labels import is_missing
from nearfar.metrics.arguments import check_dense, described

__all__ = ["entries", "label_codes"]


def label_codes(**sides: Any) -> list[NDArray[np.int64]]:
    """Codes 0, 1, … of the labels of each side, shared by all sides; −1 where a label is missing.

    Labels are numbers, texts or other hashable objects, one for each item. Numbers are compared as numbers of any
    type (1, 1.0 and ``np.uint8(1)`` are equal); numbers and texts are never equal, and sides that have none in common
    for that reason are refused.

    >>> label_codes(queries=["cat", None, "dog"], keys=np.array(["dog", "cat"], dtype=object))
    [array([ 0, -1,  1]), array([1, 0])]
    >>> label_codes(queries=np.array([3, -1]), keys=np.array([np.nan, 3.0]))
    [array([ 0, -1]), array([-1,  0])]
    """
    columns = {name: _column(name, labels) for name, labels in sides.items()}
    if all(column.dtype == np.int64 for column in columns.values()):
        every = np.concatenate(list(columns.values()))
        known = every != -1
        codes = np.full(len(every), -1, dtype=np.int64)
        codes[known] = np.unique(every[known], return_inverse=True)[1].reshape(-1)
        return np.split(codes, np.cumsum([len(column) for column in columns.values()])[:-1])
    table: dict[Any, int] = {}
    coded = []
    for name, column in columns.items():
        codes = np.full(len(column), -1, dtype=np.int64)
        for i, label in enumerate(column.tolist()):
            if not is_missing(label):
                try:
                    codes[i] = table.setdefault(label, len(table))
                except TypeError:
                    raise NearfarError(
                        f"{name}: the label of item {i} is {described(label)}; labels are one number or text "
                        "for each item, and items with several labels take a Boolean matrix"
                    ) from None
        coded.append(codes)
    _same_kind(columns)
    return coded


def entries(name: str, values: Any) -> list[Any]:
    """The values of a list, array, tensor or column as a list of plain Python objects."""
    if isinstance(values, Tensor):
        check_dense(name, values)
        if values.ndim != 1:
            raise NearfarError(
                f"{name} is {described(values)}; a plain one with one entry for each item is needed"
            )
        return list(values.detach().cpu().tolist())
    if (
        values is None
        or isinstance(values, (str, bytes, Mapping, set, frozenset))
        or not isinstance(values, Iterable)
        or not hasattr(values, "__len__")
    ):
        raise NearfarError(
            f"{name} is {described(values)}; a list or an array with one entry for each item is needed"
        )
    if len(getattr(values, "shape", (0,))) != 1:
        raise NearfarError(
            f"{name} is {described(values)}; one entry for each item is needed, in one dimension"
        )
    if np.ma.isMaskedArray(values):
        return list(np.where(np.ma.getmaskarray(values), np.array(None), np.asarray(values)).tolist())
    for method in ("to_list", "tolist", "to_pylist"):  # pandas and polars, NumPy, pyarrow
        if hasattr(values, method):
            return list(getattr(values, method)())
    return [value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in values]


def _column(name: str, labels: Any) -> NDArray[Any]:
    """Labels in int64 where they are whole numbers (−1: missing), as objects where they are not."""
    if isinstance(labels, Tensor) and labels.ndim == 1:
        check_dense(name, labels)
        labels = labels.detach().cpu()
        labels = (labels.double() if labels.is_floating_point() else labels).numpy()
    if isinstance(labels, np.ndarray) and labels.ndim == 1 and not np.ma.isMaskedArray(labels):
        return _numbers(name, labels) if labels.dtype.kind in "biuf" else _objects(labels.tolist())
    values = entries(name, labels)
    kinds = {type(value) for value in values}
    if kinds and all(issubclass(kind, (int, float, np.integer, np.floating)) for kind in kinds):
        if all(issubclass(kind, (bool, int, np.integer)) for kind in kinds):
            # One by one: NumPy would turn 64-bit numbers of both signs into floats.
            fits = all(-(2**63) <= int(value) < 2**63 for value in values)
            return np.array([int(v) for v in values], dtype=np.int64) if fits else _objects(values)
        return _numbers(name, np.array([float(value) for value in values]), values)
    return _objects(values)


def _numbers(name: str, array: NDArray[Any], originals: list[Any] | None = None) -> NDArray[Any]:
    if array.dtype.kind in "bi" or (array.dtype.kind == "u" and (not array.size or int(array.max()) < 2**63)):
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        wide = array.astype(np.float64)
        if np.isinf(wide).any():
            raise NearfarError(f"{name} hold {wide[np.isinf(wide)][0]}, which is no label")
        known = ~np.isnan(wide)
        if (wide[known] == np.floor(wide[known])).all() and (np.abs(wide[known]) < 2**53).all():
            return np.where(known, wide, -1).astype(np.int64)
    return _objects(array.tolist() if originals is None else originals)


def _objects(values: list[Any]) -> NDArray[Any]:
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def _same_kind(columns: Mapping[str, NDArray[Any]]) -> None:
    kinds = {}
    for name, column in columns.items():
        kinds[name] = {_kind(label) for label in column.tolist() if not is_missing(label)}
    known = {name: kind for name, kind in kinds.items() if kind}
    if len(known) > 1 and not set.intersection(*known.values()):
        stated = " and ".join(f"{name} are {', '.join(sorted(kind))}" for name, kind in known.items())
        raise NearfarError(f"{stated}: labels of different kinds are never equal; bring both to one type")


def _kind(label: Any) -> str:
    if isinstance(label, (bool, int, float, np.number, np.bool_)):
        return "numbers"
    if isinstance(label, str):
        return "text"
    return "bytes" if isinstance(label, bytes) else f"of type {type(label).__name__}"
