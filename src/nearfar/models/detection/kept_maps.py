"""Maps of an image encoder's first half for views of all pictures, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np
import torch

from nearfar.data.cache import cached_arrays
from nearfar.data.coco import CocoSplit
from nearfar.data.detection import KeptView, View, show
from nearfar.data.true_boxes import Target
from nearfar.models.image import ImageEncoder

__all__ = ["cached_maps", "pictures_hash"]

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
) -> list[KeptView]:
    """For each view the map at stride 16 of every picture, and the true boxes in it.

    The first view is the picture itself, in single precision; the others are drawn from (``seed``, view, position) and
    kept in half precision. They lie in the cache under everything they depend on, pictures and weights included.
    """
    pictures = pictures_hash(split)
    print_ = encoder.fingerprint()
    kept: list[KeptView] = []
    for number in range(views):
        drawn = None if number == 0 else view
        key = [_VERSION, pictures, split.content, print_, size, number, vars(drawn) if drawn else None, seed]

        def compute(number: int = number, drawn: View | None = drawn) -> dict[str, np.ndarray]:
            start = time.monotonic()
            arrays_of_view = _compute(split, size, encoder, number, drawn, seed)
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
    split: CocoSplit, size: int, encoder: ImageEncoder, number: int, view: View | None, seed: int
) -> dict[str, np.ndarray]:
    maps, targets = [], []
    for start in range(0, len(split), _ROWS):
        positions = range(start, min(start + _ROWS, len(split)))
        shown = [show(split, i, size, view, (seed, number, i)) for i in positions]
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
