"""Photos whose pixels are read when they are needed: files, and pictures in memory; boxes in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from nearfar.data.cache import content_key
from nearfar.data.images import image_size, read_image
from nearfar.errors import NearfarError

__all__ = ["Box", "File", "Photo", "PixelArray", "as_photo"]

#: (left, top, right, bottom) in pixels
Box = tuple[float, float, float, float]


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


def as_photo(value: Any) -> Photo:
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
    if all(hasattr(value, name) for name in ("read", "key", "size")):
        photo: Photo = value
        return photo
    raise NearfarError(f"a photo is a path or an array of pixels, and no {type(value).__name__}.")
