"""Reading files that anybody may have written, and writing files that appear whole.

A run folder is copied, edited, cut off by a full disk, or comes from a stranger. Reading is bounded in size and time,
checked, and never executes anything: whatever is wrong with a file, the answer is a ``NearfarError`` that names it, no
traceback, no wait for a pipe, no memory without bound. Files are written beside their place and renamed into it: a kill
leaves the old file or the new one, never half.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

__all__ = [
    "Json",
    "Maybe",
    "check_shape",
    "is_temporary",
    "make_folder",
    "parse_json",
    "read_array",
    "read_arrays",
    "read_bytes",
    "read_data_json",
    "read_json",
    "read_names",
    "read_similar_yaml",
    "read_text",
    "read_yaml",
    "remove_left_over",
    "write_arrays",
    "write_atomically",
    "write_json",
    "write_text",
]


#: an object of JSON or YAML, or a record that becomes one: plain values under names
Json = dict[str, Any]

MEGABYTE = 1 << 20
#: bytes of a text file: reports of the largest runs stay far below
TEXT_LIMIT = 512 * MEGABYTE
#: bytes of a configuration, which people write
YAML_LIMIT = 4 * MEGABYTE
#: bytes of the arrays of a file once they are unpacked
ARRAYS_LIMIT = 16 << 30
#: characters that could open a level of a YAML file that the parser in C reads
NESTING_LIMIT = 2000
#: values of a configuration, its aliases written out
VALUES_LIMIT = 100_000
DAMAGED = "The file was edited or damaged."


# -- whole files ---------------------------------------------------------------------------------------------
def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; pipes and devices are refused, not waited for."""
    try:
        # Opening a pipe without a writer would wait for one.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise NearfarError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise NearfarError(f"{path} cannot be read: {reason}.") from None
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe or a device"
        raise NearfarError(f"{path} is {kind}, and a file is expected in its place.")
    with os.fdopen(handle, "rb") as file:
        if about.st_size > limit:
            raise NearfarError(
                f"{path} has {about.st_size:,} bytes; more than {limit:,} are not read. {DAMAGED}"
            )
        try:
            return file.read(limit + 1)[:limit]
        except OSError as error:
            raise NearfarError(f"{path} cannot be read: {error.strerror}.") from None


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A text file in UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise NearfarError(f"{path} is not UTF-8 text (byte {error.start}). {DAMAGED}") from None


def read_names(path: Path, what: str) -> list[str]:
    """Names, one on a line, each once; ``what`` is what they name, for messages.

    Raises:
        NearfarError: no such file, no name in it, a name that stands twice.
    """
    lines = read_text(path).removeprefix("\ufeff").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise NearfarError(f"{path} names no {what}; one name on each line is expected.")
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        raise NearfarError(f"{path} names {', '.join(twice[:5])} more than once.")
    return names


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ``ValueError`` for whatever is none, also where it is too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, shape: object = object) -> Any:
    """A JSON file whose content has a ``shape``, see ``check_shape``."""
    try:
        content = parse_json(read_text(path))
    except NearfarError:
        raise
    except ValueError as error:
        raise NearfarError(f"{path}: not valid JSON ({error}). {DAMAGED}") from None
    check_shape(content, shape, str(path))
    return content


def read_data_json(path: Path) -> Any:
    """The content of a JSON file of data, such as annotations, which may start with a byte-order mark."""
    try:
        return parse_json(read_text(path).removeprefix("\ufeff"))
    except NearfarError:
        raise
    except ValueError as error:
        raise NearfarError(f"{path}: not valid JSON ({error}). Is it complete?") from None


def read_yaml(path: Path) -> Any:
    """A YAML file of plain values. Tags that would build objects are refused, and aliases that unfold without end."""
    return _parse_yaml(read_text(path, YAML_LIMIT), path)


def read_similar_yaml(path: Path) -> Any:
    """As ``read_yaml``, for many files that agree in most of their entries, such as the configurations of a sweep.

    Every entry of the outermost mapping is parsed once for its text. What is returned shares its values with what was
    returned for other files: it is for reading.
    """
    text = read_text(path, YAML_LIMIT)
    if len(text) <= _SIMILAR_LIMIT and not _SPECIAL.search(text):
        entries = _ENTRY.split(text)
        with suppress(NearfarError):
            parsed = [_parse_entry(entry) for entry in entries if entry.strip()]
            if parsed and all(isinstance(entry, dict) for entry in parsed):
                return {key: value for entry in parsed for key, value in entry.items()}
    return _parse_yaml(text, path)


#: bytes of a file whose entries are kept
_SIMILAR_LIMIT = 32_768
#: before an entry of the outermost mapping; what may reach beyond its entry: anchors, aliases, tags, documents
_ENTRY = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)
_SPECIAL = re.compile(r"[&*!%]|^(---|\.\.\.)", re.MULTILINE)


@functools.lru_cache(maxsize=4096)
def _parse_entry(text: str) -> Any:
    return _parse_yaml(text, Path("entry"))


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    # The parser in C is several times as fast and has no guard against deep nesting, of which each level needs one of
    # these characters.
    shallow = sum(map(text.count, "[{-:?")) <= NESTING_LIMIT
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if shallow else yaml.SafeLoader
    try:
        content = yaml.load(text, loader)
        if _unfolded(content, {}) > VALUES_LIMIT:
            raise ValueError(f"its aliases unfold to more than {VALUES_LIMIT:,} values")
    except RecursionError:
        raise NearfarError(f"{path}: nested too deeply. {DAMAGED}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        reason = " ".join(str(error).split())
        raise NearfarError(f"{path}: not valid YAML ({reason}). {DAMAGED}") from None
    return content


def _unfolded(content: object, known: dict[int, int]) -> int:
    """How many values there are when every alias is written out; ``known`` by the identity of what holds them."""
    if not isinstance(content, (dict, list)):
        return 1
    if id(content) in known:
        return known[id(content)]
    known[id(content)] = VALUES_LIMIT + 1  # of a list that holds itself
    values = content.values() if isinstance(content, dict) else content
    known[id(content)] = min(1 + sum(_unfolded(value, known) for value in values), VALUES_LIMIT + 1)
    return known[id(content)]


# -- arrays --------------------------------------------------------------------------------------------------
def read_arrays(path: Path, limit: int = ARRAYS_LIMIT) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, of at most ``limit`` bytes together; arrays of Python objects are refused.

    What each array declares is compared with what is there before memory is taken for it.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise NearfarError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise NearfarError(f"{path} cannot be read: {error}.") from None
    if not stat.S_ISREG(mode):
        raise NearfarError(f"{path} is no regular file, and a file of arrays is expected in its place.")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
            if total > limit:
                raise ValueError(f"its arrays take {total:,} bytes, more than {limit:,} are not read")
            for member in archive.infolist():
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = read_array(file, member.file_size)  # type: ignore[arg-type]
    except NearfarError:
        raise
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, NotImplementedError) as error:
        raise NearfarError(f"{path}: not a readable file of arrays ({error}). {DAMAGED}") from None
    except (zipfile.BadZipFile, zlib.error, MemoryError, SyntaxError, OverflowError) as error:
        raise NearfarError(f"{path}: not a readable file of arrays ({error}). {DAMAGED}") from None
    return arrays


def read_array(file: BinaryIO, size: int) -> np.ndarray:
    """The array in the ``size`` bytes of an ``.npy`` file; ``ValueError`` where it is of objects or declares more."""
    import numpy as np

    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"format {version} of an array is unknown")
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    try:
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # numpy raises whatever the text in the head leads to
        raise ValueError(f"the head of an array is damaged ({type(error).__name__})") from None
    if dtype.hasobject:
        raise ValueError("an array holds Python objects, which could run code")
    declared = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or declared > size:
        raise ValueError(f"an array declares {declared:,} bytes and there are {size:,}")
    data = file.read(declared)
    if len(data) < declared:
        raise ValueError(f"an array of {declared:,} bytes ends after {len(data):,}")
    array = np.frombuffer(bytearray(data), dtype=dtype) if declared else np.empty(math.prod(shape), dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


# -- shapes --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Maybe:
    """A field that may be absent or null."""

    shape: object


def check_shape(value: object, shape: object, where: str) -> None:
    """``NearfarError`` unless ``value`` has a shape, which is given as plain data:

    - a function that returns what is wrong with a value, as in "is negative", or None;
    - a type, or several in a tuple; a number is ``float`` and may be whole, and a Boolean is no number;
    - ``[shape]``: a list of such values; ``{str: shape}``: a mapping from text to such values;
    - ``{"name": shape, …}``: a mapping with these fields, and whatever else; ``Maybe(shape)``: it may lack the field.

    >>> check_shape({"splits": {"val": {"n": 3}}}, {"splits": {str: {"n": int}}}, "metrics.json")
    >>> check_shape({"splits": [1]}, {"splits": {str: dict}}, "metrics.json")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: metrics.json: splits is a list, and a mapping is expected. ...
    """
    problem = _problem(value, shape, "")
    if problem:
        raise NearfarError(f"{where}: {problem}. {DAMAGED}")


def _problem(value: object, shape: object, name: str) -> str | None:
    if callable(shape) and not isinstance(shape, type):
        return str(problem) if (problem := shape(value)) and not name else problem and f"{name} {problem}"
    if isinstance(shape, Maybe):
        return None if value is None else _problem(value, shape.shape, name)
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return _differs(name, value, "a mapping")
        if str in shape:
            return _first(_problem(each, shape[str], _join(name, key)) for key, each in value.items())
        for key, wanted in shape.items():
            if key not in value and not isinstance(wanted, Maybe):
                return f"{_join(name, key)} is missing"
        return _first(_problem(value.get(key), wanted, _join(name, key)) for key, wanted in shape.items())
    if isinstance(shape, list):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return _differs(name, value, "a list")
        return _first(_problem(each, shape[0], _join(name, k)) for k, each in enumerate(value))
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if object in kinds or (isinstance(value, bool) and bool in kinds):
        return None
    wider = (*kinds, int) if float in kinds else kinds
    if isinstance(value, wider) and not (isinstance(value, bool) and bool not in kinds):
        return None
    return _differs(name, value, " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds))


_WORDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)


def _join(name: str, part: object) -> str:
    text = str(part)
    return f"{name}.{text[:60]}" if name else text[:60]


def _differs(name: str, value: object, wanted: str) -> str:
    kind = next((word for known, word in _WORDS.items() if type(value) is known), f"a {type(value).__name__}")
    return f"{name or 'the content'} is {kind}, and {wanted} is expected"


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
