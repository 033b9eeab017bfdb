"""The true boxes of pictures, as detectors learn from them, and as a field of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.data.batch import Batch
from nearfar.data.coco import CocoSplit

__all__ = ["Target", "Targets", "TrueBoxes", "relative_boxes", "target_of", "targets_of", "true_targets"]


@dataclass
class Target:
    """The true boxes of one picture: centre x, centre y, width, height as shares of it, and their labels."""

    labels: Int[Tensor, " k"]
    boxes: Float[Tensor, "k 4"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return Target(
            self.labels.to(device, non_blocking=non_blocking),
            self.boxes.to(device, non_blocking=non_blocking),
        )

    def repeated(self, times: int) -> Target:
        """Each true box ``times`` times."""
        return Target(self.labels.repeat(times), self.boxes.repeat(times, 1))

    @classmethod
    def none(cls) -> Target:
        """Of a picture without boxes.

        >>> len(Target.none().labels), tuple(Target.none().boxes.shape)
        (0, (0, 4))
        """
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))


class Targets(list[Target]):
    """The true boxes of each picture of a batch: a field that moves and splits like a tensor.

    >>> [len(part) for part in Targets([Target.none()] * 3).split(2)]
    [2, 1]
    """

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Targets:
        return self._each(lambda part: part.pin_memory())

    def split(self, rows: int) -> list[Targets]:
        return [Targets(self[start : start + rows]) for start in range(0, len(self), rows)]

    def _each(self, move: Callable[[Tensor], Tensor]) -> Targets:
        return Targets(Target(move(target.labels), move(target.boxes)) for target in self)


class TrueBoxes:
    """Inputs that are the true boxes of the pictures of a split."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, positions: Int[Tensor, " b"]) -> Targets:
        return Targets(self.targets[i] for i in positions.tolist())


def targets_of(batch: Batch) -> Targets:
    """The field ``targets`` of a batch."""
    targets = batch["targets"]
    assert isinstance(targets, Targets)
    return targets


def relative_boxes(split: CocoSplit, position: int) -> tuple[Float[np.ndarray, "k 4"], Int[np.ndarray, " k"]]:
    """A picture's true boxes, crowds left out: corners as shares of the picture, and labels."""
    rows = split.of_image(position)
    keep = ~split.crowd[rows]
    boxes, image = split.boxes[rows][keep], split.images[position]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    sides = np.array([image.width, image.height, image.width, image.height])
    return corners / sides, split.label[rows][keep]


def true_targets(split: CocoSplit) -> list[Target]:
    """The true boxes of every picture of a split, crowds left out."""
    return [target_of(*relative_boxes(split, position)) for position in range(len(split))]


def target_of(corners: Float[np.ndarray, "k 4"], labels: Int[np.ndarray, " k"]) -> Target:
    """Of corners as shares of the picture."""
    centre = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    return Target(torch.from_numpy(labels), torch.from_numpy(centre.astype(np.float32)))
