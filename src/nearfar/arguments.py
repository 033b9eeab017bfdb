"""Checks of arguments: the value as Python's or NumPy's own, or a ``NearfarError`` that names the argument.

Numbers may be Python's, NumPy's or a 0-d tensor's. Flags are not numbers. Texts are numbers only with ``text=True``
(YAML 1.1 reads 1e-4 as a text). Checks of single values look at types, shapes and numbers on the host, so that nothing
waits for a device. NumPy is imported only where an array is read.
"""

from __future__ import annotations

import math
import numbers as abstract
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from nearfar.errors import NearfarError, nearest_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "any_number",
    "array",
    "check_dense",
    "choice",
    "entries",
    "flag",
    "function",
    "instance",
    "mapping",
    "number",
    "numbers",
    "shown",
    "text",
    "whole_number",
    "whole_numbers",
]

T = TypeVar("T")
#: beyond it a count is a slip, and no generator takes it as a seed
_MOST = 2**64


def shown(value: object) -> str:
    """A value as a message shows it: short ones themselves, arrays and tables by type and shape.

    >>> shown("x"), shown([0.0] * 1000)[:40], shown(object())
    ("'x'", '[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,', 'a object')
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    try:
        words = " ".join(repr(value).split())
    except Exception:  # a message must not fail because a value cannot be shown
        words = "<"
    if words.startswith("<"):
        return f"a {type(value).__name__}"
    return words if len(words) <= 80 else f"{words[:77]}…"


# -- single values ---------------------------------------------------------------------------------------------------
def any_number(name: str, value: Any, text: bool = False) -> float:
    """A number, infinite ones and NaN too; ``NearfarError`` for anything else.

    >>> any_number("lr", "1e-4", text=True)
    0.0001
    >>> any_number("lr", True)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: lr is True; a number is needed
    """
    if type(value) is float:  # the usual case; the checks below take as long as ten operations of a tensor
        return value
    plain = value
    if hasattr(value, "ndim") and hasattr(value, "item"):  # of NumPy or torch
        if getattr(value, "requires_grad", False) or math.prod(value.shape) != 1:
            raise NearfarError(f"{name} is {shown(value)}; a number is needed")
        plain = value.item()
    if text and isinstance(plain, str):
        try:
            return float(plain)
        except ValueError:
            plain = None
    if isinstance(plain, bool) or not (isinstance(plain, abstract.Real) or type(plain).__name__ == "Decimal"):
        raise NearfarError(f"{name} is {shown(value)}; a number is needed")
    try:
        return float(plain)
    except OverflowError:
        return math.inf


def number(
    name: str,
    value: object,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    text: bool = False,
    infinite: bool = False,
) -> float:
    """A finite number within bounds, or with ``infinite`` any but NaN; ``NearfarError`` for anything else.

    >>> number("dropout", 0.1, 0, most=1)
    0.1
    >>> number("temperature", 0, above=0)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: temperature is 0.0; a finite number above 0 is needed
    """
    result = any_number(name, value, text)
    if (
        (math.isfinite(result) or (infinite and not math.isnan(result)))
        and (least is None or result >= least)
        and (above is None or result > above)
        and (most is None or result <= most)
    ):
        return result
    bounds = []
    if above is not None:
        bounds.append(f"above {above:g}")
    if least is not None:
        bounds.append(f"of {least:g} or more")
    if most is not None:
        bounds.append(f"of at most {most:g}")
    what = " ".join(["a number" if infinite else "a finite number", " and ".join(bounds)]).strip()
    raise NearfarError(f"{name} is {result}; {what} is needed")


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, ``least`` or more, as Python's own; ``NearfarError`` for anything else, floats among it.

    >>> whole_number("size", 8, 1)
    8
    >>> whole_number("size", 8.0, 1)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: size is 8.0; a whole number of at least 1 is needed
    """
    result = None
    if not _is_boolean(value) and getattr(value, "shape", ()) == ():
        with suppress(TypeError, ValueError, RuntimeError):
            result = operator.index(value)
    if result is None or abs(result) >= _MOST or (least is not None and result < least):
        bound = "" if least is None else f" of at least {least}"
        raise NearfarError(f"{name} is {shown(value)}; a whole number{bound} is needed")
    return result


def flag(name: str, value: object) -> bool:
    """True or False; ``NearfarError`` for anything else, for a text such as "false" is true.

    >>> flag("normalize", "false")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: normalize is 'false'; it is True or False
    """
    if value is True or value is False:
        return value
    if _is_boolean(value) and getattr(value, "shape", ()) == ():  # NumPy's, or a 0-d tensor's
        return bool(value)
    raise NearfarError(f"{name} is {shown(value)}; it is True or False")


def choice(name: str, value: object, names: Iterable[str]) -> str:
    """One of some words; ``NearfarError`` for anything else.

    >>> choice("norm", "bach", ["batch", "layer"])
    Traceback (most recent call last):
    nearfar.errors.NearfarError: norm is 'bach': did you mean 'batch'?
    """
    known = list(names)
    if isinstance(value, str) and value in known:
        return value
    raise NearfarError(f"{name} is {shown(value)}: {nearest_name(str(value), known)}")


def text(name: str, value: object) -> str:
    """A text; ``NearfarError`` for anything else."""
    return instance(name, value, str, "a text")


def instance(name: str, value: object, kind: type[T], what: str | None = None) -> T:
    """An object of this class; ``NearfarError`` for anything else."""
    if not isinstance(value, kind):
        raise NearfarError(f"{name} is {shown(value)}; {what or f'a {kind.__name__}'} is needed")
    return value


def mapping(name: str, value: object) -> Mapping[str, object]:
    """A dictionary or what is like one; ``NearfarError`` for anything else."""
    if not isinstance(value, Mapping):
        raise NearfarError(f"{name} is {shown(value)}; a mapping is needed")
    return value


def function(name: str, value: object) -> Callable[..., object]:
    """Something that can be called; ``NearfarError`` for anything else."""
    if not callable(value):
        raise NearfarError(f"{name} is {shown(value)}; a function is needed")
    return value


def _is_boolean(value: object) -> bool:
    return type(value).__name__ in ("bool", "bool_") or str(getattr(value, "dtype", "")) in (
        "bool",
        "torch.bool",
    )


# -- arrays ----------------------------------------------------------------------------------------------------------
def array(name: str, value: object, needs: str, kinds: str = "iuf") -> np.ndarray:
    """A tensor, table, list or array as an array of numbers in its own precision; ``needs`` says what is wanted.

    ``kinds``: the NumPy kinds that are taken, "iu" for whole numbers. Objects that are all numbers, such as those of
    pandas' nullable columns, are numbers. Ragged lists, texts and other objects are refused.
    """
    if value is None or isinstance(value, (str, bytes)):
        raise NearfarError(f"{name} is {shown(value)}; give {needs}")
    result = _read(name, value, f"give {needs}")
    if result.dtype.kind not in kinds and not (result.size == 0 and result.dtype.kind == "f"):
        raise NearfarError(
            f"{name} is {'a scalar' if not result.ndim else f'an array {result.shape}'} of {result.dtype}, "
            f"from a {type(value).__name__}; give {needs}"
        )
    return result


def numbers(name: str, values: object, *, finite: bool = True) -> NDArray[np.float64]:
    """An array of numbers in float64, from tensors, arrays, lists or tables.

    Texts, ragged lists, mappings, complex numbers and, with ``finite``, NaN and infinite values are refused.
    """
    import numpy as np

    array = _read(name, values, "an array or a list of numbers of one shape is needed")
    if array.dtype.kind not in "biuf":
        raise NearfarError(f"{name} holds {_content(array)}; numbers are needed")
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


def whole_numbers(name: str, values: object) -> NDArray[np.int64]:
    """An array of whole numbers in int64; fractions are refused, floats that hold whole numbers are not."""
    import numpy as np

    array = _read(name, values, "an array or a list of whole numbers is needed")
    if array.dtype.kind == "b":
        raise NearfarError(f"{name} holds Booleans; whole numbers are needed")
    if array.dtype.kind not in "iuf":
        raise NearfarError(f"{name} holds {_content(array)}; whole numbers are needed")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.floor(array))).all():
        raise NearfarError(f"{name} holds fractions, NaN or infinite values; whole numbers are needed")
    if array.dtype.kind in "uf" and array.size and (array.max() >= 2**63 or array.min() < -(2**63)):
        raise NearfarError(f"{name} holds {array.max()!r}, beyond 64 bits")
    return array.astype(np.int64)


def entries(name: str, values: object) -> list[Any]:
    """The values of a list, array, tensor or column, one for each item, as Python's own; gaps are ``None``."""
    import numpy as np

    if _is_tensor(values):
        check_dense(name, values)
    if (
        values is None
        or isinstance(values, (str, bytes, Mapping, set, frozenset))
        or not isinstance(values, Iterable)
        or not hasattr(values, "__len__")
    ):
        raise NearfarError(
            f"{name} is {shown(values)}; a list or an array with one entry for each item is needed"
        )
    if len(getattr(values, "shape", (0,))) != 1:
        raise NearfarError(f"{name} is {shown(values)}; one entry for each item is needed, in one dimension")
    if np.ma.isMaskedArray(values):
        return list(np.where(np.ma.getmaskarray(values), np.array(None), np.asarray(values)).tolist())
    for method in ("to_list", "tolist", "to_pylist"):  # pandas and polars, NumPy and torch, pyarrow
        if hasattr(values, method):
            return list(getattr(values, method)())
    return [value.item() if getattr(value, "shape", None) == () else value for value in values]


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return hasattr(value, "detach")


def check_dense(name: str, values: Tensor) -> None:
    """An error for a tensor whose numbers do not lie in memory, one beside the other."""
    if str(values.layout) != "torch.strided" or values.device.type == "meta" or values.is_quantized:
        raise NearfarError(
            f"{name} is a {values.layout} tensor of {values.dtype} on {values.device}; a dense one is needed"
        )


def _read(name: str, values: object, advice: str) -> np.ndarray:
    import numpy as np

    if isinstance(values, (Mapping, set, frozenset)):
        raise NearfarError(f"{name} is a {type(values).__name__}; {advice}")
    if isinstance(values, (list, tuple)) and any(hasattr(value, "detach") for value in values):
        values = [_of_tensor(name, value) if hasattr(value, "detach") else value for value in values]
    try:
        if _is_tensor(values):
            return _of_tensor(name, values)
        if not isinstance(values, np.ndarray) and hasattr(values, "to_numpy"):
            values = values.to_numpy()
        array = np.asarray(values)
    except NearfarError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NearfarError(f"{name} cannot be read as an array ({first[:120]}); {advice}") from None
    if array.dtype == object and array.size and all(_plain_number(value) for value in array.flat):
        plain = np.asarray(array.tolist())
        try:
            return plain.astype(np.float64) if plain.dtype == object else plain
        except OverflowError:
            raise NearfarError(f"{name} holds a number beyond the largest float") from None
    return array


def _of_tensor(name: str, values: Tensor) -> np.ndarray:
    check_dense(name, values)
    values = values.detach().cpu()
    result: np.ndarray = (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()
    return result


def _plain_number(value: object) -> bool:
    return isinstance(value, abstract.Real)


def _content(array: np.ndarray) -> str:
    if array.dtype.kind in "US":
        return f"text ({array.flat[0]!r})" if array.size else "text"
    if array.dtype == object and array.ndim == 0:
        return shown(array.item())
    if array.dtype == object and array.size:
        return shown(next((value for value in array.flat if not _plain_number(value)), None))
    return f"values of type {array.dtype}"
