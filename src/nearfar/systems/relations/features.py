"""Frozen features of the crops of subject and object: computed once for each picture, and kept by content."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from nearfar.data.cache import cached_arrays
from nearfar.data.images import crop, stack
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError
from nearfar.models.image import ImageEncoder
from nearfar.systems.relations.records import Pairs

__all__ = ["crop_features"]

_VERSION = 1  # of how crops are cut; part of every cache key
_BATCH = 64


def crop_features(
    parts: Iterable[Pairs],
    encoder: ImageEncoder,
    size: int,
    say: Callable[[str], None],
    rejections: Rejections,
    cache: bool = True,
) -> list[Float[ndarray, "n 2*width"]]:
    """For each split the features of its pairs: subject beside object; NaN where there is no photo.

    A photo that turns out to be damaged is counted in ``rejections``, and its pairs go on without pixels. An entry of
    the cache belongs to one picture: its content, its boxes, the encoder's weights and the size of the crops name it.
    """
    parts, known = list(parts), encoder.fingerprint()
    boxes: dict[str, dict[tuple[float, ...], int]] = {}
    photos: dict[str, Any] = {}
    for part in parts:
        photos |= part.photos
        for image, *pair in zip(part.image, part.subject_box, part.object_box, strict=True):
            if image in part.photos:
                own = boxes.setdefault(image, {})
                for box in pair:
                    own.setdefault(tuple(box.tolist()), len(own))
    features: dict[str, np.ndarray] = {}
    announced = False
    for image, wanted in boxes.items():
        computed = False

        def compute(
            image: str = image, wanted: dict[tuple[float, ...], int] = wanted
        ) -> dict[str, np.ndarray]:
            nonlocal computed
            computed = True
            return {"features": _encode(encoder, photos[image].read(), list(wanted), size)}

        try:
            key = [_VERSION, known, size, photos[image].key(), np.array(list(wanted))]
            features[image] = cached_arrays("relation-features", key, compute, enabled=cache)["features"]
        except (NearfarError, OSError) as error:
            rejections.add("damaged photo", None, image, str(error))
        if computed and not announced and len(boxes) > 50:
            announced = True
            say(
                f"features of the crops in {len(boxes)} pictures: the first time this takes a while; they are kept"
            )
    return [_rows(part, boxes, features, encoder.width) for part in parts]


@torch.no_grad()
def _encode(
    encoder: ImageEncoder, pixels: np.ndarray, boxes: list[tuple[float, ...]], size: int
) -> Float[ndarray, "boxes width"]:
    crops = stack([crop(pixels, box, (size, size)) for box in boxes])
    found = [encoder(torch.from_numpy(crops[at : at + _BATCH])) for at in range(0, len(crops), _BATCH)]
    return torch.cat(found).float().numpy()


def _rows(
    part: Pairs, boxes: dict[str, dict[tuple[float, ...], int]], features: dict[str, np.ndarray], width: int
) -> Float[ndarray, "n 2*width"]:
    rows = np.full((len(part), 2 * width), np.nan, dtype=np.float32)
    for i, image in enumerate(part.image):
        if image in part.photos and image in features:
            places = [boxes[image][tuple(box[i].tolist())] for box in (part.subject_box, part.object_box)]
            rows[i] = features[image][places].reshape(-1)
    return rows
