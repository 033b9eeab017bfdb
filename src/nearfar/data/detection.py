"""Batches of pictures with true boxes: read on demand, in augmented views, or as kept maps of half an encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nearfar.data.batch import Batch, Draw, Inputs, ItemDataset, Rows
from nearfar.data.coco import CocoSplit
from nearfar.data.images import File, Photo, as_photo, crop, read_image, resize, stack

if TYPE_CHECKING:
    from nearfar.data.items import Column

__all__ = [
    "KeptView",
    "PicturesAt",
    "Target",
    "Targets",
    "TrueBoxes",
    "View",
    "detection_dataset",
    "make_view",
    "new_picture_dataset",
    "relative_boxes",
    "show",
    "target_of",
    "targets_of",
    "true_targets",
]


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


#: of one view of all pictures an encoder's maps (n, c, h, w), and the true boxes in it
KeptView = tuple[Tensor, Sequence[Target]]

_TRIES = 20


@dataclass(frozen=True)
class View:
    """How far a view may be from the picture.

    ``crop``: the smallest side of the part shown, as a share of the picture's; 1 shows all of it. ``kept``: share of a
    box that must be inside for it to stay; a part that keeps no box of a picture is drawn again. ``colours``: by how
    much brightness, contrast and saturation change, as a share; 0 leaves them. Half of the views are mirrored.
    """

    crop: float = 0.55
    kept: float = 0.6
    colours: float = 0.3


def make_view(
    picture: UInt8[np.ndarray, "h w 3"],
    boxes: Float[np.ndarray, "k 4"],
    labels: Int[np.ndarray, " k"],
    size: int,
    view: View | None,
    key: Sequence[int] = (),
) -> tuple[UInt8[np.ndarray, "3 size size"], Float[np.ndarray, "m 4"], Int[np.ndarray, " m"]]:
    """The picture at ``size`` × ``size`` pixels with the boxes that are still in it.

    Boxes are corners as shares of the picture, before and after. Without a ``view`` the whole picture is shown; what a
    view draws depends on ``key`` alone.

    >>> picture, box = np.zeros((40, 60, 3), np.uint8), np.array([[0.25, 0.5, 0.75, 1.0]])
    >>> pixels, boxes, labels = make_view(picture, box, np.array([0]), 32, None)
    >>> pixels.shape, boxes.tolist()
    ((3, 32, 32), [[0.25, 0.5, 0.75, 1.0]])
    """
    height, width = picture.shape[:2]
    if view is None:
        whole = (
            crop(picture, (0, 0, width, height), (size, size)) if (height, width) != (size, size) else picture
        )
        return np.ascontiguousarray(whole.transpose(2, 0, 1)), boxes, labels
    rng = np.random.default_rng(list(key))
    left, top, right, bottom = window = _window(rng, boxes, view)
    shown = crop(picture, (left * width, top * height, right * width, bottom * height), (size, size))
    inside, share = _clip(boxes, window)
    stays = share >= view.kept
    boxes, labels = inside[stays], labels[stays]
    boxes = (boxes - [left, top, left, top]) / [right - left, bottom - top, right - left, bottom - top]
    pixels = _recoloured(rng, shown, view.colours)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), boxes, labels


def _window(
    rng: np.random.Generator, boxes: Float[np.ndarray, "k 4"], view: View
) -> tuple[float, float, float, float]:
    """The part to show: at least one box stays, where there is one; after some tries the whole picture."""
    for _ in range(_TRIES if view.crop < 1 else 0):
        side, stretch = rng.uniform(view.crop, 1.0), math.exp(rng.uniform(-0.25, 0.25))
        w, h = min(1.0, side * stretch), min(1.0, side / stretch)
        left, top = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        window = (left, top, left + w, top + h)
        if not len(boxes) or (_clip(boxes, window)[1] >= view.kept).any():
            return window
    return 0.0, 0.0, 1.0, 1.0


def _clip(
    boxes: Float[np.ndarray, "k 4"], window: tuple[float, float, float, float]
) -> tuple[Float[np.ndarray, "k 4"], Float[np.ndarray, " k"]]:
    """The boxes cut at the window, and the share of each that is inside."""
    low, high = np.array(window[:2] * 2), np.array(window[2:] * 2)
    inside = boxes.clip(low, high)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return inside, np.prod(inside[:, 2:] - inside[:, :2], axis=1) / np.maximum(area, 1e-12)


def _recoloured(
    rng: np.random.Generator, pixels: UInt8[np.ndarray, "h w 3"], by: float
) -> UInt8[np.ndarray, "h w 3"]:
    if not by:
        return pixels
    brightness, contrast, saturation = rng.uniform(1 - by, 1 + by, 3)
    values = pixels.astype(np.float32) * brightness
    values = (values - values.mean()) * contrast + values.mean()
    grey = values.mean(axis=2, keepdims=True)
    return ((values - grey) * saturation + grey).round().clip(0, 255).astype(np.uint8)


def show(
    split: CocoSplit, position: int, size: int, view: View | None, key: Sequence[int]
) -> tuple[UInt8[np.ndarray, "3 s s"], Target]:
    """One picture, as it is or as ``view`` draws it from the generator that ``key`` names."""
    picture = read_image(split.images[position].path)
    boxes, labels = relative_boxes(split, position)
    pixels, boxes, labels = make_view(picture, boxes, labels, size, view, key)
    return pixels, target_of(boxes, labels)


class PicturesAt:
    """Inputs that are pictures at ``size`` × ``size`` pixels, read on demand; batches hold them as (b, 3, s, s)."""

    def __init__(self, photos: Sequence[Photo], size: int) -> None:
        self.photos, self.size = list(photos), size

    def __len__(self) -> int:
        return len(self.photos)

    def batch(self, positions: Int[Tensor, " b"]) -> UInt8[Tensor, "b 3 s s"]:
        shown = [resize(self.photos[i].read(), (self.size, self.size)) for i in positions.tolist()]
        return torch.from_numpy(stack(shown))


class _Views:
    """Shows the pictures of a training batch: until epoch ``until`` by kept maps, from then on in views of their own.

    In epoch e picture i has the kept view (e + i) mod views. A view that is drawn depends on (seed, epoch, position)
    and nothing else.
    """

    def __init__(
        self, split: CocoSplit, size: int, view: View, kept: Sequence[KeptView] = (), until: int = 0
    ) -> None:
        self.split, self.size, self.view, self.kept, self.until = split, size, view, list(kept), until

    def __call__(self, batch: Batch, draw: Draw) -> Batch:
        positions, epoch = batch.positions.tolist(), draw.epoch
        if epoch < self.until:
            views = [self.kept[(epoch + i) % len(self.kept)] for i in positions]
            maps = torch.stack([view[i] for i, (view, _) in zip(positions, views, strict=True)])
            targets = Targets(targets[i] for i, (_, targets) in zip(positions, views, strict=True))
            return batch.replaced(targets=targets, maps=maps.float())
        shown = [show(self.split, i, self.size, self.view, (draw.seed, epoch, i)) for i in positions]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in shown]))
        return batch.replaced(targets=Targets(target for _, target in shown), pixels=pixels)


def detection_dataset(
    split: CocoSplit,
    size: int,
    *,
    kept: Sequence[KeptView] = (),
    kept_until: int = 0,
    augment: View | None = None,
    seed: int = 0,
) -> ItemDataset:
    """The pictures of a split at ``size`` × ``size`` pixels and their true boxes, in batches.

    Fields are ``targets`` (`Targets`) and ``pixels`` (b, 3, s, s) of uint8, or ``maps`` (b, c, h, w) of the kept views.

    Args:
        kept: views whose maps are kept, the picture itself first. Without ``augment`` a batch has pixels and the maps
            of the first.
        kept_until: the epoch until which training batches have maps and no pixels.
        augment: how far the views of a training batch are from the picture; None: the pictures as they are.
        seed: of the views.
    """
    inputs: dict[str, Inputs] = {"targets": TrueBoxes(true_targets(split))}
    if augment is not None:
        return ItemDataset(inputs, _Views(split, size, augment, kept, kept_until), seed)
    inputs["pixels"] = PicturesAt([File(image.path) for image in split.images], size)
    if kept:
        inputs["maps"] = Rows(kept[0][0].float())
    return ItemDataset(inputs, seed=seed)


def new_picture_dataset(photos: Column, size: int) -> ItemDataset:
    """New pictures (see `Photo`) at ``size`` × ``size`` pixels, without true boxes."""
    targets = [Target.none() for _ in photos]
    return ItemDataset(
        {"targets": TrueBoxes(targets), "pixels": PicturesAt([as_photo(photo) for photo in photos], size)}
    )
