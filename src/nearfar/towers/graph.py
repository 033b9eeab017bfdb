"""A tower as one graph of tensors: what ONNX and torch.export take, and how its inputs are made without nearfar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from nearfar.data.files import Json
from nearfar.data.items import Column

__all__ = ["BATCH", "GraphInput", "TowerGraph"]

#: the axis of rows in the shape of an input
BATCH = "batch"


@dataclass(frozen=True)
class GraphInput:
    """A tensor that a graph takes: its name, its NumPy dtype, and its shape, in which names are axes of any length.

    ``about`` says in a phrase what it holds.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    about: str


@dataclass(frozen=True)
class TowerGraph:
    """What a tower does with tensors that anyone can make.

    Args:
        inputs: the tensors, in order.
        field: a module that takes them and gives the field of a batch that the tower's trained module reads; what is
            computed before training, such as a frozen network, is part of it.
        tensors: values of the view as these tensors, by name.
        recipe: how they are made of a value without nearfar, as plain values for JSON.
        save: writes what making them needs beside the graph, such as a tokenizer; None: nothing.
        lengths: the shortest and the longest that a named axis of the inputs may be.
    """

    inputs: Sequence[GraphInput]
    field: nn.Module
    tensors: Callable[[Column], dict[str, np.ndarray]]
    recipe: Json
    save: Callable[[Path], None] | None = None
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def describe(self) -> Json:
        """Inputs and recipe as plain values."""
        return {
            "inputs": [
                {"name": each.name, "dtype": each.dtype, "shape": list(each.shape), "about": each.about}
                for each in self.inputs
            ],
            **self.recipe,
        }


class AsItIs(nn.Module):
    """The field is the one input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x
