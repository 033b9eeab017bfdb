"""Public names of a package that are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str], public: Iterable[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562) whose public names are resolved on first use.

    ``homes``: the module of the package in which each name is defined. No module may be called like a name: once it
    is imported, it would stand in the name's place. ``public``: all public names, for ``dir`` and for the
    ``AttributeError`` of a name that does not exist.

    >>> import nearfar.batching
    >>> nearfar.batching.HardNegativeSampler.__module__    # imported by this line, unless it was before
    'nearfar.batching.hard_negative'
    """
    known = sorted(public)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'; it has {', '.join(known)}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: known
