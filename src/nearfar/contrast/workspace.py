"""Buffers that are used again for every tile."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["Workspace", "room_for"]


class Workspace:
    """Hands out buffers by name, no larger than a tile, with the content of their last use.

    >>> import torch
    >>> space = Workspace(torch.empty(0), (4, 4))
    >>> space("logits", 2, 3).data_ptr() == space("logits", 4, 4).data_ptr()
    True
    """

    def __init__(self, like: Tensor, size: tuple[int, int]) -> None:
        self._like, self._length = like, size[0] * size[1]
        self.dtype = like.dtype
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int, int], Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Float[Tensor, "r c"]:
        view = self._views.get((name, rows, columns))
        if view is None:
            if name not in self._buffers:
                self._buffers[name] = self._like.new_empty(self._length)
            view = self._views[name, rows, columns] = self._buffers[name][: rows * columns].view(
                rows, columns
            )
        return view


def room_for(
    space: Workspace | None, like: Tensor, name: str, rows: int, columns: int
) -> Float[Tensor, "r c"]:
    """A buffer for numbers like ``like``; fresh memory where those of the workspace are of another dtype."""
    if space is None or space.dtype != like.dtype:
        return like.new_empty(rows, columns)
    return space(name, rows, columns)
