"""Pictures decoded once before they are used: a damaged one is known when the data is read, not after training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfar.data.cache import cached_arrays
from nearfar.data.images import check_image
from nearfar.errors import NearfarError

__all__ = ["Checked", "check_pictures"]

_VERSION = 1
_MANY = 2000  # from here on it is said that pictures are being looked at


@dataclass(frozen=True)
class Checked:
    """What one file is: ``problem`` in words, or "" with the picture's size; ``digest``: sha256 of its bytes (hex)."""

    height: int
    width: int
    digest: str
    problem: str = ""


def check_pictures(paths: Sequence[Path], say: Callable[[str], None] | None = None) -> list[Checked]:
    """Decode every picture in full, side by side in threads, and tell its size and the digest of its bytes.

    What was seen is kept in the cache under the bytes of the files, so that a second start only reads them. Sizes are
    those of `nearfar.data.images.read_image`: upright.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("RGB", (4, 2)).save(f"{folder}/whole.png")
    ...     _ = Path(folder, "empty.png").write_bytes(b"")
    ...     whole, empty = check_pictures([Path(folder, "whole.png"), Path(folder, "empty.png")])
    >>> (whole.height, whole.width, whole.problem), "0 bytes" in empty.problem
    ((2, 4, ''), True)
    """
    if len(paths) >= _MANY and say is not None:
        say(f"looking at {len(paths):,} pictures: the first time this takes a while; what was seen is kept")
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1))) as threads:
        digests = list(threads.map(_digest, paths))
        where: dict[str, Path] = {}
        for path, digest in zip(paths, digests, strict=True):
            if digest:
                where.setdefault(digest, path)
        buckets: dict[str, list[str]] = {}
        for digest in sorted(where):  # a new picture changes one bucket of 64, not all that is kept
            buckets.setdefault(f"{int(digest[:2], 16) % 64:02d}", []).append(digest)
        seen = {"": (0, 0, "{file} cannot be opened: look at its permissions.")}
        for names in buckets.values():

            def compute(names: list[str] = names) -> dict[str, np.ndarray]:
                rows = list(threads.map(_look, [where[name] for name in names]))
                return {
                    "size": np.array([row[:2] for row in rows], np.int64),
                    "problem": np.array([row[2] for row in rows], np.str_),
                }

            kept = cached_arrays("picture_check", [_VERSION, _pillow(), names], compute)
            for name, size, problem in zip(
                names, kept["size"].tolist(), kept["problem"].tolist(), strict=True
            ):
                seen[name] = (size[0], size[1], problem)
    # A kept problem names the file that was seen first, which may lie elsewhere by now.
    return [
        Checked(*seen[digest][:2], digest, seen[digest][2].replace("{file}", str(path)))
        for path, digest in zip(paths, digests, strict=True)
    ]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def _look(path: Path) -> tuple[int, int, str]:
    try:
        height, width = check_image(path)
    except NearfarError as error:
        return 0, 0, str(error).replace(str(path), "{file}")
    return height, width, ""


def _pillow() -> str:
    try:
        import PIL
    except ImportError:
        raise NearfarError("reading pictures needs Pillow: pip install 'nearfar[image]'.") from None
    return PIL.__version__
