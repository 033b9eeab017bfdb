"""Maps of the encoder's first half, kept: while that half does not learn, it is computed once for each view."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nearfar.data.cache import cached_arrays
from nearfar.data.coco import CocoSplit
from nearfar.models.detection import Target
from nearfar.models.image import ImageEncoder
from nearfar.systems.detector.data import DetectionDataset
from nearfar.systems.detector.views import View

__all__ = ["kept_maps", "pictures_hash"]

_VERSION = 1
_ROWS = 16


def kept_maps(
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
            found = _compute(dataset, encoder, number, drawn, seed)
            say(
                f"view {number + 1} of {views}: maps of {len(split)} pictures in {time.monotonic() - start:.0f} s"
            )
            return found

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
            found = encoder.feature_map(pixels, 16)
        maps.append((found if number == 0 else found.half()).numpy())
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
