"""What an argument must be, and an error that names it where it is something else.

Numbers may be Python's, NumPy's or a 0-d tensor's; flags are no numbers, and texts are numbers only where a file may
have written them (``text=True``: YAML 1.1 reads 1e-4 as a text). Only types, shapes and numbers on the host are looked
at, so that nothing waits for a device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

from nearfar.errors import NearfarError, nearest_name

__all__ = ["any_number", "choice", "flag", "number", "shown", "whole_number"]


def shown(value: Any) -> str:
    """A value as a message shows it: short.

    >>> shown("x"), shown([0.0] * 1000)[:40]
    ("'x'", '[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,')
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a message must not fail because a value cannot be shown
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}…"


def any_number(name: str, value: Any, text: bool = False) -> float:
    """A number, infinite ones and NaN too; ``NearfarError`` for anything else.

    >>> any_number("lr", "1e-4", text=True)
    0.0001
    >>> any_number("lr", True)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: lr is True; a number is needed
    """
    if (
        type(value) is float
    ):  # nearly always, and to ask for more takes as long as ten of a tensor's operations
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
    if isinstance(plain, bool) or not (isinstance(plain, numbers.Real) or type(plain).__name__ == "Decimal"):
        raise NearfarError(f"{name} is {shown(value)}; a number is needed")
    try:
        return float(plain)
    except OverflowError:
        return math.inf


def number(
    name: str,
    value: Any,
    least: float | None = None,
    *,
    above: float | None = None,
    most: float | None = None,
    text: bool = False,
) -> float:
    """A finite number within bounds; ``NearfarError`` for anything else.

    >>> number("dropout", 0.1, 0, most=1)
    0.1
    >>> number("temperature", 0, above=0)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: temperature is 0.0; a finite number above 0 is needed
    """
    found = any_number(name, value, text)
    if (
        math.isfinite(found)
        and (least is None or found >= least)
        and (above is None or found > above)
        and (most is None or found <= most)
    ):
        return found
    bounds = []
    if above is not None:
        bounds.append(f"above {above:g}")
    if least is not None:
        bounds.append(f"of {least:g} or more")
    if most is not None:
        bounds.append(f"of at most {most:g}")
    what = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise NearfarError(f"{name} is {found}; {what} is needed")


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, ``least`` or more; ``NearfarError`` for anything else.

    >>> whole_number("size", 8.0, 1)
    8
    """
    found = any_number(name, value)
    if not math.isfinite(found) or found != math.floor(found) or (least is not None and found < least):
        bound = "" if least is None else f" of at least {least}"
        raise NearfarError(f"{name} is {shown(value)}; a whole number{bound} is needed")
    return int(found)


def flag(name: str, value: Any) -> bool:
    """True or False; ``NearfarError`` for anything else, for a text such as "false" is true.

    >>> flag("normalize", "false")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: normalize is 'false'; it is True or False
    """
    if value is True or value is False:
        return value
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return bool(value)
    raise NearfarError(f"{name} is {shown(value)}; it is True or False")


def choice(name: str, value: Any, names: Iterable[str]) -> str:
    """One of some words; ``NearfarError`` for anything else.

    >>> choice("norm", "bach", ["batch", "layer"])
    Traceback (most recent call last):
    nearfar.errors.NearfarError: norm is 'bach': did you mean 'batch'?
    """
    known = list(names)
    if isinstance(value, str) and value in known:
        return value
    raise NearfarError(f"{name} is {shown(value)}: {nearest_name(str(value), known)}")
