"""Photos whose pixels are read when they are needed: files, and pictures in memory; boxes in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from nearfar.data.cache import content_key
from nearfar.data.images import image_size, read_image
from nearfar.errors import NearfarError

__all__ = ["Box", "Crops", "File", "Photo", "PixelArray", "as_photo"]

#: (left, top, right, bottom) in pixels
Box = tuple[float, float, float, float]


@runtime_checkable
class Photo(Protocol):
    """A picture whose pixels can be read: a file, an array, or a drawn scene."""

    def read(self) -> UInt8[ndarray, "h w 3"]: ...

    def key(self) -> str:
        """A hash of the content, for caches."""

    def size(self) -> tuple[float, float]:
        """Width and height."""


@dataclass(frozen=True)
class File:
    """A photo on disk."""

    path: Path

    def read(self) -> UInt8[ndarray, "h w 3"]:
        return read_image(self.path)

    def key(self) -> str:
        return content_key(self.path.read_bytes())

    def size(self) -> tuple[float, float]:
        height, width = image_size(self.path)
        return float(width), float(height)


@dataclass(frozen=True, eq=False)
class PixelArray:
    """A picture in memory.

    >>> PixelArray(np.zeros((4, 6, 3), np.uint8)).size()
    (6.0, 4.0)
    """

    pixels: UInt8[ndarray, "h w 3"]

    def read(self) -> UInt8[ndarray, "h w 3"]:
        return self.pixels

    def key(self) -> str:
        return content_key(self.pixels)

    def size(self) -> tuple[float, float]:
        height, width = self.pixels.shape[:2]
        return float(width), float(height)


def as_photo(value: object) -> Photo:
    """A photo of whatever holds one: the path of a file, an array (h, w, 3) of uint8, or a photo itself.

    Raises:
        NearfarError: a value that is none of them.

    >>> as_photo(np.zeros((4, 6, 3), np.uint8)).size()
    (6.0, 4.0)
    """
    if isinstance(value, (str, Path)):
        return File(Path(value))
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or not value.size:
            raise NearfarError(
                f"a photo is {value.dtype} {value.shape}; (height, width, 3) of uint8 is needed."
            )
        return PixelArray(value)
    if isinstance(value, Photo):
        return value
    raise NearfarError(f"a photo is a path or an array of pixels, and no {type(value).__name__}.")


@dataclass(frozen=True)
class Crops:
    """A photo, and the boxes of two objects in it."""

    photo: Photo
    boxes: tuple[Box, Box]

    @classmethod
    def of(cls, value: object) -> Crops:
        """A value as it is, or made of a photo and two boxes: (photo, box, box) or a mapping of ``photo``, ``first``
        and ``second``. A photo is a path or an array of pixels, a box left, top, right and bottom.

        Raises:
            NearfarError: a value that is none of these.

        >>> Crops.of((np.zeros((8, 8, 3), np.uint8), [0, 0, 4, 4], [4, 4, 8, 8])).boxes[1]
        (4.0, 4.0, 8.0, 8.0)
        """
        if isinstance(value, Crops):
            return value
        if isinstance(value, Mapping):
            value = [value.get(name) for name in ("photo", "first", "second")]
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
            raise NearfarError("a photo and two boxes are needed: (photo, box, box).")
        first, second = (_box(each) for each in value[1:])
        return cls(as_photo(value[0]), (first, second))


def _box(value: Iterable[float]) -> Box:
    try:
        left, top, right, bottom = (float(each) for each in value)
    except (TypeError, ValueError):
        raise NearfarError(
            f"a box is left, top, right and bottom in pixels, and not {str(value)[:40]}."
        ) from None
    return left, top, right, bottom
