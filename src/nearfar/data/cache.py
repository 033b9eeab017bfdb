"""Results kept by what they were computed from, so that a second run starts at once.

A key is the sha256 of the content (texts, options, version), never of a file name or a date: a changed input
is a different key, and nothing stale can be read. Entries are uncompressed ``.npz`` files, whose checksums
tell a damaged file from a good one; they appear by an atomic rename, so that two processes may share a
folder.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from nearfar.data.files import read_arrays
from nearfar.errors import NearfarError

__all__ = [
    "cache_dir",
    "cached_array",
    "cached_arrays",
    "caching",
    "content_key",
    "kept_file",
    "without_cache",
]

_ENABLED: ContextVar[bool] = ContextVar("caching", default=True)


def caching() -> bool:
    """Whether results are kept and looked for; not so inside of `without_cache`."""
    return _ENABLED.get()


@contextmanager
def without_cache() -> Iterator[None]:
    """Everything inside is computed and nothing kept: for values that are seen once, such as a table of millions.

    >>> with without_cache():
    ...     caching()
    False
    """
    token = _ENABLED.set(False)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def cache_dir() -> Path:
    """The cache folder: ``NEARFAR_CACHE`` if set, else the user's cache folder of the platform."""
    chosen = os.environ.get("NEARFAR_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nearfar"


def content_key(*parts: object) -> str:
    """The sha256 (hex) of any nesting of strings, bytes, numbers, None, arrays, sequences and mappings.

    Types and lengths go in, so that values which merely look alike differ; the order of a mapping does not.

    >>> content_key(["ab"]) == content_key(["a", "b"]), content_key(1) == content_key("1")
    (False, False)
    >>> content_key({"a": 1, "b": 2.5}) == content_key({"b": 2.5, "a": 1})
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, part: object) -> None:
    if isinstance(part, np.ndarray):
        digest.update(f"array {part.dtype.str} {part.shape}\n".encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    elif isinstance(part, Mapping):
        digest.update(f"map {len(part)}\n".encode())
        for name in sorted(part, key=str):
            _feed(digest, str(name))
            _feed(digest, part[name])
    elif isinstance(part, (str, bytes)):
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{type(part).__name__} {len(data)}\n".encode())
        digest.update(data)
    elif isinstance(part, Sequence):
        digest.update(f"sequence {len(part)}\n".encode())
        for item in part:
            _feed(digest, item)
    elif part is None or isinstance(part, (bool, int, float)):
        digest.update(f"{type(part).__name__} {part!r}\n".encode())
    else:
        raise TypeError(f"a cache key cannot hold a {type(part).__name__}: {part!r}")


def cached_arrays(
    kind: str,
    key: object,
    compute: Callable[[], Mapping[str, np.ndarray]],
    enabled: bool = True,
) -> dict[str, np.ndarray]:
    """The arrays of ``compute()``, from the cache if they are there.

    Args:
        kind: a folder name that says what is kept, for people who look into the cache.
        key: everything the result depends on (see `content_key`), a version number of the code included.
        compute: makes the arrays (no object dtype).
        enabled: ``False`` computes and neither reads nor writes, as everything does inside of `without_cache`.

    A damaged entry is computed anew with a warning; a folder that cannot be written costs a warning, not the
    run.
    """
    if not (enabled and caching()):
        return dict(compute())
    path = cache_dir() / kind / f"{content_key(key)}.npz"
    arrays = _read(path)
    if arrays is None:
        arrays = dict(compute())
        _write(path, arrays)
    return arrays


def cached_array(
    kind: str, key: object, compute: Callable[[], np.ndarray], enabled: bool = True
) -> np.ndarray:
    """`cached_arrays` for a single array.

    >>> import tempfile
    >>> os.environ["NEARFAR_CACHE"] = tempfile.mkdtemp()
    >>> calls = []
    >>> def slow():
    ...     calls.append(1)
    ...     return np.arange(3)
    >>> first, second = (cached_array("example", ["numbers", 1], slow) for _ in range(2))
    >>> second, len(calls)
    (array([0, 1, 2]), 1)
    >>> del os.environ["NEARFAR_CACHE"]
    """
    return cached_arrays(kind, key, lambda: {"array": compute()}, enabled)["array"]


def kept_file(kind: str, data: bytes) -> str:
    """The path of a file in the cache that holds these bytes, written if it is not there; called by their sha256.

    For what only a file can be handed on as, such as a picture that came inside of a table.

    Raises:
        NearfarError: a cache that cannot be written.

    >>> os.environ["NEARFAR_CACHE"] = tempfile.mkdtemp()
    >>> path = kept_file("example", b"abc")
    >>> path == kept_file("example", b"abc"), Path(path).read_bytes()
    (True, b'abc')
    >>> del os.environ["NEARFAR_CACHE"]
    """
    digest = hashlib.sha256(data).hexdigest()
    path = cache_dir() / kind / digest[:2] / digest
    try:
        if path.is_file() and path.stat().st_size == len(data):
            return str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.replace(temporary, path)  # a reader sees the whole file or none
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NearfarError(
            f"a file cannot be kept in {path.parent} ({error.strerror}): make room there, or set NEARFAR_CACHE to a "
            "folder that has it."
        ) from None
    return str(path)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    if not os.path.lexists(path):
        return None
    try:
        return read_arrays(path)
    except NearfarError as error:
        warnings.warn(f"cache entry {path} is damaged ({error}); it is computed anew", stacklevel=4)
        return None


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=".npz")
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)  # a reader sees the old entry or the whole new one, never a part
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        warnings.warn(f"cache entry {path} was not written: {error}", stacklevel=4)
