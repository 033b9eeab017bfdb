"""COCO-format files into splits, and splits into batches: pixels, or maps kept of them, and true boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.data.cache import content_key
from nearfar.data.coco import CocoSplit, coco_files, read_coco
from nearfar.data.coco_files import given_files
from nearfar.data.images import read_image
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError
from nearfar.models.detection import Target
from nearfar.systems.detector.dataset import View, make_view
from nearfar.systems.detector.options import PictureData, SceneData

__all__ = [
    "DetectionBatch",
    "DetectionData",
    "DetectionDataset",
    "equal_bytes",
    "read_splits",
    "relative_boxes",
]


def read_splits(data: PictureData | SceneData, say: Callable[[str], None] = print) -> dict[str, CocoSplit]:
    """The splits ``train``, ``val`` and ``test`` of a data configuration (``data=pictures`` or ``data=scenes``).

    Files are named by ``data.train`` and so on, or found in ``data.dir`` (`nearfar.data.coco_files.coco_files`).
    Three files are taken as they are named. Where there is a val file and no test file, the val file is the test
    split, and ``data.val_fraction`` of train, stratified by group, is what epochs are chosen on: a number that was
    chosen on is none to report. Where there is a train file alone, both are held out of it.

    Raises:
        NearfarError: unreadable files (see `read_coco`), none of train's categories or groups in val or test, one
            picture file in two splits, too few pictures to hold any out.
    """
    folder, files = _files(data, say)
    groups = None if data.groups is None else [str(name) for name in data.groups]
    categories = None if data.category is None else [str(data.category)]
    images = None if isinstance(data, SceneData) or data.images is None else Path(str(data.images))
    read: dict[str, CocoSplit] = {}
    for name, path in files.items():
        split = read_coco(
            path,
            images,
            categories=categories,
            missing_categories="allow" if read else "error",
            group_key=data.group_key,
            groups=groups,
            folder=folder,
            say=say,
        )
        if not read:
            categories, groups = list(split.categories), list(split.groups) or None
        rejected = [split.rejections.summary()] if len(split.rejections) else []
        for sentence in [
            *rejected,
            *split.remarks(),
            *_unknown(read.get("train"), split, data.category is not None),
        ]:
            say(f"{name}: {path}: {sentence}")
        read[name] = split
    if read["train"].crowd.all():
        raise NearfarError(
            f"{read['train'].source}: every box is one around a crowd (iscrowd=1): there is none to learn from. Give "
            "boxes around single objects, with iscrowd=0."
        )
    # Generated scenes have all three files.
    fraction = data.val_fraction if isinstance(data, PictureData) else 0.0
    if "test" not in read:
        train = read.pop("train")
        if "val" in read:
            say(
                f"{files['val'].name} is the test split; {fraction:.0%} of train is held out to choose epochs on"
            )
            test = read.pop("val")
            train, val = _hold_out(train, fraction, int(data.split_seed))
        else:
            say(
                f"there is one file: {fraction:.0%} of it is the test split, as much is held out to choose epochs on"
            )
            train, test = _hold_out(train, fraction, int(data.split_seed))
            train, val = _hold_out(train, fraction, int(data.split_seed) + 1)
        read = {"train": train, "val": val, "test": test}
    elif "val" not in read:
        say(f"there is no file for val: {fraction:.0%} of train is held out to choose epochs on")
        read["train"], read["val"] = _hold_out(read["train"], fraction, int(data.split_seed))
    read = {name: read[name] for name in ("train", "val", "test") if name in read}
    check_disjoint({name: split.files for name, split in read.items()}, "picture")
    for sentence in equal_bytes(read):
        say(sentence)
    return read


def equal_bytes(splits: dict[str, CocoSplit]) -> list[str]:
    """A sentence for every two splits that hold pictures of the same bytes: one may be a copy of the other."""
    digests = {name: [image.digest for image in split.images] for name, split in splits.items()}
    shared = check_disjoint(digests, "picture", on_leak="count")
    return [
        f"{' and '.join(pair.split('/'))}: {leak['rows']} pictures of the second are byte for byte in the first, too: "
        "a leak, if they are copies"
        for pair, leak in shared.items()
    ]


def _unknown(train: CocoSplit | None, split: CocoSplit, one: bool) -> list[str]:
    """What the training file has no box or no name of, and this file has; and the other way round."""
    if train is None:
        return []
    sentences = []
    if split.left_out and not one:
        sentences.append("the training file does not have these categories: nothing is learned of them")
    known, here = set(train.label.tolist()), set(split.label.tolist())
    names = [train.categories[i] for i in sorted(here - known)]
    if names:
        sentences.append(f"no training box of {', '.join(names)}: it cannot be found")
    return sentences


@dataclass(frozen=True)
class DetectionData:
    """The splits of one experiment, as ``nearfar data`` shows them and a run records them."""

    splits: dict[str, CocoSplit]

    def layout(self) -> dict[str, Any]:
        """Counts, groups, rejections and hashes of each split, and one hash of all content."""
        return {
            "splits": {name: {"n": len(split), **split.layout()} for name, split in self.splits.items()},
            "classes": list(self.splits["train"].categories),
            "data_hash": content_key([split.content for split in self.splits.values()])[:16],
        }

    def summary(self) -> str:
        """A line for each split: pictures, those of each group, boxes."""
        lines = []
        for name, split in self.splits.items():
            groups = split.layout()["groups"]
            counts = ", ".join(f"{found['images']} {group}" for group, found in groups.items())
            lines.append(
                f"{name}: {len(split)} pictures{f' ({counts})' * bool(counts)}, {len(split.boxes)} boxes"
            )
        return "\n".join(lines)


def _files(data: PictureData | SceneData, say: Callable[[str], None]) -> tuple[Path | None, dict[str, Path]]:
    """The data folder, where there is one, and the file of each split."""
    if isinstance(data, SceneData):
        from nearfar.systems.detector.scenes import scenes_folder

        folder = scenes_folder(data)
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


def _hold_out(split: CocoSplit, fraction: float, seed: int) -> tuple[CocoSplit, CocoSplit]:
    """The split without a ``fraction`` of its pictures, and these; of each group the same share."""
    rng = np.random.default_rng([seed, len(split)])
    group = np.array([image.group for image in split.images])
    held = np.zeros(len(split), bool)
    for value in np.unique(group):
        members = rng.permutation(np.flatnonzero(group == value))
        held[members[: round(fraction * len(members))]] = True
    if held.all() or not held.any():
        raise NearfarError(
            f"{split.source}: data.val_fraction={fraction:g} of {len(split)} pictures leaves a split empty. Raise "
            "data.val_fraction (0.4, say), give more pictures, or name files with data.val=FILE data.test=FILE."
        )
    return split.take(np.flatnonzero(~held)), split.take(np.flatnonzero(held))


def relative_boxes(split: CocoSplit, position: int) -> tuple[Float[np.ndarray, "k 4"], Int[np.ndarray, " k"]]:
    """A picture's true boxes, crowds left out: corners as shares of the picture, and labels."""
    rows = split.of_image(position)
    keep = ~split.crowd[rows]
    boxes, image = split.boxes[rows][keep], split.images[position]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    sides = np.array([image.width, image.height, image.width, image.height])
    return corners / sides, split.label[rows][keep]


@dataclass
class DetectionBatch:
    """A batch: ``pixels``, or ``maps`` of the encoder's first half, or both; and the true boxes of each picture."""

    positions: Int[Tensor, " b"]
    targets: list[Target]
    pixels: UInt8[Tensor, "b 3 s s"] | None = None
    maps: Float[Tensor, "b c h w"] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DetectionBatch:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> DetectionBatch:
        return self._each(lambda part: part.pin_memory())

    def _each(self, move: Any) -> DetectionBatch:
        return replace(
            self,
            positions=move(self.positions),
            targets=[Target(move(target.labels), move(target.boxes)) for target in self.targets],
            pixels=None if self.pixels is None else move(self.pixels),
            maps=None if self.maps is None else move(self.maps),
        )


class DetectionDataset(Dataset[DetectionBatch]):
    """A split; ``__getitems__`` gives a whole `DetectionBatch`.

    Pictures are read when they are asked for and resized to ``size`` × ``size`` pixels. Until ``maps_until`` a batch
    comes from ``maps``: for view v of all pictures the encoder's map at stride 16 and the true boxes in it; in epoch e
    picture i shows view (e + i) mod views. From then on pictures are augmented anew, drawn from (seed, epoch, position)
    and nothing else. Without ``augment`` a picture is shown as it is, and its map beside it where there is one.
    """

    def __init__(
        self,
        split: CocoSplit,
        size: int,
        *,
        maps: Sequence[tuple[Tensor, list[Target]]] = (),
        maps_until: int = 0,
        augment: View | None = None,
        seed: int = 0,
    ) -> None:
        self.split, self.size, self.augment, self.seed = split, size, augment, seed
        self.maps, self.maps_until = list(maps), maps_until
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's views."""
        self._epoch.fill_(epoch)

    def __getitem__(self, position: int) -> DetectionBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> DetectionBatch:
        epoch = int(self._epoch)
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        if self.augment is not None and epoch < self.maps_until:
            views = [self.maps[(epoch + i) % len(self.maps)] for i in positions]
            maps = torch.stack([view[i] for i, (view, _) in zip(positions, views, strict=True)])
            targets = [targets[i] for i, (_, targets) in zip(positions, views, strict=True)]
            return DetectionBatch(chosen, targets, maps=maps.float())
        shown = [self.show(i, self.augment, (self.seed, epoch, i)) for i in positions]
        batch = DetectionBatch(
            chosen,
            [target for _, target in shown],
            torch.from_numpy(np.stack([pixels for pixels, _ in shown])),
        )
        if self.augment is None and self.maps:
            batch.maps = self.maps[0][0][chosen].float()
        return batch

    def show(
        self, position: int, view: View | None, key: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "3 s s"], Target]:
        """One picture, as it is or as ``view`` draws it from the generator that ``key`` names."""
        picture = read_image(self.split.images[position].path)
        boxes, labels = relative_boxes(self.split, position)
        pixels, boxes, labels = make_view(picture, boxes, labels, self.size, view, key)
        centre = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
        return pixels, Target(torch.from_numpy(labels), torch.from_numpy(centre.astype(np.float32)))
