"""What every system does with new pictures in which boxes are found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from nearfar.data.batch import Batch, ItemDataset
from nearfar.data.chunks import NewData
from nearfar.data.coco_results import CocoResults
from nearfar.data.detection import new_picture_dataset
from nearfar.data.items import Items
from nearfar.data.new_pictures import NEW_OPTIONS, pictures_of, read_pictures
from nearfar.training.system import System

__all__ = ["PictureSystem"]

M = TypeVar("M", bound=nn.Module)


class PictureSystem(System[Batch, M]):
    """A system that finds boxes in pictures; ``image_size`` is what they are resized to each way, in pixels."""

    new_options = NEW_OPTIONS

    @property
    def image_size(self) -> int:
        raise NotImplementedError

    def new_items(self, source: NewData) -> Iterator[Items]:
        """Pictures of a folder, a list or a COCO file, see `read_pictures`."""
        return read_pictures(source)

    def items_of(self, values: Sequence[object]) -> Items:
        """Pictures, by their paths or as arrays (height, width, 3) of uint8."""
        return pictures_of(values)

    def new_dataset(self, items: Items) -> ItemDataset:
        return new_picture_dataset(items["photo"], self.image_size)

    def prediction_writer(self, output: Path, source: NewData) -> CocoResults | None:
        """COCO results for ``.json``."""
        return CocoResults(output) if output.suffix.lower() == ".json" else None
