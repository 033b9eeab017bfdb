"""Labels of any container as whole numbers, with one rule for those that are missing.

A missing label is *unknown*: its item is nobody's positive and has none by its label; it stays in the batch as a
candidate. Missing are −1 (a number), NaN, None, ``pandas.NA`` and NaT, masked values, and the texts "", "nan", "NaN",
"<NA>", "NaT" and "None", which is what those become when an array is made of texts. Losses, masks, samplers and metrics
all read labels so; a class that is called −1 needs a different number.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import check_dense, entries, shown
from nearfar.errors import NearfarError

__all__ = [
    "MISSING",
    "apart",
    "is_missing",
    "label_codes",
    "label_tensor",
    "missing_labels",
    "shared_codes",
    "whole_labels",
]

#: the number of a label that is not known
MISSING = -1
_TEXTS = ("", "nan", "NaN", "<NA>", "NaT", "None")
_TYPES = {"NoneType", "NAType", "NaTType", "MaskedConstant"}


def is_missing(label: object) -> bool:
    """Whether one label is unknown.

    >>> [is_missing(label) for label in (-1, float("nan"), None, " ", "none", 0, "-1", False)]
    [True, True, True, True, False, False, False, False]
    """
    if isinstance(label, str):
        return label.strip() in _TEXTS
    if type(label).__name__ in _TYPES:
        return True
    if type(label).__name__ == "Decimal" and hasattr(label, "is_nan"):
        return bool(label.is_nan() or label == MISSING)
    if isinstance(label, np.datetime64 | np.timedelta64):
        return bool(np.isnat(label))
    return (
        isinstance(label, numbers.Real)
        and not isinstance(label, bool)
        and bool(label != label or label == MISSING)
    )


def label_codes(labels: object, name: str = "labels") -> tuple[NDArray[np.int64], np.ndarray]:
    """A number from 0 for the class of each item, −1 where it is missing, and the classes in order.

    ``labels`` is a list, tuple, NumPy array, pandas column (nullable and categorical too) or tensor with one number,
    flag or text for each item. Labels of several types are compared as texts. Raises ``NearfarError``, which calls them
    ``name``, for anything else and for infinite numbers.

    >>> codes, classes = label_codes(["b", None, "a", "b"])
    >>> codes.tolist(), classes.tolist()
    ([1, -1, 0, 1], ['a', 'b'])
    >>> label_codes(np.array([3.0, -1.0, np.nan, 3.0]))[0].tolist()
    [0, -1, -1, 0]
    """
    values = _array(labels, name)
    if values.ndim != 1:
        raise NearfarError(f"{name} must be one class per item, not an array of shape {values.shape}")
    if values.dtype.kind == "O":
        values, missing = _of_objects(values, name)
    elif values.dtype.kind in "US":
        texts = values.astype(str)
        missing = np.isin(np.char.strip(texts), _TEXTS)
    elif values.dtype.kind in "iufb":
        missing = np.zeros(len(values), bool) if values.dtype.kind in "ub" else values == MISSING
        if values.dtype.kind == "f":
            missing |= np.isnan(values)
            if np.isinf(values).any():
                at = int(np.flatnonzero(np.isinf(values))[0])
                raise NearfarError(
                    f"{name} hold {values[at]} at position {at}, which is not finite; give every item a class"
                )
    elif values.dtype.kind in "mM":
        missing = np.isnat(values)
    else:
        raise NearfarError(f"{name} are {values.dtype}; one number or text for each item is needed")
    codes = np.full(len(values), MISSING, np.int64)
    classes, codes[~missing] = np.unique(values[~missing], return_inverse=True)
    return codes, classes


def _array(labels: object, name: str) -> np.ndarray:
    """The labels as an array; of objects where they are of several kinds, or where an array would hide a gap."""
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu()
        return (labels.float() if labels.dtype == torch.bfloat16 else labels).numpy()
    if isinstance(labels, np.ma.MaskedArray):
        objects = np.array(labels.data, object)
        objects[np.ma.getmaskarray(labels)] = None
        return objects
    if isinstance(labels, np.ndarray):
        return labels
    if hasattr(labels, "iloc") and hasattr(labels, "columns"):
        raise NearfarError(f"{name} is a table with the columns {list(labels.columns)[:5]}; pass one of them")
    if isinstance(getattr(labels, "dtype", None), np.dtype) and hasattr(labels, "to_numpy"):
        return labels.to_numpy()  # a column of pandas
    if isinstance(labels, (str, bytes, Mapping, set, frozenset)) or not isinstance(labels, Iterable):
        raise NearfarError(
            f"{name} is a {type(labels).__name__}; one label for each item is needed, such as a list"
        )
    given = list(labels)
    kinds = set(map(type, given))
    if kinds <= {int} or kinds <= {str} or kinds <= {float} or kinds <= {bool}:
        try:
            return np.asarray(given) if given else np.zeros(0, np.int64)
        except OverflowError:
            pass
    values = np.empty(len(given), object)
    for at, label in enumerate(given):
        values[at] = label
    return values


def _of_objects(values: np.ndarray, name: str) -> tuple[np.ndarray, NDArray[np.bool_]]:
    """Labels one by one: as numbers where all are, otherwise as texts."""
    given = [
        label.item() if getattr(label, "ndim", None) == 0 and hasattr(label, "item") else label
        for label in values
    ]
    for at, label in enumerate(given):
        if isinstance(label, (list, tuple, set, dict)) or getattr(label, "ndim", None):
            raise NearfarError(
                f"{name} must be one class per item, but position {at} holds a {type(label).__name__}; rows of several "
                "labels are a matrix of 0 and 1 (MultiLabelSupConLoss)"
            )
    missing = np.array([is_missing(label) for label in given], bool)
    known = [label for label, gone in zip(given, missing, strict=True) if not gone]
    whole = all(isinstance(label, numbers.Integral) for label in known)
    real = all(isinstance(label, numbers.Real) for label in known)
    filler: int | str = 0 if real else ""
    try:
        kind = np.int64 if whole else np.float64 if real else str
        coded = np.array(
            [
                filler if gone else label if real else str(label)
                for label, gone in zip(given, missing, strict=True)
            ],
            kind,
        )
    except OverflowError:
        coded = np.array([str(label) for label in given])
    if coded.dtype.kind == "f" and np.isinf(coded).any():
        raise NearfarError(f"{name} hold a value that is not finite; give every item a class")
    return coded, missing


def label_tensor(labels: object, name: str = "labels") -> Int[Tensor, " n"]:
    """``label_codes`` as a tensor, ready for ``nearfar.losses``.

    >>> label_tensor(["cat", None, "dog", "cat"])
    tensor([ 0, -1,  1,  0])
    """
    return torch.from_numpy(label_codes(labels, name)[0])


def whole_labels(labels: object, name: str = "labels") -> Tensor:
    """A tensor of labels, of any shape, as whole numbers with −1 where one is missing.

    Whole numbers are taken as they are, without a look. Of floating ones NaN is missing and the others are looked at,
    which waits for a device; ``NearfarError`` where one is no whole number, and for what is no tensor.

    >>> whole_labels(torch.tensor([2.0, float("nan"), 0.0]))
    tensor([ 2, -1,  0])
    """
    if not isinstance(labels, Tensor):
        pandas = hasattr(labels, "to_numpy")  # whose arrays may be read-only
        how = f"torch.tensor({name}.to_numpy())" if pandas else f"torch.as_tensor({name})"
        raise NearfarError(
            f"{name} is a {type(labels).__name__}; pass a tensor of whole numbers: {how}, or for texts and gaps "
            "nearfar.labels.label_tensor(labels of the whole data set), once and before batches are cut, so "
            "that a class has one number in all of them"
        )
    if labels.is_complex():
        raise NearfarError(
            f"{name} are {labels.dtype}; whole numbers are needed, -1 where a label is missing"
        )
    if not labels.is_floating_point():
        return labels if labels.dtype == torch.int64 else labels.long()
    labels = labels.detach()
    known = labels.masked_fill(labels.isnan(), MISSING)
    if not bool((known == known.round()).all()) or bool(known.isinf().any()):
        wrong = known[(known != known.round()) | known.isinf()]
        raise NearfarError(
            f"{name} hold {wrong.flatten()[0].item():g}, which is no class: whole numbers are needed, -1 or NaN where "
            "a label is missing"
        )
    return known.long()


def missing_labels(labels: Tensor) -> Bool[Tensor, "..."]:
    """Which labels of a tensor are missing; nothing waits for a device.

    >>> missing_labels(torch.tensor([0, -1, 3]))
    tensor([False,  True, False])
    """
    if not isinstance(labels, Tensor):
        raise NearfarError(
            f"labels is a {type(labels).__name__}; pass a tensor, such as that of label_tensor(labels)"
        )
    missing = labels == MISSING
    return missing | labels.isnan() if labels.is_floating_point() else missing


def apart(labels: Int[Tensor, " n"], first: int = 0) -> Int[Tensor, " n"]:
    """The same labels with a class of its own for each that is missing, so that it is equal to no other.

    Rows of different calls stay apart where ``first`` counts on. Nothing waits for a device.

    >>> labels = apart(torch.tensor([7, -1, -1, 7]))
    >>> (labels[:, None] == labels).int()
    tensor([[1, 0, 0, 1],
            [0, 1, 0, 0],
            [0, 0, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    labels = whole_labels(labels)
    if labels.ndim != 1:
        raise NearfarError(f"labels have shape {tuple(labels.shape)}; one for each row is needed")
    return torch.where(labels == MISSING, _own_classes(len(labels), first, labels.device), labels)


@lru_cache(maxsize=64)
def _own_classes(n: int, first: int, device: torch.device) -> Tensor:
    """Numbers that no class has: from the lowest up."""
    return torch.arange(first, first + n, device=device) + torch.iinfo(torch.int64).min


# -- labels of two sides ----------------------------------------------------------------------------------------
def shared_codes(**sides: object) -> list[NDArray[np.int64]]:
    """Codes 0, 1, … of the labels of several sides, equal for equal labels; −1 where a label is missing.

    Labels are numbers, texts or other hashable objects, one for each item. Numbers are compared as numbers of any
    type (1, 1.0 and ``np.uint8(1)`` are equal); numbers and texts are never equal, and sides that have none in common
    for that reason are refused.

    >>> shared_codes(queries=["cat", None, "dog"], keys=np.array(["dog", "cat"], dtype=object))
    [array([ 0, -1,  1]), array([1, 0])]
    >>> shared_codes(queries=np.array([3, -1]), keys=np.array([np.nan, 3.0]))
    [array([ 0, -1]), array([-1,  0])]
    """
    columns = {name: _column(name, labels) for name, labels in sides.items()}
    if all(column.dtype == np.int64 for column in columns.values()):
        every = np.concatenate(list(columns.values()))
        known = every != -1
        codes = np.full(len(every), -1, dtype=np.int64)
        codes[known] = np.unique(every[known], return_inverse=True)[1].reshape(-1)
        return np.split(codes, np.cumsum([len(column) for column in columns.values()])[:-1])
    table: dict[object, int] = {}
    coded = []
    for name, column in columns.items():
        codes = np.full(len(column), -1, dtype=np.int64)
        for i, label in enumerate(column.tolist()):
            if not is_missing(label):
                try:
                    codes[i] = table.setdefault(label, len(table))
                except TypeError:
                    raise NearfarError(
                        f"{name}: the label of item {i} is {shown(label)}; labels are one number or text "
                        "for each item, and items with several labels take a Boolean matrix"
                    ) from None
        coded.append(codes)
    _same_kind(columns)
    return coded


def _column(name: str, labels: object) -> np.ndarray:
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


def _numbers(name: str, array: np.ndarray, originals: list[object] | None = None) -> np.ndarray:
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


def _objects(values: list[object]) -> np.ndarray:
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column


def _same_kind(columns: Mapping[str, np.ndarray]) -> None:
    kinds = {}
    for name, column in columns.items():
        kinds[name] = {_kind(label) for label in column.tolist() if not is_missing(label)}
    known = {name: kind for name, kind in kinds.items() if kind}
    if len(known) > 1 and not set.intersection(*known.values()):
        stated = " and ".join(f"{name} are {', '.join(sorted(kind))}" for name, kind in known.items())
        raise NearfarError(f"{stated}: labels of different kinds are never equal; bring both to one type")


def _kind(label: object) -> str:
    if isinstance(label, (bool, int, float, np.number, np.bool_)):
        return "numbers"
    if isinstance(label, str):
        return "text"
    return "bytes" if isinstance(label, bytes) else f"of type {type(label).__name__}"
