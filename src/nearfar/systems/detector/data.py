"""The splits that ``data`` of a detector describes, COCO files or generated scenes, and new pictures to search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from nearfar.data.batch import Batch, ItemDataset
from nearfar.data.chunks import NewData
from nearfar.data.coco import CocoSplit
from nearfar.data.coco_files import coco_files, given_files
from nearfar.data.coco_results import CocoResults
from nearfar.data.coco_splits import read_coco_splits
from nearfar.data.detection import new_picture_dataset
from nearfar.data.items import Items
from nearfar.data.new_pictures import NEW_OPTIONS, pictures_of, read_pictures
from nearfar.errors import NearfarError
from nearfar.systems.detector.options import PictureData, SceneData
from nearfar.training.system import System

__all__ = ["PictureSystem", "folder_of_scenes", "read_splits"]


def read_splits(data: PictureData | SceneData, say: Callable[[str], None] = print) -> dict[str, CocoSplit]:
    """The splits ``train``, ``val`` and ``test`` of a data configuration (``data=pictures`` or ``data=scenes``).

    Files are named by ``data.train`` and so on, or found in ``data.dir``; see `read_coco_splits`.
    """
    folder, files = _files(data, say)
    images, fraction = None, 0.0  # generated scenes have all three files
    if isinstance(data, PictureData):
        images, fraction = None if data.images is None else Path(str(data.images)), data.val_fraction
    return read_coco_splits(
        files,
        folder=folder,
        images=images,
        category=None if data.category is None else str(data.category),
        group_key=data.group_key,
        groups=None if data.groups is None else [str(name) for name in data.groups],
        val_fraction=fraction,
        seed=int(data.split_seed),
        say=say,
    )


def folder_of_scenes(data: SceneData) -> Path:
    """The folder of the scenes that ``data`` describes, drawn where they are not there yet."""
    from nearfar.data.scenes.figures import scenes_folder

    return scenes_folder(
        (data.train, data.val, data.test),
        image_size=data.image_size,
        contrast=data.contrast,
        faint_contrast=data.faint_contrast,
        faint_share=data.faint_share,
        seed=data.split_seed,
    )


def _files(data: PictureData | SceneData, say: Callable[[str], None]) -> tuple[Path | None, dict[str, Path]]:
    """The data folder, where there is one, and the file of each split."""
    if isinstance(data, SceneData):
        folder = folder_of_scenes(data)
        return folder, coco_files(folder)
    place = None if data.dir is None else Path(str(data.dir))
    files = given_files(data)
    if not files:
        if place is None:
            raise NearfarError(
                "data.dir is needed: a folder with train.json (COCO format) and pictures. Or name the files: "
                "data.train=FILE, data.images=FOLDER. Or experiment=detector_scenes draws pictures."
            )
        by_split = coco_files(place, say)
        files = {"train": by_split.get("train") or by_split["whole"]}
        files |= {name: by_split[name] for name in ("val", "test") if name in by_split}
    return place, files


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
