"""Pictures with boxes and a group each, as batches of pixels and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nearfar.data.coco import CocoSplit
from nearfar.data.images import read_image, resize, stack
from nearfar.data.items import Items
from nearfar.models.detection import Target
from nearfar.models.detection.detector import to_centre
from nearfar.systems.detector.dataset import relative_boxes
from nearfar.systems.detector.new_pictures import no_target

__all__ = ["NEW", "NewPictureDataset", "PictureBatch", "PictureDataset", "with_group"]

#: the split that batches of new pictures belong to
NEW = "new"


@dataclass
class PictureBatch:
    """``positions`` in ``split``, pictures as uint8, ``lower``: 1 for the group with the lower AP, true boxes."""

    split: str
    positions: Int[Tensor, " b"]
    pictures: UInt8[Tensor, "b 3 h w"]
    lower: Int[Tensor, " b"]
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PictureBatch:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PictureBatch:
        return self._each(lambda part: part.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> PictureBatch:
        targets = [Target(move(target.labels), move(target.boxes)) for target in self.targets]
        return PictureBatch(self.split, move(self.positions), move(self.pictures), move(self.lower), targets)

    @property
    def pixels(self) -> Float[Tensor, "b 3 h w"]:
        """Values from 0 to 1."""
        return self.pictures.float() / 255


class PictureDataset:
    """A split, called ``name``, as the detector sees it: pictures of ``size`` × ``size`` pixels, read on demand.

    ``labels``: the detector's label of each category. ``lower``: the position in ``split.groups`` of the group with
    the lower AP.
    """

    def __init__(
        self,
        split: CocoSplit,
        name: str,
        size: int,
        labels: Sequence[int] | Int[np.ndarray, " c"],
        lower: int = 0,
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
        pictures = [resize(read_image(self.split.images[i].path), (self.size, self.size)) for i in positions]
        return PictureBatch(
            self.name,
            torch.tensor(positions),
            torch.from_numpy(stack(pictures)),
            torch.from_numpy((self.group[positions] == self.lower).astype(np.int64)),
            [self.target(i) for i in positions],
        )

    def target(self, position: int) -> Target:
        """True boxes of one picture: centre and size as shares of it; crowds are no boxes to learn."""
        boxes, labels = relative_boxes(self.split, position)
        centred = to_centre(torch.from_numpy(boxes.astype(np.float32)))
        return Target(torch.from_numpy(self._labels[labels]), centred)


class NewPictureDataset:
    """New pictures as the detector sees them: read on demand, without true boxes and groups."""

    def __init__(self, items: Items, size: int) -> None:
        self.photos, self.size = list(items["photo"]), size

    def __len__(self) -> int:
        return len(self.photos)

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def __getitems__(self, positions: list[int]) -> PictureBatch:
        pictures = [resize(self.photos[i].read(), (self.size, self.size)) for i in positions]
        nobody = torch.zeros(len(positions), dtype=torch.int64)
        targets = [no_target() for _ in positions]
        return PictureBatch(NEW, torch.tensor(positions), torch.from_numpy(stack(pictures)), nobody, targets)


def with_group(split: CocoSplit) -> CocoSplit:
    """The pictures that belong to one of the groups and have a box that is no crowd."""
    learnt = set(split.image[~split.crowd].tolist())
    kept = [i for i, image in enumerate(split.images) if image.group >= 0 and i in learnt]
    return split if len(kept) == len(split) else split.take(kept)
