"""Use of what a run learned: load it, embed, search, predict, export, serve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Hit", "Hits", "Predictions", "Trained", "load"]

if TYPE_CHECKING:
    from nearfar.serving.search import Hit, Hits
    from nearfar.serving.trained import Predictions, Trained, load

_PLACES = {
    "Hit": "search",
    "Hits": "search",
    "Predictions": "trained",
    "Trained": "trained",
    "load": "trained",
}


def __getattr__(name: str) -> Any:
    # A store is opened in a fraction of the time that PyTorch takes to load.
    if name in _PLACES:
        return getattr(importlib.import_module(f"nearfar.serving.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'nearfar.serving' has no attribute '{name}'")
