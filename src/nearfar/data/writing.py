"""Files written beside their place and renamed into it: a kill leaves the old file or the new one, never half."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from nearfar.errors import NearfarError

__all__ = ["is_temporary", "make_folder", "remove_left_over", "write_atomically"]


def make_folder(path: Path) -> None:
    """A folder and those above it, if they are not there yet; ``NearfarError`` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NearfarError(
            f"{path} cannot be made: {error.strerror or error}. Choose a different place with runs_dir= or --output."
        ) from None


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write(file)`` on a temporary neighbour of ``path``, flush it to disk and rename it into place."""
    make_folder(path.parent)
    prefix = f".{path.name}.{os.getpid()}."  # says later who wrote what a kill has left
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".tmp")
    except OSError as error:
        raise NearfarError(f"{path} cannot be written: {error.strerror or error}.") from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_TEMPORARY = re.compile(r"\..+?\.(?:(\d+)\.)?\w*\.?tmp")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that ``write_atomically`` had not renamed yet."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_left_over(folder: Path) -> None:
    """Remove temporary files in ``folder`` whose writer was killed: a process that is gone, or this one's number of an
    earlier time; without a number, those older than an hour."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        if match.group(1) is None:
            left = time.time() - path.stat().st_mtime > 3600
        else:
            left = int(match.group(1)) == os.getpid() or not _is_alive(int(match.group(1)))
        if left:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
