"""Pictures of any size, as files or arrays, brought to one size and handed out in parts or as one mapped array."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from nearfar.data.cache import caching
from nearfar.data.images import read_image, resize
from nearfar.data.mapped import mapped_arrays
from nearfar.data.picture_files import check_pictures
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from nearfar.data.items import Column

__all__ = ["PictureArrays", "check_picture_values", "decode_pictures"]

_VERSION = 2  # of how pictures are brought to their size; part of every cache key
_FIRST, _QUICK = (
    16,
    0.002,
)  # pictures that tell whether threads pay, and the seconds for one below which they do not
_PART = 256  # pictures decoded before they are written


class PictureArrays:
    """Pictures in RGB at one size, read when they are asked for.

    Args:
        values: paths of picture files; or one array (n, h, w), (n, h, w, 1) or (n, h, w, 3) of uint8, which may be
            mapped from disk; or a sequence of such arrays of one picture each, whose sizes may differ.
        size: the (height, width) that each whole picture is brought to, bilinear, its sides not kept in proportion.
            None leaves the pictures of an array at their size.
        decoded: what `decode_pictures` has read of some files already.

    >>> pictures = PictureArrays(np.full((5, 4, 6), 7, np.uint8), (2, 2))
    >>> pictures.part(3, 5).shape, pictures.part(0, 1).max(), len(pictures)
    ((2, 2, 2, 3), np.uint8(7), 5)
    """

    def __init__(
        self,
        values: Column,
        size: tuple[int, int] | None,
        decoded: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._decoded = decoded or {}
        self._array = values if isinstance(values, np.ndarray) and values.ndim > 1 else None
        self._values = list(values) if self._array is None else []
        if self._array is not None:
            _check_array(self._array)
            size = size or (int(self._array.shape[1]), int(self._array.shape[2]))
        for value in self._values:
            if isinstance(value, np.ndarray):
                _check_array(value[None])
            elif not isinstance(value, (str, Path)):
                raise NearfarError(
                    f"{_shown(value)} is no picture: the path of a file, or an array of uint8, is needed."
                )
        if size is None:
            raise NearfarError(
                "pictures in files differ in size: state the size that they are brought to, as size=96."
            )
        self.size = size
        self._digests: list[str] | None = None

    def __len__(self) -> int:
        return len(self._values if self._array is None else self._array)

    @property
    def digests(self) -> list[str]:
        """For each picture a hash of its content, of the bytes of its file or of its array.

        Raises:
            NearfarError: a file that cannot be read.
        """
        if self._digests is None:
            values = self._values if self._array is None else self._array
            paths = [Path(value) for value in self._values if not isinstance(value, np.ndarray)]
            checked = iter(check_pictures(paths) if paths else [])
            self._digests = []
            for value in values:
                if isinstance(value, np.ndarray):
                    pixels = np.ascontiguousarray(value)
                    self._digests.append(
                        hashlib.sha256(f"{value.shape}\n".encode() + pixels.tobytes()).hexdigest()
                    )
                    continue
                picture = next(checked)
                if picture.problem:
                    raise NearfarError(_problem(Path(value), picture.problem))
                self._digests.append(picture.digest)
        return self._digests

    @property
    def key(self) -> str:
        """A hash of what ``part`` gives: the content of all pictures, the size, and how they are decoded."""
        return self._key(self.digests)

    def parts(self, about: int = 64) -> list[tuple[int, int, str]]:
        """Consecutive parts of ``about`` pictures each, as (start, stop, key).

        A part ends where the content of its last picture says so, and not by counting from the first: of two sets that
        differ in some pictures, as folds of one data set do, most parts are the same and have the same keys.

        >>> pictures = np.random.default_rng(0).integers(256, size=(40, 2, 2), dtype=np.uint8)
        >>> whole, rest = (PictureArrays(some, (2, 2)).parts(4) for some in (pictures, pictures[3:]))
        >>> len(whole), len({key for *_, key in whole} & {key for *_, key in rest})
        (10, 8)
        """
        digests, parts, start = self.digests, [], 0
        for stop in range(1, len(digests) + 1):
            size = stop - start  # equal pictures in a row would end none of the parts, or all
            ends = size >= about // 4 and int(digests[stop - 1][:8], 16) % about == 0
            if ends or size >= 4 * about or stop == len(digests):
                parts.append((start, stop, self._key(digests[start:stop])))
                start = stop
        return parts

    def _key(self, digests: Sequence[str]) -> str:
        plain = self._array is not None and self._array.shape[1:3] == self.size
        how = "as they are" if plain else f"Pillow {_pillow()}, {self.size}"
        return hashlib.sha256("\n".join([f"pictures {_VERSION} {how}", *digests]).encode()).hexdigest()

    def part(self, start: int, stop: int) -> UInt8[np.ndarray, "k h w 3"]:
        """The pictures from ``start`` to ``stop`` (left out), decoded side by side in threads."""
        if self._array is not None and self._array.shape[1:] == (*self.size, 3):
            return np.asarray(self._array[start:stop])
        chosen = self._values[start:stop] if self._array is None else list(self._array[start:stop])
        if not chosen:
            return np.zeros((0, *self.size, 3), np.uint8)
        if self._array is not None:  # small ones, for which threads cost more than they save
            return np.stack([self._picture(value) for value in chosen])
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            return np.stack(list(threads.map(self._picture, chosen)))

    def whole(self) -> UInt8[np.ndarray, "n h w 3"]:
        """All of them: the given array where it has that form, else an array mapped from the cache."""
        if self._array is not None and self._array.shape[1:] == (*self.size, 3):
            return self._array
        if not len(self):
            return self.part(0, 0)
        if not caching():
            return self.part(0, len(self))

        def fill(arrays: dict[str, np.ndarray]) -> None:
            for start in range(0, len(self), _PART):
                arrays["pixels"][start : start + _PART] = self.part(start, start + _PART)

        return mapped_arrays("pictures", self.key, {"pixels": ((len(self), *self.size, 3), np.uint8)}, fill)[
            "pixels"
        ]

    def _picture(self, value: object) -> UInt8[np.ndarray, "h w 3"]:
        if self._decoded and not isinstance(value, np.ndarray) and str(value) in self._decoded:
            return self._decoded[str(value)]
        pixels = np.asarray(value) if isinstance(value, np.ndarray) else read_image(str(value))
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.shape[:2] != self.size:
            # One colour is resized once, and not three times.
            pixels = resize(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], self.size)
            pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def decode_pictures(
    values: Column, size: tuple[int, int]
) -> tuple[list[str | None], dict[str, UInt8[np.ndarray, "h w 3"]]]:
    """As `check_picture_values`, and the pictures of the files, at ``size``, by their paths: decoded once for both."""
    pixels: dict[str, np.ndarray] = {}

    def problems(paths: Sequence[Path]) -> list[str]:
        pictures = PictureArrays([], size)

        def problem(path: Path) -> str:
            try:
                pixels[str(path)] = pictures._picture(path)
            except NearfarError as error:
                return str(error)
            return ""

        started = time.perf_counter()
        first = [problem(path) for path in paths[:_FIRST]]
        if time.perf_counter() - started < _QUICK * len(first):  # threads would cost more than they save
            return first + [problem(path) for path in paths[_FIRST:]]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            return first + list(threads.map(problem, paths[_FIRST:]))

    return _reasons(values, problems), pixels


def check_picture_values(values: Column) -> list[str | None]:
    """For each path or array why it is no picture; None where it is one. Files are decoded in full, in threads.

    >>> check_picture_values(["no/such/file.png", 3, np.zeros((4, 4), np.uint8), np.zeros(4)])
    ['no such file', 'neither a path nor an array', None, 'float64 (4,) is no picture; (h, w) or (h, w, 3) of uint8 is']
    """
    return _reasons(values, lambda paths: [checked.problem for checked in check_pictures(paths)])


def _reasons(values: Column, problems: Callable[[Sequence[Path]], list[str]]) -> list[str | None]:
    """For each value why it is no picture; ``problems`` says it of files that are there, "" of good ones."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        _check_array(values)
        return [None] * len(values)
    reasons: list[str | None] = []
    files: list[tuple[int, Path]] = []
    for i, value in enumerate(values):
        reason: str | None = None
        if isinstance(value, np.ndarray):
            if not _is_picture(value):
                reason = f"{value.dtype} {value.shape} is no picture; (h, w) or (h, w, 3) of uint8 is"
        elif not isinstance(value, (str, Path)) or not str(value):
            reason = "neither a path nor an array"
        elif not Path(value).is_file():
            reason = "no such file" if not Path(value).is_dir() else "a folder and no file"
        else:
            files.append((i, Path(value)))
        reasons.append(reason)
    for (i, path), problem in zip(files, problems([path for _, path in files]), strict=True):
        if problem:  # without the file's name, so that equal reasons are counted together
            reasons[i] = problem.replace(str(path), "").strip(" :.").replace("  ", " ")
    return reasons


def _is_picture(value: np.ndarray) -> bool:
    return (
        value.dtype == np.uint8
        and (value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3)))
        and 0 not in value.shape
    )


def _check_array(array: np.ndarray) -> None:
    advice = ""
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        advice = " Colours come last: array.transpose(0, 2, 3, 1)."
    elif array.dtype != np.uint8:
        advice = " Floats from 0 to 1: (array * 255).round().astype('uint8')."
    one = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    if array.dtype != np.uint8 or not one or 0 in array.shape[1:]:
        raise NearfarError(
            f"pictures are {array.dtype} {array.shape}; (n, height, width), or (n, height, width, 3), of uint8 is "
            f"needed.{advice}"
        )


def _problem(path: Path, problem: str) -> str:
    return problem if path.is_file() else f"{path}: no such file."


def _pillow() -> str:
    try:
        import PIL
    except ImportError:
        raise NearfarError("resizing pictures needs Pillow: pip install 'nearfar[image]'.") from None
    return str(PIL.__version__)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
