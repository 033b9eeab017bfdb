"""Arguments of samplers and measurements: plain numbers, flags and arrays, or an error that names them."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import NearfarError

__all__ = ["array", "flag", "number", "plain", "whole"]


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least`` as Python's own, or a clear error. NumPy's and 0-d tensors count too."""
    try:
        # A Boolean of torch would pass as 0 or 1.
        scalar = not _is_boolean(value) and getattr(value, "shape", ()) == ()
        number = operator.index(value) if scalar else None
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least:
        raise NearfarError(f"{name} is {_shown(value)}; give a whole number of at least {least}")
    return int(number)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, advice: str = "") -> float:
    """A number within bounds as Python's own; NaN, texts and Booleans are none."""
    result = math.nan
    if not _is_boolean(value) and not isinstance(value, (str, bytes)) and getattr(value, "shape", ()) == ():
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):
            result = float(value)
    if math.isnan(result) or not low <= result <= high:
        raise NearfarError(f"{name} is {_shown(value)}; give {advice or 'a number'}")
    return result


def flag(name: str, value: Any) -> bool:
    """True or False as Python's own."""
    if not _is_boolean(value):
        raise NearfarError(f"{name} is {_shown(value)}; give True or False")
    return bool(value)


def array(name: str, value: Any, needs: str, kinds: str = "iuf") -> NDArray[Any]:
    """A tensor, table, list or array as an array of numbers; ``needs`` says in words what is wanted.

    ``kinds``: the NumPy kinds that are taken, "iu" for whole numbers. pandas' nullable columns are numbers unless
    a value is missing. Ragged lists, texts and objects are refused.
    """
    if value is None or isinstance(value, (str, bytes, Mapping)):
        raise NearfarError(f"{name} is {_shown(value)}; give {needs}")
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            result = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
        elif not isinstance(value, np.ndarray) and hasattr(value, "to_numpy"):
            result = _of_table(value)
        else:
            result = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NearfarError(f"{name} cannot be read as an array ({first[:120]}); give {needs}") from None
    if result.dtype.kind not in kinds and not (result.size == 0 and result.dtype.kind == "f"):
        raise NearfarError(
            f"{name} is {'a scalar' if not result.ndim else f'an array {result.shape}'} of {result.dtype}, "
            f"from a {type(value).__name__}; give {needs}"
        )
    return result


def _of_table(value: Any) -> NDArray[Any]:
    """A column or table; pandas' nullable numbers come as objects, and are numbers all the same."""
    result = np.asarray(value.to_numpy())
    if (
        result.dtype == object
        and result.size
        and all(type(x) in (int, float) for x in result.ravel().tolist())
    ):
        return np.asarray(result.tolist())
    return result


def plain(value: Any) -> Any:
    """Nested data with scalars and arrays as Python's own, which ``json`` and ``torch.load`` read."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if value is None:
        return None
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise NearfarError(f"a state holds plain data, not a {type(value).__name__}: {value!r}")


def _is_boolean(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return True
    return getattr(value, "shape", None) == () and str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"
