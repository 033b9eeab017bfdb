"""Pairs as pictures for the report: both boxes, the relation that is true and the one that was said."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from nearfar.errors import NearfarError
from nearfar.systems.relations.records import Pairs
from nearfar.training.sections import Picture

__all__ = ["examples", "pair_picture"]

_SIDE = 320  # pixels of a picture's longer side
_SUBJECT, _OBJECT = (214, 69, 65), (37, 99, 168)
_RIGHT, _WRONG = 2, 2  # shown of each relation


def examples(
    pairs: Pairs,
    truth: Int[ndarray, " n"],
    said: Int[ndarray, " n"],
    relations: tuple[str, ...],
    seed: int = 0,
) -> list[Picture]:
    """Of every relation a few pairs that were told rightly and a few that were not; those with a photo first."""
    rng = np.random.default_rng([seed, len(pairs)])
    photo = pairs.has_photo
    shown: list[Picture] = []
    for c in range(len(relations)):
        for right, most in ((True, _RIGHT), (False, _WRONG)):
            at = np.flatnonzero((truth == c) & ((said == truth) == right))
            at = rng.permutation(at)
            for i in at[np.argsort(~photo[at], kind="stable")][:most]:
                words = f"{pairs.subject[i]} — {relations[c]} — {pairs.object[i]}"
                verdict = "right" if right else f"said: {relations[int(said[i])]}"
                shown.append(Picture(pair_picture(pairs, int(i)), f"{words} · {verdict}"))
    return shown


def pair_picture(pairs: Pairs, i: int) -> bytes:
    """A JPEG of one pair: the subject's box red, the object's blue; on grey where there is no photo."""
    from PIL import Image, ImageDraw

    width, height = pairs.size[i]
    scale = _SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.new("RGB", size, (232, 234, 238))
    photo: Any = pairs.photos.get(pairs.image[i])
    if photo is not None:
        with suppress(
            NearfarError
        ):  # damaged: it is listed among the rejections, and its boxes are shown on grey
            canvas = Image.fromarray(photo.read()).resize(size)
    draw = ImageDraw.Draw(canvas)
    for box, colour, name in (
        (pairs.object_box[i], _OBJECT, pairs.object[i]),
        (pairs.subject_box[i], _SUBJECT, pairs.subject[i]),
    ):
        left, top, right, bottom = (float(v) * scale for v in box)
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        draw.rectangle((left, top, left + 6 * len(name) + 4, top + 12), fill=colour)
        draw.text((left + 2, top), name, fill=(255, 255, 255))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
