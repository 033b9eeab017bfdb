"""Use of what a run learned: load it, embed, search, predict, export, serve."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearfar.lazy import lazy_names

if TYPE_CHECKING:
    from nearfar.serving.search import Hit as Hit
    from nearfar.serving.search import Hits as Hits
    from nearfar.serving.trained import Predictions as Predictions
    from nearfar.serving.trained import Trained as Trained
    from nearfar.serving.trained import load as load

# Resolved on first use: a store is opened in a fraction of the time that PyTorch takes to load.
_HOME = {
    "Hit": "search",
    "Hits": "search",
    "Predictions": "trained",
    "Trained": "trained",
    "load": "trained",
}
__all__ = list(_HOME)

__getattr__, __dir__ = lazy_names(__name__, _HOME, __all__)
