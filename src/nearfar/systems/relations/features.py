"""Features of a pair of boxes: numbers of their geometry, and encoded crops of the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import NDArray

from nearfar.data.cache import cached_arrays
from nearfar.data.images import crop, stack
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.image import ImageEncoder
from nearfar.systems.relations.records import Pairs, Photo

__all__ = ["SPATIAL", "crop_features", "names_of", "overlap", "spatial_numbers"]


SPATIAL = ("raw", "log", "iou", "relative")
_EIGHT = ("dx", "dy", "distance²", "sin θ", "cos θ", "subject area", "object area", "area ratio")
_LOG = (*_EIGHT[:5], "log subject area", "log object area", "log area ratio")
_RELATIVE = (
    "dx / subject width", "dy / subject height", "dx / object width", "dy / object height",
    "log width ratio", "log height ratio", "log subject shape", "log object shape",
    "share of subject covered", "share of object covered",
    "subject bottom − object top", "subject bottom − object bottom", "subject top − object top",
    "subject top − object bottom", "subject left − object left", "subject right − object right",
    "gap below, in subjects", "gap above, in subjects", "subject x", "subject y",
)  # fmt: skip
_FURTHEST = 6.0  # sizes of a box, at which distances are clipped
_LEAST = 1e-6  # of an area, so that its logarithm is finite


def names_of(variant: str) -> tuple[str, ...]:
    """The name of each number of a variant."""
    if variant not in SPATIAL:
        raise NearfarError(f"spatial={variant}: {nearest_name(str(variant), SPATIAL)}")
    return {
        "raw": _EIGHT,
        "log": _LOG,
        "iou": (*_LOG, "IoU"),
        "relative": (*_LOG, "IoU", *_RELATIVE),
    }[variant]


def overlap(
    a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "n 4"]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Areas of the first boxes, of the second, and of their intersection; boxes are (left, top, right, bottom).

    >>> [x.tolist() for x in overlap(np.array([[0, 0, 2, 2.0]]), np.array([[1, 1, 3, 4.0]]))]
    [[4.0], [6.0], [1.0]]
    """
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    return (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]), (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]), shared


def spatial_numbers(
    subject: Float[np.ndarray, "n 4"],
    object_: Float[np.ndarray, "n 4"],
    size: Float[np.ndarray, "n 2"],
    variant: str = "raw",
) -> Float[np.ndarray, "n k"]:
    """Numbers of each pair of boxes (left, top, right, bottom), in pixels, in pictures of ``size`` (width, height).

    With centres divided by the picture's width and height, d = object − subject:

    "raw"       dx, dy, dx² + dy², sin θ, cos θ (θ = atan2(dy, dx); both 0 where the centres coincide), subject area,
                object area, area ratio. The ratio has no bound: a leaf on a tree is 1e-4, a tree behind a leaf 1e4.
    "log"       the same with the logarithms of the three areas.
    "iou"       "log", and the boxes' intersection over union.
    "relative"  "iou", and 20 numbers in units of the boxes themselves: distances of centres and of edges, shapes, the
                share of each box that the other covers. They do not depend on the picture's size.

    They are not standardised, which needs the training pairs.

    >>> boxes = np.array([[0.0, 0.0, 20.0, 10.0]]), np.array([[30.0, 0.0, 50.0, 10.0]])
    >>> spatial_numbers(*boxes, np.array([[100.0, 100.0]])).round(3).tolist()
    [[0.3, 0.0, 0.09, 0.0, 1.0, 0.02, 0.02, 1.0]]
    """
    names_of(variant)
    s, o, wh = (np.asarray(x, dtype=np.float64) for x in (subject, object_, size))
    centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (s, o)]
    d = (centres[1] - centres[0]) / wh
    squared = (d**2).sum(1)
    length = np.sqrt(squared)
    direction = np.divide(d, length[:, None], out=np.zeros_like(d), where=length[:, None] > 0)
    area_s, area_o, shared = overlap(s, o)
    whole = wh.prod(1)
    first, second = area_s / whole, area_o / whole
    place = np.stack([d[:, 0], d[:, 1], squared, direction[:, 1], direction[:, 0]], 1)
    if variant == "raw":
        return np.column_stack([place, first, second, first / np.maximum(second, _LEAST)])
    logs = [np.log(np.maximum(area, _LEAST)) for area in (first, second)]
    numbers = np.column_stack([place, *logs, logs[0] - logs[1]])
    if variant == "log":
        return numbers
    numbers = np.column_stack([numbers, shared / (area_s + area_o - shared)])
    if variant == "iou":
        return numbers
    return np.column_stack([numbers, _relative(s, o, centres, shared), centres[0] / wh])


def _relative(
    s: NDArray[np.float64],
    o: NDArray[np.float64],
    centres: list[NDArray[np.float64]],
    shared: NDArray[np.float64],
) -> NDArray[np.float64]:
    size_s, size_o = s[:, 2:] - s[:, :2], o[:, 2:] - o[:, :2]
    d = centres[1] - centres[0]
    (w_s, h_s), (w_o, h_o) = size_s.T, size_o.T
    numbers = np.column_stack(
        [
            d / size_s,
            d / size_o,
            np.log(size_s / size_o),
            np.log(w_s / h_s),
            np.log(w_o / h_o),
            shared / (w_s * h_s),
            shared / (w_o * h_o),
            (s[:, 3] - o[:, 1]) / h_o,
            (s[:, 3] - o[:, 3]) / h_o,
            (s[:, 1] - o[:, 1]) / h_o,
            (s[:, 1] - o[:, 3]) / h_o,
            (s[:, 0] - o[:, 0]) / w_o,
            (s[:, 2] - o[:, 2]) / w_o,
            (s[:, 3] - o[:, 1]) / h_s,
            (s[:, 1] - o[:, 3]) / h_s,
        ]
    )
    return np.clip(numbers, -_FURTHEST, _FURTHEST)


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
    """For each split the features of its pairs, subject and object concatenated; NaN where there is no photo.

    A damaged photo is counted in ``rejections``, and its pairs have no pixels. A cache entry belongs to one picture;
    its key is the picture's content, its boxes, the encoder's weights and the size of the crops.
    """
    parts, known = list(parts), encoder.fingerprint()
    boxes: dict[str, dict[tuple[float, ...], int]] = {}
    photos: dict[str, Photo] = {}
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
    features = [encoder(torch.from_numpy(crops[at : at + _BATCH])) for at in range(0, len(crops), _BATCH)]
    return torch.cat(features).float().numpy()


def _rows(
    part: Pairs, boxes: dict[str, dict[tuple[float, ...], int]], features: dict[str, np.ndarray], width: int
) -> Float[ndarray, "n 2*width"]:
    rows = np.full((len(part), 2 * width), np.nan, dtype=np.float32)
    for i, image in enumerate(part.image):
        if image in part.photos and image in features:
            places = [boxes[image][tuple(box[i].tolist())] for box in (part.subject_box, part.object_box)]
            rows[i] = features[image][places].reshape(-1)
    return rows
