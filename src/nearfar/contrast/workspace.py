"""Buffers that are used again for every tile."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["Workspace"]


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

    def __call__(self, name: str, rows: int, columns: int) -> Float[Tensor, "r c"]:
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._length)
        return self._buffers[name][: rows * columns].view(rows, columns)
