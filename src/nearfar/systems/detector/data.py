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
from nearfar.data.images import read_image
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError
from nearfar.models.detection import Target
from nearfar.systems.detector.views import View, make_view

__all__ = ["DetectionBatch", "DetectionData", "DetectionDataset", "read_splits", "relative_boxes"]


def read_splits(data: Any, say: Callable[[str], None] = print) -> dict[str, CocoSplit]:
    """The splits ``train``, ``val`` and perhaps ``test`` of a data configuration (``configs/data/coco.yaml``).

    Three files are taken as they are named. Where there is a val file and no test file, the val file is the test
    split, and ``data.val_fraction`` of train, stratified by group, is what epochs are chosen on: a number that was
    chosen on is none to report. Where there is a train file alone, both are held out of it.

    Raises:
        NearfarError: unreadable files (see `read_coco`), other categories or groups in val and test than in train, a
            picture in two splits, too few pictures to hold any out.
    """
    folder = _folder(data)
    files = coco_files(folder)
    groups = None if data.groups is None else [str(name) for name in data.groups]
    categories = None if data.category is None else [str(data.category)]
    read: dict[str, CocoSplit] = {}
    for name, path in files.items():
        read[name] = read_coco(path, categories=categories, group_key=data.group_key, groups=groups)
        if name == "train":
            categories, groups = list(read["train"].categories), list(read["train"].groups) or None
        if len(read[name].rejections):
            say(f"{name}: {path}: {read[name].rejections.summary()}")
    if "test" not in read:
        fraction = float(data.val_fraction)
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
    read = {name: read[name] for name in ("train", "val", "test") if name in read}
    check_disjoint({name: split.ids for name, split in read.items()}, "picture")
    return read


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


def _folder(data: Any) -> Path:
    if data.kind == "scenes":
        from nearfar.systems.detector.scenes import scenes_folder

        return scenes_folder(data)
    if data.dir is None:
        raise NearfarError(
            "data.dir is needed: a folder with train.json (COCO format) and pictures. Or data=scenes draws pictures."
        )
    return Path(str(data.dir))


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
            f"{split.source}: data.val_fraction={fraction:g} of {len(split)} pictures leaves a split empty; give more "
            "pictures, or files val.json and test.json."
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
