"""Fabric asks for callbacks of other packages whenever it is built, five times in a run. Among as many packages as
these tests need, reading all their entry points is a tenth of what a tiny run takes: here they are read once.
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

OF_FABRIC = {"group": "lightning_fabric.callbacks_factory"}
_every_time, _once = metadata.entry_points, functools.cache(metadata.entry_points)


def entry_points(**of: Any) -> metadata.EntryPoints:
    """``importlib.metadata.entry_points``, which Fabric's question is put to once."""
    return (_once if of == OF_FABRIC else _every_time)(**of)


def ask_once() -> None:
    """To be called before Fabric is imported."""
    metadata.entry_points = entry_points
