"""Pictures for the report: clean, perturbation (amplified), perturbed, with true and found boxes and their scores."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from nearfar.training.sections import Picture

__all__ = ["chosen", "panel"]

#: least side of a picture in the report, in pixels
SIDE = 224
TRUE, FOUND = (70, 200, 110), (250, 140, 40)


def chosen(groups: Float[np.ndarray, " n"] | Sequence[int], count: int, seed: int) -> list[int]:
    """Positions of ``count`` pictures, drawn by ``seed``, as many of each of the two groups as there can be.

    >>> sorted(chosen([0, 1, 1, 1, 0], 4, 0))[0] in (0, 1, 2)
    True
    """
    values = np.asarray(groups)
    rng = np.random.default_rng([seed, len(values)])
    parts = [rng.permutation(np.flatnonzero(values == value)).tolist() for value in np.unique(values)]
    mixed = [part[i] for i in range(max(map(len, parts), default=0)) for part in parts if i < len(part)]
    return mixed[:count]


def panel(
    clean: UInt8[np.ndarray, "h w 3"],
    perturbed: Float[np.ndarray, "h w 3"],
    true: Float[np.ndarray, "k 4"],
    before: Float[np.ndarray, "q 6"],
    after: Float[np.ndarray, "q 6"],
    bound: float,
    caption: str,
) -> Picture:
    """Three pictures side by side. The middle one is the perturbation: grey is none, black and white are ∓ ``bound``.

    ``true``: corners as shares of the picture. ``before``, ``after``: detections (corners, score, label),
    of which as many as there are true boxes are drawn, best first.
    """
    from PIL import Image

    delta = perturbed - clean / 255.0
    shown = 0.5 + 0.5 * delta / max(bound, 1e-9)
    scale = max(1, -(-SIDE // clean.shape[1]))
    parts = []
    for pixels, boxes in (
        (clean / 255.0, before),
        (shown, None),
        (perturbed, after),
    ):
        image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if boxes is not None:
            _draw(image, true, boxes)
        parts.append(np.asarray(image))
    gutter = np.full((parts[0].shape[0], 6, 3), 255, np.uint8)
    whole = np.concatenate([parts[0], gutter, parts[1], gutter, parts[2]], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, "JPEG", quality=88)
    return Picture(buffer.getvalue(), caption)


def _draw(image: Any, true: Float[np.ndarray, "k 4"], found: Float[np.ndarray, "q 6"]) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    size = np.array([image.width, image.height] * 2)
    for box in true * size:
        draw.rectangle(tuple(box), outline=TRUE, width=2)
    for row in found[np.argsort(-found[:, 4], kind="stable")][: max(1, len(true))]:
        left, top, right, bottom = row[:4] * size
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=FOUND, width=2)
        draw.text((left + 4, max(0, top) + 2), f"{row[4]:.2f}", fill=FOUND)
