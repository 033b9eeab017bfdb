"""Pictures as (height, width, 3) uint8 from any usual file, their crops and resizes, and photos read when needed."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from nearfar.data.cache import content_key
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "WEB_FORMATS",
    "Box",
    "Crops",
    "File",
    "Photo",
    "PixelArray",
    "as_photo",
    "check_image",
    "crop",
    "decode_image",
    "image_size",
    "read_image",
    "resize",
    "stack",
    "thumbnail",
]


#: Raster formats alone: of others Pillow has helpers that start programs (PostScript) or are of one system (WMF).
FORMATS = (
    *("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "AVIF", "JPEG2000"),
    *("PPM", "TGA", "PCX", "SGI", "PSD", "ICO", "QOI"),
)
#: those that browsers show, and that are decoded where anyone may send a picture
WEB_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
MAX_PIXELS = 500_000_000  # a slide of 20,000 × 20,000 fits; a file that claims more is more likely damaged
_TURNED = (5, 6, 7, 8)  # camera orientations with exchanged sides
LARGE = 40_000_000  # pixels
_lock, _large = threading.Lock(), threading.Lock()


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in a file, upright, in RGB.

    The camera's orientation (EXIF) is applied. Greyscale becomes three equal colours, CMYK and palettes are converted,
    16-bit values keep their upper 8 bits, transparent pixels lie on white; of an animation the first frame is read.

    Raises:
        NearfarError: no such file, a file that is damaged or cut off or no picture, more than 500 million pixels.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (4, 2), 200).save(f"{folder}/grey.png")
    ...     picture = read_image(f"{folder}/grey.png")
    >>> picture.shape, picture[0, 0].tolist()
    ((2, 4, 3), [200, 200, 200])
    """
    from PIL import ImageOps

    path = Path(path)
    try:
        with _opened(path) as image:
            image.load()
            return np.asarray(_rgb(ImageOps.exif_transpose(image), path))
    except NearfarError:
        raise
    except Exception as error:  # decoders raise whatever they met in a damaged file
        raise _unreadable(path, error) from None


def decode_image(data: bytes, max_pixels: int = LARGE) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in these bytes, as `read_image` gives one; for pictures that anyone may have sent.

    Only the formats of WEB_FORMATS are tried. What the head of the file claims is looked at before anything is
    decoded: a few kilobytes can claim gigabytes of pixels.

    Raises:
        NearfarError: no picture of these formats, a damaged one, or more than ``max_pixels`` pixels.

    >>> decode_image(thumbnail(np.zeros((4, 2), np.uint8))).shape
    (4, 2, 3)
    >>> decode_image(b"GIF89a")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: no picture in JPEG, PNG, GIF, BMP or WebP, or its beginning is damaged
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    known = [name for name in WEB_FORMATS if name in Image.OPEN]
    try:
        with _lock:
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(data), formats=known)
            finally:
                Image.MAX_IMAGE_PIXELS = before
        with image:
            if image.width * image.height > max_pixels:
                raise NearfarError(
                    f"{image.width} × {image.height} pixels are more than the {max_pixels:,} that are taken: make the "
                    "picture smaller"
                )
            image.load()
            return np.asarray(_rgb(ImageOps.exif_transpose(image), "the picture"))
    except NearfarError:
        raise
    except UnidentifiedImageError:
        raise NearfarError("no picture in JPEG, PNG, GIF, BMP or WebP, or its beginning is damaged") from None
    except Exception as error:
        raise NearfarError(f"the picture cannot be read: {str(error) or type(error).__name__}") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the picture as `read_image` gives it, from the head of the file alone."""
    path = Path(path)
    try:
        with _opened(path) as image:
            turned = image.getexif().get(274, 1) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except NearfarError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None


def check_image(path: str | Path) -> tuple[int, int]:
    """(height, width) of the picture as `read_image` gives it, after all of the file was decoded once.

    A JPEG is decoded at an eighth of its size, which reads every byte of it in a third of the time.

    Raises:
        NearfarError: what `read_image` raises.
    """
    path = Path(path)
    try:
        with _opened(path) as image:
            turned = image.getexif().get(274, 1) in _TURNED
            height, width = image.height, image.width
            if image.format in ("JPEG", "MPO"):
                image.draft(image.mode, (max(1, width // 8), max(1, height // 8)))
            # A file may claim hundreds of millions of pixels: such are decoded one at a time.
            with _large if height * width > LARGE else nullcontext():
                image.load()
            _check_mode(image, path)
            return (width, height) if turned else (height, width)
    except NearfarError:
        raise
    except Exception as error:  # decoders raise whatever they met in a damaged file
        raise _unreadable(path, error) from None


def resize(pixels: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "hs ws 3"]:
    """The picture at ``size`` = (height, width), bilinear, each new pixel a mean over what it covers."""
    return crop(pixels, (0, 0, pixels.shape[1], pixels.shape[0]), size)


def thumbnail(value: object, side: int = 160) -> bytes:
    """A picture, of a file or an array (h, w, 3) or (h, w), as the bytes of a PNG of at most ``side`` pixels a side.

    >>> thumbnail(np.zeros((400, 200, 3), np.uint8), side=20)[:4]
    b'\\x89PNG'
    """
    from PIL import Image

    pixels = read_image(value) if isinstance(value, (str, Path)) else np.asarray(value)
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def crop(
    pixels: UInt8[np.ndarray, "h w 3"], box: Sequence[float], size: tuple[int, int]
) -> UInt8[np.ndarray, "hs ws 3"]:
    """The part of a picture in ``box`` = (left, top, right, bottom), in pixels, resized to ``size`` = (height, width).

    What of the box lies outside the picture is cut off before it is resized; sides are not kept in proportion.

    Raises:
        NearfarError: a box without area inside the picture.

    >>> crop(np.zeros((10, 20, 3), np.uint8), (5, -3, 40, 5), (8, 8)).shape
    (8, 8, 3)
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    left, top, right, bottom = (float(value) for value in box)
    inside = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        raise NearfarError(
            f"the box ({left:g}, {top:g}, {right:g}, {bottom:g}) covers nothing of a picture of {width} × {height} "
            "pixels; boxes are (left, top, right, bottom)"
        )
    part = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=inside)
    return np.asarray(part)


def stack(pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "n 3 h w"]:
    """Pictures of one size as the image encoders take them: colours before rows.

    >>> stack([np.zeros((4, 6, 3), np.uint8)] * 2).shape
    (2, 3, 4, 6)
    """
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        raise NearfarError(
            f"pictures of one size are needed, but there are {sorted(shapes) or 'none'}: resize them"
        )
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


def _opened(path: Path) -> Image.Image:
    """Pillow's image; its own limit, below the size of a tissue slide, gives way to MAX_PIXELS."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise NearfarError("reading pictures needs Pillow: pip install 'nearfar[image]'.") from None
    if not path.is_file():
        raise NearfarError(f"{path}: no such file.")
    with _lock:  # the limit is a global of Pillow's
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image: Image.Image = Image.open(path, formats=_formats(Image))
        except UnidentifiedImageError:
            raise NearfarError(_no_picture(path)) from None
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise NearfarError(
            f"{path} claims {image.width} × {image.height} pixels, more than {MAX_PIXELS:,}: cut it into tiles, or it "
            "is damaged."
        )
    return image


def _formats(pillow: ModuleType) -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    pillow.init()
    return [name for name in FORMATS if name in pillow.OPEN]


def _no_picture(path: Path) -> str:
    """What a file is that no decoder takes."""
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head:
        return f"{path} is empty (0 bytes), no picture: load it again."
    if head.lstrip()[:1] in (b"<", b"{"):
        return f"{path} is no picture, but text ({head.lstrip()[:15].decode('latin-1')!r}…): load it again."
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return f"{path} is no picture that can be read: HEIC. Convert it to JPEG."
    return f"{path} is no picture that can be read, or its beginning is damaged."


def _rgb(image: Image.Image, path: Path | str) -> Image.Image | UInt8[np.ndarray, "h w 3"]:
    _check_mode(image, path)
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a palette's transparency in bytes is what is converted here
            image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _check_mode(image: Image.Image, path: Path | str) -> None:
    if image.mode in ("I", "F"):
        raise NearfarError(
            f"{path} holds 32-bit values (mode {image.mode}), whose range a picture does not say: convert it to "
            "8 or 16 bits."
        )


def _unreadable(path: Path, error: BaseException) -> NearfarError:
    return NearfarError(f"{path} cannot be read: {str(error) or type(error).__name__}. Is it complete?")


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
