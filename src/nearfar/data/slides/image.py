"""The picture of a slide while patches are cut from it: whole in memory, or by regions where its format allows that."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import UInt8

from nearfar.data.images import MAX_PIXELS, image_size, read_image, resize
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import openslide

__all__ = [
    "IMAGE_ENDINGS",
    "Box",
    "Pictures",
    "box_around",
    "boxes_inside",
    "check_size",
    "codec",
    "cut",
    "decode_jpeg",
    "encode_jpeg",
    "open_image",
    "picture_size",
    "pixel_size_of",
    "read_large",
]


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
        pixels: np.ndarray = simplejpeg.decode_jpeg(data)
        return pixels
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

    >>> from nearfar.data.slides.image import decode_jpeg
    >>> grey = np.full((16, 16, 3), 128, np.uint8)
    >>> bool((decode_jpeg(encode_jpeg(grey, 90)) == grey).all())
    True
    """
    try:
        import simplejpeg
    except ImportError:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=quality, subsampling=0)
        return buffer.getvalue()
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return encoded


def decode_jpeg(data: bytes | memoryview, into: UInt8[np.ndarray, "h w 3"] | None = None) -> np.ndarray:
    """The pixels of a jpg (h, w, 3), written to ``into`` where it is given.

    Raises:
        ValueError, OSError: bytes that are no whole jpg, or of a different size than ``into``.
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


_BY_REGION = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".mrxs")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", *_BY_REGION)


class Pictures(Protocol):
    """Where patches come from while a slide is open."""

    def patch(self, spot: str, box: Box, pixels: int) -> UInt8[np.ndarray, "p p 3"]: ...


class _Whole:
    """A picture in memory."""

    def __init__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        self.pixels = pixels

    def patch(self, spot: str, box: Box, pixels: int) -> UInt8[np.ndarray, "p p 3"]:
        return cut(self.pixels, box, pixels)


class _Regions:
    """A picture on disk."""

    def __init__(self, slide: openslide.OpenSlide, path: Path) -> None:
        self.slide, self.path = slide, path

    def patch(self, spot: str, box: Box, pixels: int) -> UInt8[np.ndarray, "p p 3"]:
        left, top, right, bottom = box
        side = (right - left, bottom - top)
        try:
            region = np.asarray(self.slide.read_region((left, top), 0, side))
        except Exception as error:  # OpenSlide's own, which name no file
            raise NearfarError(f"{self.path} cannot be read around spot {spot}: {error}.") from None
        # What was not scanned is transparent, and lies on white.
        opaque = region[..., 3:].astype(np.uint16)
        flat = (region[..., :3] * opaque + 255 * (255 - opaque)) // 255
        return cut(flat.astype(np.uint8), (0, 0, *side), pixels)


@contextmanager
def open_image(path: Path) -> Iterator[Pictures]:
    """The picture of a file, given back at the end, so that two large ones are never held at once.

    Raises:
        NearfarError: a file that cannot be read, or is too large to be read whole (with what would help).
    """
    slide = _openslide(path)
    if slide is not None:
        with slide:
            yield _Regions(slide, path)
        return
    whole = _Whole(read_large(path))
    try:
        yield whole
    finally:
        whole.pixels = np.empty((0, 0, 3), np.uint8)


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width), from the head of the file."""
    slide = _openslide(path)
    if slide is None:
        try:
            return image_size(path)
        except NearfarError as error:
            if path.suffix.lower() not in _BY_REGION or _installed():
                raise
            raise NearfarError(
                f"{error} Slide scans are read with OpenSlide: pip install 'nearfar[tissue]'."
            ) from None
    with slide:
        width, height = slide.dimensions
        return int(height), int(width)


def pixel_size_of(path: Path) -> float | None:
    """Micrometres per pixel where the picture itself says so."""
    slide = _openslide(path)
    if slide is None:
        return None
    with slide:
        stated = slide.properties.get("openslide.mpp-x")
        try:
            size = float(stated or 0)
        except ValueError:
            return None
        return size if 0 < size < float("inf") else None


def boxes_inside(path: Path | None, boxes: Sequence[Box]) -> tuple[np.ndarray, list[str]]:
    """Which boxes lie wholly in a picture, and what is wrong with each other one."""
    if path is None:
        return np.zeros(len(boxes), bool), ["the slide has no picture"] * len(boxes)
    try:
        height, width = picture_size(path)
        _check_end(path)
    except NearfarError as error:  # counted like a picture that is missing: other slides are not held up
        return np.zeros(len(boxes), bool), [str(error).replace(str(path), path.name)] * len(boxes)
    corners = np.array(boxes).reshape(-1, 4)
    kept = (corners[:, :2] >= 0).all(1) & (corners[:, 2] <= width) & (corners[:, 3] <= height)
    return kept, [f"{tuple(box)} is not inside {width} × {height} pixels" for box in boxes]


def check_size(path: Path, declared: tuple[int, int] | None, where: str) -> None:
    """``NearfarError`` for a picture of a different size than the one that places refer to (by its small copy).

    A twentieth is allowed: declared sizes come from small pictures and are rounded.
    """
    if declared is None:
        return
    try:
        height, width = picture_size(path)
    except NearfarError:
        return  # `boxes_inside` says so
    if abs(height - declared[0]) > 0.05 * declared[0] or abs(width - declared[1]) > 0.05 * declared[1]:
        raise NearfarError(
            f"{path} has {width} × {height} pixels, and {where} says that places are in a picture of {declared[1]} × "
            f"{declared[0]}: put the full picture there, or remove the small pictures from {where} if they are wrong."
        )


def _check_end(path: Path) -> None:
    """``NearfarError`` for a picture that breaks off; a JPEG or PNG that ends as it should is not decoded for it."""
    if _openslide(path) is not None:
        return  # regions are read by their own places in the file
    with open(path, "rb") as stream:
        head = stream.read(8)
        stream.seek(max(0, path.stat().st_size - 2**16))
        tail = stream.read()
    end = b"\xff\xd9" if head.startswith(b"\xff\xd8") else b"IEND" if head.startswith(b"\x89PNG") else None
    if end is None or end not in tail:
        read_image(path)


def _installed() -> bool:
    try:
        import openslide  # noqa: F401
    except ImportError:
        return False
    return True


def _openslide(path: Path) -> openslide.OpenSlide | None:
    """The file as OpenSlide opens it, or None: a different format, or OpenSlide is not installed."""
    if path.suffix.lower() not in _BY_REGION or not _installed():
        return None
    import openslide

    if openslide.OpenSlide.detect_format(str(path)) is None:
        return None
    try:
        return openslide.OpenSlide(str(path))
    except openslide.OpenSlideError as error:
        raise NearfarError(f"{path} cannot be read: {error}. Is it complete?") from None
