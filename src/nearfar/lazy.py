"""Public names of a package that are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str], others: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562) whose public names are resolved on first use.

    ``homes``: the module of the package in which each name is defined, which must have a different name. ``others``:
    its public names that the package imports itself.

    >>> import nearfar.batching
    >>> nearfar.batching.HardNegativeSampler.__module__    # nothing of it was imported before
    'nearfar.batching.hard_negative'
    """
    public = sorted({*homes, *others})

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'; it has {', '.join(public)}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: public
