"""What a tower is: it reads values into arrays and builds the module trained on them; its graph for ONNX."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.data.batch import Augment, Inputs
from nearfar.data.files import Json, read_json
from nearfar.data.items import Column, value_keys
from nearfar.errors import NearfarError

__all__ = [
    "BATCH",
    "SPEC_FILE",
    "Backbone",
    "GraphInput",
    "Tower",
    "TowerGraph",
    "read_tower_spec",
    "write_tower_spec",
]


#: what is trained of a pretrained network: nothing, not even a head; a head above it; all of it; adapters in it (LoRA)
Backbone = Literal["frozen", "head", "full", "lora"]
SPEC_FILE = "tower.json"


class Tower(ABC):
    """Reads one view of the items: texts, pictures, molecules, numbers.

    A tower is built from plain keyword arguments, which it checks itself, without reading weights. ``fit`` sees the
    training values alone, ``read`` turns values into arrays, ``build`` gives the module that is trained: it takes what
    ``read(values).batch(positions)`` gives and returns (b, ``width``) vectors; its attribute ``width`` is their length.
    Weights that train belong to the checkpoint of a run; ``save`` keeps everything else that new values need.

    A tower of one's own is a class below this one, in a package with an entry point in the group ``nearfar.towers``::

        [project.entry-points."nearfar.towers"]
        spectrum = "my_package.tower:SpectrumTower"
    """

    #: by which ``tower=`` chooses it
    kind: ClassVar[str]
    #: the options that name a model, on a hub or in a folder
    models: ClassVar[Sequence[str]] = ()
    #: learning rate of the tower's own module; None: that of the run
    lr: float | None = None
    #: what is trained of a pretrained network
    train: Backbone = "full"

    @property
    @abstractmethod
    def description(self) -> str:
        """What is really used, in one phrase: architecture, where weights come from, what is trained."""

    @property
    @abstractmethod
    def options(self) -> Json:
        """The keyword arguments that build this tower again."""

    def check(self, values: Column) -> list[str | None]:
        """For each value why it cannot be read, such as an empty text; None where it can. No value here is missing."""
        return [None] * len(values)

    def fit(self, values: Column) -> Tower:
        """Learn from the training values, without labels; nothing to do for a pretrained network."""
        return self

    @abstractmethod
    def read(self, values: Column) -> Inputs:
        """Values as arrays; features of a frozen network come from the cache where it has them."""

    @abstractmethod
    def build(self) -> nn.Module:
        """A new module over a batch of what ``read`` gives; draws from PyTorch's generator."""

    def reference(self, values: Column) -> Float[np.ndarray, "n d"] | None:
        """Vectors in which similar values are near before any training: what neighbours and likely false negatives are
        found by. None where this tower has none."""
        return None

    @property
    def reads_reference(self) -> bool:
        """Whether ``read`` gives just the rows of ``reference``, so that these need no pass of their own."""
        return False

    def keys(self, values: Column) -> Sequence[object]:
        """For each value what is equal where two values are the same for this tower.

        Such items are no negatives of each other.
        """
        return value_keys(values)

    def augment(self, view: str) -> Augment | None:
        """What changes the field ``view`` of every training batch, such as masked atoms; None: nothing."""
        return None

    def save(self, folder: Path) -> None:
        """Write what new values need, besides the trained weights; ``load_tower`` reads it."""
        write_tower_spec(folder, self)

    def save_networks(self, folder: Path) -> None:
        """Write the networks that are not trained beside what ``save`` wrote, so that ``load_tower`` needs neither the
        package, nor the hub, nor the folder that they came from. Nothing to do where there are none."""

    def graph(self) -> TowerGraph:
        """This tower as a graph of tensors, for ONNX and torch.export; ``NearfarError`` with the reason where what it
        computes is none."""
        raise NearfarError(
            f"a tower of kind '{self.kind}' does not say how its values become tensors (graph)"
        )

    @classmethod
    def load(cls, folder: Path) -> Tower:
        """The tower that ``save`` wrote; its weights are in the run's checkpoint."""
        return cls(**read_tower_spec(folder)["options"])


def write_tower_spec(folder: Path, tower: Tower, **more: object) -> None:
    """Write kind, options and ``more`` of a tower as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"kind": tower.kind, "options": tower.options, **more}
    (folder / SPEC_FILE).write_text(json.dumps(spec, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tower_spec(folder: Path) -> Json:
    """What `write_tower_spec` wrote; ``NearfarError`` where it is missing or damaged."""
    path = folder / SPEC_FILE
    if not path.is_file():
        raise NearfarError(f"{folder} holds no saved tower ({SPEC_FILE} is missing).")
    spec = read_json(path, {"kind": str, "options": dict})
    assert isinstance(spec, dict)
    return spec


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
