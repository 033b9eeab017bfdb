"""The records of a log under the names of its trainer, and log files as text: compressed, in UTF-16, by their name."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["Log", "open_log", "suffix"]


@dataclass
class Log:
    """A log as it was written.

    Args:
        kind: what wrote it, in words: "Hugging Face trainer_state.json".
        path: the file or folder that was read.
        records: rows, oldest first, under the trainer's own names; texts may be numbers.
        context: what the files beside the log say of the run, under the doctor's names (``batch_size``, …).
        unread: lines that are no records.
        notes: what a user has to know of the reading: other runs or logs that are here, too.
        validation: names without a prefix that are scores of validation, in a log that holds no others.
    """

    kind: str
    path: Path
    records: list[Json]
    context: Json = field(default_factory=dict)
    unread: int = 0
    notes: list[str] = field(default_factory=list)
    validation: bool = False


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
