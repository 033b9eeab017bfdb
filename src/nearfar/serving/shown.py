"""Values as a page shows them: a text, a picture, a drawn molecule, boxes in a photo, the most expressed genes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.data.files import Json
from nearfar.data.images import decode_image, thumbnail
from nearfar.errors import NearfarError
from nearfar.towers import Tower

__all__ = ["as_picture", "shown_value"]

_SIDE = 320  # pixels of a picture on the page
_CHARACTERS = 4000
_GENES = 8
#: a picture that a store keeps itself
_IN_PLACE = "data:image/png;base64,"


def shown_value(value: Any, tower: Tower, url: str) -> Json:
    """The fields of `Shown`: its kind, the text of it, and the address of its picture where it has one."""
    if tower.kind == "image":
        return {"kind": "picture", "url": url, "text": _name(value)}
    if tower.kind == "molecule":
        return {"kind": "molecule", "url": url, "text": str(value)[:_CHARACTERS]}
    if tower.kind == "crops":
        photo, boxes = value.photo, value.boxes
        width, height = photo.size()
        fractions = [
            [left / width, top / height, right / width, bottom / height] for left, top, right, bottom in boxes
        ]
        return {"kind": "picture", "url": url, "boxes": fractions}
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return {"kind": "text", "text": " · ".join(value)[:_CHARACTERS]}
    if isinstance(value, np.ndarray) or (isinstance(value, Sequence) and not isinstance(value, str)):
        return {"kind": "numbers", "text": _numbers(np.asarray(value).reshape(-1), tower)}
    text = str(value)
    return {"kind": "text", "text": text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"}


def as_picture(value: Any, tower: Tower) -> tuple[str, bytes]:
    """Media type and bytes of a value's picture, drawn anew: what lies in a file is never handed on as it is.

    Raises:
        NearfarError: a value that has no picture, or a file that cannot be read.
    """
    if tower.kind == "image" and isinstance(value, str) and value.startswith(_IN_PLACE):
        return "image/png", thumbnail(decode_image(base64.b64decode(value.removeprefix(_IN_PLACE))), _SIDE)
    if tower.kind == "image":
        return "image/png", thumbnail(value, _SIDE)
    if tower.kind == "molecule":
        from nearfar.systems.molecules.system import draw

        drawing = draw(str(value), 260, 180)
        if not drawing:
            raise NearfarError("this molecule cannot be drawn")
        return "image/svg+xml", drawing.encode()
    if tower.kind == "crops":
        return "image/png", thumbnail(value.photo.read(), 2 * _SIDE)
    raise NearfarError("values of this view have no picture")


def _name(value: object) -> str | None:
    return (
        None if isinstance(value, np.ndarray) or str(value).startswith(_IN_PLACE) else Path(str(value)).name
    )


def _numbers(row: np.ndarray, tower: Tower) -> str:
    genes = getattr(tower, "genes", None)
    if genes is not None and len(genes) == len(row):
        top = [i for i in np.argsort(-row, kind="stable")[:_GENES].tolist() if row[i] > 0]
        return f"{len(row):,} genes; most expressed: " + (", ".join(genes[i] for i in top) or "none")
    shown = ", ".join(f"{float(number):.3g}" for number in row[:6])
    return shown if len(row) <= 6 else f"{len(row):,} numbers: {shown}, …"
