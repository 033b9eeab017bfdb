"""Pictures with boxes and a group each, as batches of pixels and targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nearfar.data.coco import CocoSplit
from nearfar.data.images import read_image, resize, stack
from nearfar.models.detection import Target

__all__ = ["PictureBatch", "PictureDataset", "with_group"]


@dataclass
class PictureBatch:
    """``positions`` in ``split``, pictures as uint8, ``lower``: 1 for the group that is found less well, true boxes."""

    split: str
    positions: Int[Tensor, " b"]
    pictures: UInt8[Tensor, "b 3 h w"]
    lower: Int[Tensor, " b"]
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PictureBatch:
        moved = [part.to(device, non_blocking=non_blocking) for part in (self.positions, self.pictures, self.lower)]
        return PictureBatch(self.split, *moved, [target.to(device, non_blocking) for target in self.targets])

    def pin_memory(self) -> PictureBatch:
        parts = (self.positions, self.pictures, self.lower)
        targets = [Target(t.labels.pin_memory(), t.boxes.pin_memory()) for t in self.targets]
        return PictureBatch(self.split, *(part.pin_memory() for part in parts), targets)

    @property
    def pixels(self) -> Float[Tensor, "b 3 h w"]:
        """Values from 0 to 1."""
        return self.pictures.float() / 255


class PictureDataset:
    """A split, called ``name``, as the detector sees it: every picture at ``size`` × ``size`` pixels, read when it is asked for.

    ``labels``: the detector's label of each category. ``lower``: the position in ``split.groups`` of the group that is
    found less well.
    """

    def __init__(
        self, split: CocoSplit, name: str, size: int, labels: Sequence[int] | Int[np.ndarray, " c"], lower: int = 0
    ) -> None:
        self.split, self.name, self.size, self.lower = split, name, size, lower
        self.group = np.array([image.group for image in split.images])
        self._labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def __getitem__(self, position: int) -> PictureBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: list[int]) -> PictureBatch:
        pictures = [
            resize(read_image(self.split.images[i].path), (self.size, self.size)) for i in positions
        ]
        return PictureBatch(
            self.name,
            torch.tensor(positions),
            torch.from_numpy(stack(pictures)),
            torch.from_numpy((self.group[positions] == self.lower).astype(np.int64)),
            [self.target(i) for i in positions],
        )

    def target(self, position: int) -> Target:
        """True boxes of one picture: centre and size as shares of it; crowds are no boxes to learn."""
        own = np.arange(len(self.split.boxes))[self.split.of_image(position)]
        own = own[~self.split.crowd[own]]
        image, boxes = self.split.images[position], self.split.boxes[own]
        shares = boxes / [image.width, image.height, image.width, image.height]
        centred = np.concatenate([shares[:, :2] + shares[:, 2:] / 2, shares[:, 2:]], axis=1)
        return Target(
            torch.from_numpy(self._labels[self.split.label[own]]), torch.from_numpy(centred.astype(np.float32))
        )


def with_group(split: CocoSplit) -> CocoSplit:
    """The pictures that belong to one of the groups and have a box that is no crowd."""
    learnt = set(split.image[~split.crowd].tolist())
    kept = [i for i, image in enumerate(split.images) if image.group >= 0 and i in learnt]
    return split if len(kept) == len(split) else split.take(kept)
