"""Patches out of large pictures, and jpg in and out of memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from nearfar.data.images import MAX_PIXELS, image_size, read_image, resize
from nearfar.errors import NearfarError

__all__ = ["Box", "box_around", "codec", "cut", "decode_jpeg", "encode_jpeg", "read_large"]

#: left, top, right, bottom in whole pixels
Box = tuple[int, int, int, int]


def box_around(x: float, y: float, field: float) -> Box:
    """The square of ``field`` pixels around a point, moved to whole pixels.

    >>> box_around(10.2, 20.0, 4)
    (8, 18, 12, 22)
    """
    side = max(round(field), 1)
    left, top = round(x - side / 2), round(y - side / 2)
    return left, top, left + side, top + side


def cut(pixels: UInt8[np.ndarray, "h w 3"], box: Box, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """What of a picture lies in a box, at ``size`` × ``size`` pixels, each a mean over what it covers.

    Raises:
        NearfarError: a box that is not wholly inside.
    """
    left, top, right, bottom = box
    if left < 0 or top < 0 or bottom > pixels.shape[0] or right > pixels.shape[1]:
        raise NearfarError(
            f"the box {box} is not inside a picture of {pixels.shape[1]} × {pixels.shape[0]} pixels."
        )
    part = np.ascontiguousarray(pixels[top:bottom, left:right])
    return part if part.shape[:2] == (size, size) else resize(part, (size, size))


def read_large(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of up to some hundred million pixels, 3 bytes of memory each.

    JPEG is decoded into the array itself where simplejpeg is installed; `read_image`, which reads everything else,
    holds two to three copies for a moment.
    """
    image_size(path)  # says what is wrong with the file, if anything
    try:
        import simplejpeg
    except ImportError:
        return read_image(path)
    if path.suffix.lower() not in (".jpg", ".jpeg") or _turned(path):
        return read_image(path)
    data = path.read_bytes()
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors not in ("YCbCr", "RGB", "Gray") or height * width > MAX_PIXELS:
            return read_image(path)
        found: np.ndarray = simplejpeg.decode_jpeg(data)
        return found
    except ValueError as error:
        raise NearfarError(f"{path} cannot be read: {error}. Is it complete?") from None


def _turned(path: Path) -> bool:
    """Whether the camera says that the picture is to be turned; simplejpeg does not look."""
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            return image.getexif().get(274, 1) != 1
    finally:
        Image.MAX_IMAGE_PIXELS = before


def codec() -> str:
    """What encodes jpg here, with its version: other encoders give other bytes."""
    try:
        import simplejpeg
    except ImportError:
        import PIL

        return f"Pillow {PIL.__version__}"
    return f"simplejpeg {simplejpeg.__version__}"


def encode_jpeg(pixels: UInt8[np.ndarray, "h w 3"], quality: int) -> bytes:
    """A patch as jpg with full colour resolution; the same bytes whenever it is the same `codec`.

    >>> from nearfar.systems.tissue.patches import decode_jpeg
    >>> grey = np.full((16, 16, 3), 128, np.uint8)
    >>> bool((decode_jpeg(encode_jpeg(grey, 90)) == grey).all())
    True
    """
    try:
        import simplejpeg
    except ImportError:
        from PIL import Image

        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "jpeg", quality=quality, subsampling=0)
        return held.getvalue()
    found: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return found


def decode_jpeg(data: bytes | memoryview, into: UInt8[np.ndarray, "h w 3"] | None = None) -> Any:
    """The pixels of a jpg (h, w, 3), written to ``into`` where it is given.

    Raises:
        ValueError, OSError: bytes that are no whole jpg, or of another size than ``into``.
    """
    try:
        import simplejpeg
    except ImportError:
        from PIL import Image

        # No other format is tried: some call programs that are installed.
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                _check_side((image.height, image.width), into)
                pixels = np.asarray(image.convert("RGB"))
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from None
    else:
        # The head is looked at first: what claims to be larger is not decoded.
        _check_side(simplejpeg.decode_jpeg_header(data)[:2], into)
        if into is not None:
            return simplejpeg.decode_jpeg(data, buffer=into)
        pixels = simplejpeg.decode_jpeg(data)
    if into is None:
        return pixels
    into[...] = pixels
    return into


def _check_side(size: tuple[int, ...], into: np.ndarray | None) -> None:
    if (tuple(size) != into.shape[:2]) if into is not None else size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"a patch of {size[1]} × {size[0]} pixels")
