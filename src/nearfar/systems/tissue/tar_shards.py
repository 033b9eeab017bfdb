"""WebDataset shards as plain tar files: written byte for byte the same each time, and read without unpacking.

A sample is the run of members that share the name before the first dot: ``B4-000017.jpg``, ``.npy``, ``.json``. Any tar
or WebDataset reader takes them; `samples` reads them several times as fast as Python's tarfile.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from nearfar.errors import NearfarError

__all__ = ["ArrayReader", "ShardWriter", "npy", "samples"]

_BLOCK = 512
_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_.-]+)")


class ShardWriter:
    """Members with nothing of this machine or moment in their heads: no time, no owner, one mode."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, key: str, parts: dict[str, bytes]) -> None:
        """One sample: a member ``key.ending`` for each part, in the order given."""
        for ending, content in parts.items():
            member = tarfile.TarInfo(f"{key}.{ending}")
            member.size, member.mtime, member.mode = len(content), 0, 0o644
            self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """End the archive; the stream stays open."""
        self._tar.close()


def samples(data: memoryview, where: str) -> Iterator[tuple[str, dict[str, memoryview]]]:
    """The samples of a shard in memory: key and parts by ending, views into ``data``.

    Raises:
        NearfarError: no tar, a member that is no plain file (links, devices, sparse files), whose name `ShardWriter`
            would not give it (folders, ``..``) or which stands twice; sizes that cannot be, an archive that is cut off.
    """
    at, key, parts = 0, "", dict[str, memoryview]()
    seen: set[str] = set()
    while at + _BLOCK <= len(data):
        head = bytes(data[at : at + _BLOCK])
        if not head[0]:
            break
        if head[257:262] != b"ustar" or head[156:157] not in (b"0", b"\0"):
            raise NearfarError(
                f"{where}: at byte {at} there is no plain member of a tar file. Write the shards anew."
            )
        name = head[:100].partition(b"\0")[0].decode("utf-8", "replace")
        match = _NAME.fullmatch(name)
        if match is None or head[345:346] != b"\0":
            raise NearfarError(
                f"{where}: at byte {at} the member {name[:80]!r} is not called SAMPLE.ENDING, without folders. "
                "Write the shards anew."
            )
        digits = head[124:136].strip(b"\0 ")
        if not digits.isdigit() or re.search(
            rb"[89]", digits
        ):  # a sign or a binary number is of no shard of ours
            raise NearfarError(
                f"{where}: {name} states a size of {digits.decode('ascii', 'replace')!r}. Write the shards anew."
            )
        size = int(digits, 8)
        begin = at + _BLOCK
        at = begin + -(-size // _BLOCK) * _BLOCK
        if begin + size > len(data):
            raise NearfarError(f"{where} is cut off in {name}. Write the shards anew.")
        stem, ending = match.groups()
        if stem != key:
            if parts:
                yield key, parts
            key, parts = stem, {}
        if ending in parts or (not parts and stem in seen):
            raise NearfarError(f"{where} holds {name} twice. Write the shards anew.")
        seen.add(stem)
        parts[ending] = data[begin : begin + size]
    if parts:
        yield key, parts


def npy(values: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    held = io.BytesIO()
    np.lib.format.write_array(held, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return held.getvalue()


class ArrayReader:
    """Reads the arrays of .npy parts; the head that all samples share is understood once.

    Raises:
        ValueError: bytes that are no array of numbers, or of another shape than ``shape`` where that is given.

    >>> read = ArrayReader()
    >>> read(memoryview(npy(np.arange(3, dtype=np.int16)))).tolist()
    [0, 1, 2]
    """

    def __init__(self, shape: tuple[int, ...] | None = None) -> None:
        self._wanted = shape
        self._head, self._dtype = b"", np.dtype(np.float32)
        self._shape: tuple[int, ...] = (0,)

    def __call__(self, data: memoryview) -> np.ndarray:
        if not self._head or data[: len(self._head)] != self._head:
            stream = io.BytesIO(data)
            try:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            except Exception as error:  # the head is a text that numpy parses, with the errors of a parser
                raise ValueError(f"no head of an array: {error}") from None
            if dtype.kind not in "biuf":
                raise ValueError(f"values of the kind {dtype}, and numbers are needed")
            if self._wanted is not None and shape != self._wanted:
                raise ValueError(f"an array {shape} where {self._wanted} is needed")
            self._shape, self._dtype = shape, dtype
            self._head = bytes(data[: stream.tell()])
        return np.frombuffer(data, self._dtype, offset=len(self._head)).reshape(self._shape)
