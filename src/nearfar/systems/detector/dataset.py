"""Batches of pictures with boxes: read, augmented, or as cached feature maps of the encoder's first half."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.data.cache import cached_arrays
from nearfar.data.coco import CocoSplit
from nearfar.data.images import crop, read_image
from nearfar.models.detection import Target
from nearfar.models.image import ImageEncoder

__all__ = [
    "DetectionBatch",
    "DetectionDataset",
    "View",
    "cached_maps",
    "make_view",
    "pictures_hash",
    "relative_boxes",
]


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

    def _each(self, move: Callable[[Tensor], Tensor]) -> DetectionBatch:
        return replace(
            self,
            positions=move(self.positions),
            targets=[Target(move(target.labels), move(target.boxes)) for target in self.targets],
            pixels=None if self.pixels is None else move(self.pixels),
            maps=None if self.maps is None else move(self.maps),
        )


class DetectionDataset(Dataset[DetectionBatch]):
    """A split; ``__getitems__`` gives a whole `DetectionBatch`.

    Pictures are read on demand and resized to ``size`` × ``size`` pixels. Until ``maps_until`` a batch
    comes from ``maps``: for view v of all pictures the encoder's map at stride 16 and the true boxes in it; in epoch e
    picture i shows view (e + i) mod views. From then on pictures are augmented: the draw
    depends on (seed, epoch, position) and nothing else. Without ``augment`` a batch has the plain pictures, and their
    maps where they are cached.
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


_VERSION = 1  # of cached maps; part of their key
_ROWS = 16  # pictures that go through the encoder at a time


def cached_maps(
    split: CocoSplit,
    encoder: ImageEncoder,
    size: int,
    views: int,
    view: View | None,
    seed: int,
    say: Callable[[str], None],
) -> list[tuple[Tensor, list[Target]]]:
    """For each view the map at stride 16 of every picture, and the true boxes in it.

    The first view is the picture itself, in single precision; the others are drawn from (``seed``, view, position) and
    kept in half precision. They lie in the cache under everything they depend on, pictures and weights included.
    """
    dataset = DetectionDataset(split, size)
    pictures = pictures_hash(split)
    print_ = encoder.fingerprint()
    kept = []
    for number in range(views):
        drawn = None if number == 0 else view
        key = [_VERSION, pictures, split.content, print_, size, number, vars(drawn) if drawn else None, seed]

        def compute(number: int = number, drawn: View | None = drawn) -> dict[str, np.ndarray]:
            start = time.monotonic()
            arrays_of_view = _compute(dataset, encoder, number, drawn, seed)
            say(
                f"view {number + 1} of {views}: maps of {len(split)} pictures in {time.monotonic() - start:.0f} s"
            )
            return arrays_of_view

        arrays = cached_arrays("detector_maps", key, compute)
        kept.append((torch.from_numpy(arrays["maps"]), _unpacked(arrays)))
    return kept


def pictures_hash(split: CocoSplit) -> str:
    """Names the bytes of all pictures, in order."""
    digest = hashlib.sha256()
    for image in split.images:
        known = image.digest or hashlib.sha256(image.path.read_bytes()).hexdigest()
        digest.update(bytes.fromhex(known))
    return digest.hexdigest()


def _compute(
    dataset: DetectionDataset, encoder: ImageEncoder, number: int, view: View | None, seed: int
) -> dict[str, np.ndarray]:
    maps, targets = [], []
    for start in range(0, len(dataset), _ROWS):
        positions = range(start, min(start + _ROWS, len(dataset)))
        shown = [dataset.show(i, view, (seed, number, i)) for i in positions]
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in shown]))
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # as the detector has them
        targets += [target for _, target in shown]
        with torch.no_grad():
            features = encoder.feature_map(pixels, 16)
        maps.append((features if number == 0 else features.half()).numpy())
    return {
        "maps": np.concatenate(maps),
        "boxes": np.concatenate([t.boxes.numpy() for t in targets]),
        "labels": np.concatenate([t.labels.numpy() for t in targets]),
        "counts": np.array([len(t.labels) for t in targets]),
    }


def _unpacked(arrays: dict[str, np.ndarray]) -> list[Target]:
    counts = arrays["counts"].tolist()
    labels, boxes = (torch.from_numpy(arrays[name]).split(counts) for name in ("labels", "boxes"))
    return [Target(label, box) for label, box in zip(labels, boxes, strict=True)]
