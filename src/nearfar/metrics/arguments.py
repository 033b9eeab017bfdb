"""Arguments of metrics, checked once: a value of another kind is an error that names its argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.errors import NearfarError

__all__ = [
    "described",
    "flag",
    "function",
    "instance",
    "number",
    "numbers",
    "real",
    "text",
    "whole",
    "whole_numbers",
]

#: beyond it a count is a slip, and floats no longer hold it
_MOST = 2**53


def whole(name: str, value: Any, least: int | None = 0, what: str = "a whole number") -> int:
    """A whole number, ``least`` or more; NumPy's and 0-d tensors of integers are some, Booleans and text are none."""
    try:
        result = None if _is_boolean(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        result = None
    if result is None or result > _MOST or (least is not None and result < least):
        bound = "" if least is None else f", {least} or more,"
        raise NearfarError(f"{name} is {described(value)}; {what}{bound} is needed")
    return result


def number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number within the bounds."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if _is_boolean(value) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise NearfarError(f"{name} is {described(value)}; a number is needed")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not least <= result <= most:
        between = f" between {least:g} and {most:g}" if math.isfinite(least) and math.isfinite(most) else ""
        between = between or (f", {least:g} or more," if math.isfinite(least) else "")
        raise NearfarError(f"{name} is {value!r}; a finite number{between} is needed")
    return result


def real(name: str, value: Any) -> float:
    """A number, NaN and infinite ones too, as a plain float."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if _is_boolean(value) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise NearfarError(f"{name} is {described(value)}; a number is needed")
    try:
        return float(value)
    except OverflowError:
        raise NearfarError(f"{name} is a number beyond the largest float") from None


def flag(name: str, value: Any) -> bool:
    """True or False; a text such as "no" would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise NearfarError(f"{name} is {described(value)}; True or False is needed")
    return bool(value)


def text(name: str, value: Any, allowed: Iterable[str] | None = None) -> str:
    """A text, one of ``allowed`` where that is given."""
    words = None if allowed is None else list(allowed)
    if not isinstance(value, str) or (words is not None and value not in words):
        wanted = "a text" if words is None else " or ".join(repr(word) for word in words)
        raise NearfarError(f"{name} is {described(value)}; {wanted} is needed")
    return value


def instance(name: str, value: Any, kind: type) -> Any:
    """An object of this class."""
    if not isinstance(value, kind):
        raise NearfarError(f"{name} is {described(value)}; a {kind.__name__} is needed")
    return value


def function(name: str, value: Any) -> Callable[..., Any]:
    """Something that can be called."""
    if not callable(value):
        raise NearfarError(f"{name} is {described(value)}; a function is needed")
    return value


def numbers(name: str, values: Any, *, finite: bool = True) -> NDArray[np.float64]:
    """An array of numbers in float64, from tensors, arrays, lists or tables.

    Texts, ragged lists, mappings, complex numbers and, with ``finite``, NaN and infinite values are refused.
    """
    array = _as_array(name, values)
    if array.dtype.kind not in "biuf":
        raise NearfarError(f"{name} holds {_kind(array)}; numbers are needed")
    result = array.astype(np.float64)
    if finite:
        bad = ~np.isfinite(result)
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0]) if result.ndim else ()
            where = f", the first at {place[0] if len(place) == 1 else place}" if place else ""
            raise NearfarError(
                f"{name} holds {int(bad.sum())} of {result.size} values that are NaN or infinite{where}; leave "
                "them out, or mend what made them"
            )
    return result


def whole_numbers(name: str, values: Any) -> NDArray[np.int64]:
    """An array of whole numbers in int64; fractions are refused, floats that hold whole numbers are not."""
    array = _as_array(name, values)
    if array.dtype.kind == "b":
        raise NearfarError(f"{name} holds Booleans; whole numbers are needed")
    if array.dtype.kind not in "iuf":
        raise NearfarError(f"{name} holds {_kind(array)}; whole numbers are needed")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.floor(array))).all():
        raise NearfarError(f"{name} holds fractions, NaN or infinite values; whole numbers are needed")
    if array.dtype.kind in "uf" and array.size and (array.max() >= 2**63 or array.min() < -(2**63)):
        raise NearfarError(f"{name} holds {array.max()!r}, beyond 64 bits")
    return array.astype(np.int64)


def described(value: Any) -> str:
    """A value as a message shows it: short ones themselves, others by type and shape."""
    if isinstance(value, (Tensor, np.ndarray)) or (hasattr(value, "shape") and hasattr(value, "dtypes")):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    shown = repr(value)
    if len(shown) <= 40 and not shown.startswith("<"):
        return shown
    return f"a {type(value).__name__}"


def _as_array(name: str, values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        return _of_tensor(name, values)
    if isinstance(values, (Mapping, set, frozenset)):
        raise NearfarError(f"{name} is a {type(values).__name__}; an array or a list of numbers is needed")
    if isinstance(values, (list, tuple)) and any(isinstance(value, Tensor) for value in values):
        values = [_of_tensor(name, value) if isinstance(value, Tensor) else value for value in values]
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NearfarError(
            f"{name} is no array of numbers ({error}); its rows need one length and one kind"
        ) from None
    if array.dtype == object and array.size and all(_plain_number(value) for value in array.flat):
        try:
            array = array.astype(np.float64)
        except OverflowError:
            raise NearfarError(f"{name} holds a number beyond the largest float") from None
    return array


def check_dense(name: str, values: Tensor) -> None:
    """An error for a tensor whose numbers do not lie in memory, one beside the other."""
    if values.layout != torch.strided or values.device.type == "meta" or values.is_quantized:
        raise NearfarError(
            f"{name} is a {values.layout} tensor of {values.dtype} on {values.device}; a dense one is needed"
        )


def _of_tensor(name: str, values: Tensor) -> NDArray[Any]:
    check_dense(name, values)
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def _plain_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, complex)


def _kind(array: NDArray[Any]) -> str:
    if array.dtype.kind in "US":
        return f"text ({array.flat[0]!r})" if array.size else "text"
    if array.dtype == object and array.ndim == 0:
        return f"{described(array.item())}"
    if array.dtype == object and array.size:
        odd = next((value for value in array.flat if not _plain_number(value)), None)
        return f"{described(odd)}"
    return f"values of type {array.dtype}"


def _is_boolean(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
