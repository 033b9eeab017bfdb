"""Pictures of the report with true and predicted boxes, and cached maps of the encoder's first half."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from nearfar.data.cache import cached_arrays
from nearfar.data.coco import CocoSplit
from nearfar.data.images import read_image
from nearfar.metrics.detection import Boxes, box_overlap
from nearfar.models.detection import Target
from nearfar.models.image import ImageEncoder
from nearfar.systems.detector.data import DetectionDataset
from nearfar.systems.detector.dataset import View
from nearfar.training.sections import Picture, Section

__all__ = ["drawn", "kept_maps", "pictures_hash", "pictures_section"]


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


TRUE, FOUND = (255, 255, 255), (255, 140, 0)
_SHOWN = 12
_SIDE = 320  # pixels of a picture's longer side


def pictures_section(split: CocoSplit, true: Boxes, found: Boxes) -> Section:
    """Twelve pictures from the best found to the worst: at even steps of the IoU of the best-scored box."""
    reached = []
    for i in range(len(split)):
        best, theirs = best_found(found, i), true.boxes[true.picture == i]
        reached.append(float(box_overlap(best[:1], theirs).max()) if len(theirs) and len(best) else np.nan)
    there = np.flatnonzero(~np.isnan(reached))
    order = there[np.argsort(-np.asarray(reached)[there], kind="stable")]
    chosen = (
        order[np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int)]
        if len(order)
        else []
    )
    assert found.scores is not None
    pictures = []
    for i in chosen:
        box, score = best_found(found, i), float(found.scores[found.picture == i].max())
        image = drawn(
            read_image(split.images[i].path),
            [(b, TRUE) for b in true.boxes[true.picture == i]] + [(box[0], FOUND)],
        )
        group = split.images[i].group
        name = f"{split.groups[group]}, " if split.groups and group >= 0 else ""
        pictures.append(Picture(image, f"{name}IoU {reached[i]:.2f}, score {score:.2f}"))
    return Section(
        "Found and true boxes",
        "White: true boxes. Orange: the best-scored box that was found. From the best fit of the split to the worst, "
        "at even steps.",
        pictures=pictures,
    )


def best_found(found: Boxes, picture: int) -> np.ndarray:
    """The best-scored box of a picture, (1, 4), or (0, 4) where nothing was found."""
    rows = np.flatnonzero(found.picture == picture)
    assert found.scores is not None
    return found.boxes[rows[np.argsort(-found.scores[rows], kind="stable")[:1]]]


def drawn(
    pixels: UInt8[np.ndarray, "h w 3"], boxes: Sequence[tuple[np.ndarray, tuple[int, int, int]]]
) -> bytes:
    """A JPEG of the picture with boxes (left, top, right, bottom), in its pixels, in their colours."""
    from PIL import Image, ImageDraw

    scale = _SIDE / max(pixels.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for box, colour in boxes:
        pen.rectangle([float(v) * scale for v in box], outline=colour, width=3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
