"""Log files as text: compressed ones, those that Windows writes in UTF-16, and what their name says they are."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from nearfar.errors import NearfarError

__all__ = ["open_log", "suffix"]

_COMPRESSED: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def suffix(path: Path) -> str:
    """The suffix that says what a file holds: that of ``train.log.gz`` is ``.log``.

    >>> suffix(Path("train.LOG.gz")), suffix(Path("log.csv"))
    ('.log', '.csv')
    """
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() if last in _COMPRESSED else last


def open_log(path: Path) -> IO[str]:
    """A log file as text, its line ends as they are; bytes that are no text are replaced.

    ``> train.log`` of a Windows shell writes UTF-16 with a mark at the beginning, and editors a mark before UTF-8.

    Raises:
        NearfarError: a compressed file that is damaged at its beginning.
    """
    opener = _COMPRESSED.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            head = file.read(2)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise NearfarError(f"{path}: a file that cannot be read ({error}).") from None
    encoding = "utf-16" if head in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text: IO[str] = opener(path, "rt", encoding=encoding, errors="replace", newline="")
    return text
