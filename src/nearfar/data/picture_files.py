"""Which file a picture's name means, and pictures decoded once before they are used.

Names are read as tools on all systems write them, folders as exporters fill them. A damaged picture is known when the
data is read, not after training.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from nearfar.data.cache import cached_arrays
from nearfar.data.images import check_image, image_size
from nearfar.data.splits import SPLIT_NAMES
from nearfar.errors import NearfarError

__all__ = ["Checked", "PictureFile", "PictureFiles", "check_pictures", "name_parts", "split_in", "walk_files"]


class PictureFile(NamedTuple):
    """The file of a picture, or why there is none.

    ``others``: files of the same name that were not taken. ``shortened``: found without all folders of the name.
    """

    path: Path | None
    reason: str = ""
    detail: str = ""
    others: tuple[str, ...] = ()
    shortened: bool = False


def split_in(name: str) -> str | None:
    """The split that a file's or folder's name says, if it says one.

    >>> [split_in(name) for name in ("instances_train2017", "valid", "Test-dev", "default", "trainval")]
    ['train', 'val', 'test', None, None]
    """
    words = [word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", name.lower())]
    for split in ("test", "val", "train"):
        if any(word in (*SPLIT_NAMES[split], f"mini{split}") for word in words):
            return split
    return None


def name_parts(name: str) -> tuple[str, ...]:
    r"""Folders and file name of a picture as data names it: paths of Windows, relative and absolute ones, addresses.

    >>> name_parts("images\\a.jpg"), name_parts("../../upload/1/a.jpg"), name_parts("C:\\x\\a.jpg")
    (('images', 'a.jpg'), ('upload', '1', 'a.jpg'), ('x', 'a.jpg'))
    >>> name_parts("/data/local-files/?d=set%20one/a.jpg"), name_parts("https://host/b/a.jpg?width=9")
    (('set one', 'a.jpg'), ('b', 'a.jpg'))
    """
    text = name.strip()
    if "://" in text or "/?d=" in text:
        address = urlsplit(text)
        text = parse_qs(address.query).get("d", [unquote(address.path)])[0]
    text = re.sub(r"^[A-Za-z]:(?=[\\/])", "", text).replace("\\", "/")
    return tuple(part for part in text.split("/") if part not in ("", ".", ".."))


@dataclass
class PictureFiles:
    """The picture files below ``folder``; nothing outside it is ever looked at.

    A name is sought as it is in each of ``roots``, in their order; then anywhere below ``folder``, with all the folders
    that the name holds; then without the first of these folders, in ``roots`` alone. Of several files of one name that
    with the stated size is taken, or else the one in a root; where neither tells, none is. ``split``: of which split
    the pictures are; folders of a different split are left alone. ``endings``: a file that differs in its ending alone
    will do, too. ``given``: the user named the first root, and a file in it is not compared with others.
    """

    folder: Path
    roots: Sequence[Path] = ()
    split: str | None = None
    endings: bool = False
    given: bool = False

    def __post_init__(self) -> None:
        self.roots = [root for root in dict.fromkeys(self.roots or [self.folder]) if root.is_dir()]
        self._index: dict[str, list[Path]] | None = None

    def find(self, name: str, size: tuple[int, int] | None = None) -> PictureFile:
        """The file of the picture called ``name``, whose stated ``size`` is (width, height)."""
        parts = name_parts(name)
        if not parts:
            return PictureFile(None, "picture without id or file_name", repr(name))
        if "/" not in name and "\\" in name and (self.folder / name).is_file():
            parts = (name,)  # a file name may hold a back-slash on some systems
        direct = self._in_roots(parts)
        if direct is not None and self.given:
            return PictureFile(direct)
        named = list(self._named(parts))
        same = [path for path in named if self._may_be_ours(path, len(parts))]
        if direct is not None:
            same = [direct, *(path for path in same if not _same_file(path, direct))]
        for skipped in range(1, len(parts)) if not same else ():
            shorter = self._in_roots(parts[skipped:])
            if shorter is not None:
                return PictureFile(shorter, shortened=True)
        if not same:
            where = f"{named[0].relative_to(self.folder)} is of a different split; " if named else ""
            return PictureFile(None, "missing picture", f"{where}sought below {self.folder}")
        return self._one_of(same, direct, size)

    def _one_of(self, same: list[Path], direct: Path | None, size: tuple[int, int] | None) -> PictureFile:
        if len(same) == 1:
            return PictureFile(same[0])
        fitting = [path for path in same if size is not None and _size(path) == size]
        names = tuple(str(path.relative_to(self.folder)) for path in same)
        if direct in fitting or (direct is not None and not fitting):
            chosen: Path | None = direct
        elif len(fitting) == 1:
            chosen = fitting[0]
        else:
            alike = fitting or same
            chosen = (
                alike[0] if all(filecmp.cmp(alike[0], path, shallow=False) for path in alike[1:]) else None
            )
        if chosen is None:
            return PictureFile(None, "several pictures of one name", ", ".join(names[:3]))
        return PictureFile(
            chosen, others=tuple(n for n in names if n != str(chosen.relative_to(self.folder)))
        )

    def _in_roots(self, parts: tuple[str, ...]) -> Path | None:
        paths = (root.joinpath(*parts) for root in self.roots)
        return next((path for path in paths if path.is_file()), None)

    def _named(self, parts: tuple[str, ...]) -> Iterator[Path]:
        """Files below the folder whose path ends so; the case of letters counts only where it has to."""
        if self._index is None:
            self._index = {}
            for path in walk_files(self.folder):
                for key in dict.fromkeys((_plain(path.name), "." + _plain(path.stem))):
                    self._index.setdefault(key, []).append(path)
        exact = [path for path in self._index.get(_plain(parts[-1]), []) if _ends(path, parts, str)]
        matching = exact or [
            path for path in self._index.get(_plain(parts[-1]), []) if _ends(path, parts, _plain)
        ]
        if not matching and self.endings:
            stem = (*parts[:-1], Path(parts[-1]).stem)
            also = self._index.get("." + _plain(stem[-1]), [])
            matching = [
                path
                for path in also
                if path.suffix.lower() in _ENDINGS and _ends(path.with_suffix(""), stem, str)
            ]
        yield from matching

    def _may_be_ours(self, path: Path, named: int) -> bool:
        """Whether no folder beyond those of the picture's own name says a different split."""
        folders = path.relative_to(self.folder).parts[:-named]
        splits = [split for split in map(split_in, folders) if split is not None]
        return self.split is None or not splits or splits[-1] == self.split


_ENDINGS = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


def walk_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder, in order; hidden ones are left out, and links do not lead round in a circle."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__MACOSX")) and os.path.realpath(Path(place, name)) not in seen
        )
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _ends(path: Path, parts: tuple[str, ...], form: Callable[[str], str]) -> bool:
    return [form(part) for part in path.parts[-len(parts) :]] == [form(part) for part in parts]


def _same_file(a: Path, b: Path) -> bool:
    return a == b or os.path.realpath(a) == os.path.realpath(b)


def _size(path: Path) -> tuple[int, int] | None:
    try:
        height, width = image_size(path)
    except NearfarError:
        return None
    return width, height


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
