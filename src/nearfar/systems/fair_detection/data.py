"""Pictures with boxes and a group each: a split as the detector sees it, and its batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.data.batch import Batch, Inputs, ItemDataset, Rows
from nearfar.data.coco import CocoSplit
from nearfar.data.detection import PicturesAt
from nearfar.data.photos import File
from nearfar.data.true_boxes import Target, TrueBoxes, relative_boxes
from nearfar.models.detection.detector import to_centre

__all__ = ["PictureSplit", "clean_pixels", "with_group"]


@dataclass(frozen=True)
class PictureSplit:
    """A split as the detector sees it: pictures of ``size`` × ``size`` pixels, read on demand.

    Attributes:
        number: which split it is; every batch says it in the field ``split``.
        labels: the detector's label of each category.
    """

    split: CocoSplit
    number: int
    size: int
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.split)

    @property
    def group(self) -> Int[np.ndarray, " n"]:
        """The position of each picture's group in ``split.groups``."""
        return np.array([image.group for image in self.split.images])

    def target(self, position: int) -> Target:
        """True boxes of one picture: centre and size as shares of it; crowds are no boxes to learn."""
        boxes, labels = relative_boxes(self.split, position)
        centred = to_centre(torch.from_numpy(boxes.astype(np.float32)))
        return Target(torch.from_numpy(np.asarray(self.labels, np.int64)[labels]), centred)

    def dataset(self, lower: int | None = None) -> ItemDataset:
        """Batches of ``pixels``, ``targets``, ``split``, and ``lower``: 1 for the group ``lower`` (that with the lower
        AP), left out where it is not known yet.
        """
        n = len(self)
        inputs: dict[str, Inputs] = {
            "pixels": PicturesAt([File(image.path) for image in self.split.images], self.size),
            "targets": TrueBoxes([self.target(position) for position in range(n)]),
            "split": Rows(np.full(n, self.number)),
        }
        if lower is not None:
            inputs["lower"] = Rows((self.group == lower).astype(np.int64))
        return ItemDataset(inputs)


def clean_pixels(batch: Batch) -> Float[Tensor, "b 3 h w"]:
    """The pictures of a batch, values from 0 to 1."""
    return batch.tensor("pixels").float() / 255


def with_group(split: CocoSplit) -> CocoSplit:
    """The pictures that belong to one of the groups and have a box that is no crowd."""
    learnt = set(split.image[~split.crowd].tolist())
    kept = [i for i, image in enumerate(split.images) if image.group >= 0 and i in learnt]
    return split if len(kept) == len(split) else split.take(kept)
