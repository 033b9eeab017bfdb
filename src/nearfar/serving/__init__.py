"""Use of what a run learned: load it, embed, search, predict, export, serve."""

from nearfar.serving.trained import Predictions, Trained, load

__all__ = ["Predictions", "Trained", "load"]
