"""Numbers of any library as plain floats, and an answer for what is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nearfar.errors import NearfarError

__all__ = ["estimate_of", "is_sequence", "number", "numbers", "plain"]

_WORDS = {"nan", "infinity", "-infinity", "inf", "-inf", "+inf"}


def plain(value: Any) -> Any:
    """Arrays and tensors as lists or numbers, estimates as mappings; anything else as it is."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "tolist"):
        return (value.detach() if hasattr(value, "detach") else value).tolist()
    return value


def is_sequence(value: Any) -> bool:
    """Whether this is a list or the like, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def number(value: Any, name: str, where: str) -> float | None:
    """A float; None for null; an error that names field and place for anything else.

    >>> number(True, "finite", "record 1"), number("NaN", "loss", "record 1")
    (1.0, nan)
    """
    value = plain(value)
    if value is None:
        return None
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return float(value)
    raise NearfarError(
        f"{where}: the field '{name}' is {value!r}, and a number is needed; leave it out or convert it"
    )


def numbers(values: Sequence[Any], name: str, where: str) -> tuple[float, ...]:
    """A tuple of floats; null becomes NaN."""
    found = (number(value, name, where) for value in values)
    return tuple(math.nan if value is None else value for value in found)


def estimate_of(value: Any, name: str) -> dict[str, Any]:
    """An estimate, its mapping, or a bare number, as a mapping with ``value`` and what else is known.

    >>> estimate_of(0.5, "R@1")
    {'value': 0.5}
    """
    value = plain(value)
    if not isinstance(value, dict):
        return {"value": number(value, name, "the context")}
    found = dict(value)
    for key in ("value", "low", "high", "chance", "gallery", "sd", "n"):
        if key in found:
            found[key] = number(found[key], f"{name}: {key}", "the context")
    protocol = found.get("protocol") or {}
    if found.get("gallery") is None and "gallery" in protocol:
        found["gallery"] = number(protocol["gallery"], f"{name}: gallery", "the context")
    return found
