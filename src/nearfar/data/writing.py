"""Files written beside their place and renamed into it: a kill leaves the old file or the new one, never half."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "is_temporary",
    "make_folder",
    "remove_left_over",
    "write_arrays",
    "write_atomically",
    "write_json",
    "write_text",
]


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


def write_text(path: Path, text: str) -> None:
    """Write a text, as UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: object, indent: int = 2) -> None:
    """Write plain values as JSON."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, ArrayLike], compressed: bool = False) -> None:
    """Write arrays as ``.npz``, which `nearfar.data.files.read_arrays` reads."""
    import numpy as np

    save = np.savez_compressed if compressed else np.savez
    write_atomically(path, lambda file: save(file, **arrays))  # type: ignore[arg-type]  # its stub has allow_pickle first


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
