"""nearfar: pull what belongs together near, push the rest far, and know why it worked.

``import nearfar`` loads nothing heavy; ``nearfar.losses``, ``nearfar.batching``, ``nearfar.metrics`` and the
other floors are imported when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FLOORS = (
    "batching",
    "data",
    "doctor",
    "errors",
    "functional",
    "integrations",
    "lab",
    "losses",
    "metrics",
    "mining",
    "models",
    "schedules",
    "serving",
    "systems",
    "towers",
    "training",
    "verify",
)
__all__ = ["__version__", "load", *_FLOORS]

if TYPE_CHECKING:
    from nearfar.serving.trained import load


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("nearfar.serving.trained").load
    if name in _FLOORS:
        return importlib.import_module(f"nearfar.{name}")
    raise AttributeError(f"module 'nearfar' has no attribute '{name}'; it has {', '.join(_FLOORS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
