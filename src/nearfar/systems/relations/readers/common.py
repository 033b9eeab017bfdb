"""What the readers share: JSON files with errors that name the place, and boxes out of what a file holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfar.errors import NearfarError
from nearfar.systems.relations.records import Box

__all__ = ["Places", "corner_box", "name_of", "read_json", "rows_of", "stated_size", "yyxx_box"]


@dataclass
class Places:
    """Where photos are: the folder that was named for them, the data folder. ``remarks``: what a reader has to say."""

    images: Path | None = None
    folder: Path | None = None
    remarks: list[str] = field(default_factory=list)


def rows_of(values: Any) -> list[Any]:
    """A list as it is; a TypeError for anything else that could be walked through by mistake."""
    if not isinstance(values, list):
        raise TypeError(f"a list is needed, not {type(values).__name__}")
    return values


def stated_size(picture: dict[str, Any]) -> tuple[float, float] | None:
    """(width, height) of a picture, numbers in quotes as well; None where one is missing, null or 0."""
    width, height = picture.get("width"), picture.get("height")
    if width in (None, "", 0) or height in (None, "", 0):
        return None
    return float(width), float(height)


def read_json(path: Path, kind: type, what: str) -> Any:
    """The content of a JSON file, which must be a ``kind`` (dict or list) with ``what`` in it."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise NearfarError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise NearfarError(f"{path}: not valid JSON ({error}). Is it complete?") from None
    if type(found) is not kind:
        wanted = "an object" if kind is dict else "a list"
        raise NearfarError(f"{path}: {wanted} with {what} is needed, but it holds a {type(found).__name__}.")
    return found


def yyxx_box(values: Any) -> Box:
    """(left, top, right, bottom) of [y0, y1, x0, x1], the order of VRD and SpatialSense."""
    y0, y1, x0, x1 = _four(values)
    return x0, y0, x1, y1


def corner_box(values: Any) -> Box:
    """(left, top, right, bottom) of a mapping with x, y, w, h."""
    x, y, w, h = _four([values[name] for name in "xywh"])
    return x, y, x + w, y + h


def _four(values: Any) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or len(values) != 4:
        raise ValueError(f"a box has four numbers, not {values!r}")
    return tuple(float(value) for value in values)


def name_of(names: Sequence[str], index: Any, what: str) -> str:
    """The name under an index of a list beside the annotations."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(names):
        raise ValueError(f"{what} {index!r} is none of the {len(names)} that are named")
    return str(names[index])
