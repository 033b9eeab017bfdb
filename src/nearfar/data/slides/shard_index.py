"""WebDataset shards as plain tar files, and ``index.json``: what a folder of shards holds, how it was made, its
hashes.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from nearfar.data.cache import content_key
from nearfar.data.files import Json, write_json
from nearfar.data.slides.splits import SPLITS, check_splits, read_split_files
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "FORMAT",
    "ArrayReader",
    "ShardFile",
    "ShardIndex",
    "ShardWriter",
    "SlideEntry",
    "check_inside",
    "npy",
    "read_index",
    "read_splits",
    "samples",
]


_BLOCK = 512
_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_.-]+)")


class ShardWriter:
    """Writes a shard: the same bytes for the same samples, since heads hold no time, no owner and one mode.

    ``webdataset.TarWriter`` does not give these bytes: it sorts the parts of a sample by ending (jpg, json, npy), so
    every existing shard, and with it every hash, would change. It would also be a new dependency at run time for what
    ``tarfile`` does in four lines. The tests read our shards with webdataset.
    """

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
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


class ArrayReader:
    """Reads the arrays of .npy parts; the head that all samples share is understood once.

    Raises:
        ValueError: bytes that are no array of numbers, or of a different shape than ``shape`` where that is given.

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


FORMAT = "shards_v1"
#: the names that files of a folder have, seen from it: nothing leads out of it
_FILE = re.compile(r"(slides/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_MAX_SIDE = 16_384  # of a patch


@dataclass(frozen=True)
class ShardFile:
    """A file of a slide, as seen from the folder, and how many spots are in it."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @classmethod
    def from_dict(cls, saved: Json) -> ShardFile:
        """What ``asdict`` wrote; errors as of `SlideEntry.from_dict`."""
        file = cls(**saved)
        if not isinstance(file.name, str) or not isinstance(file.sha256, str):
            raise TypeError("a file without name or sha256")
        if not _FILE.fullmatch(file.name):
            raise ValueError(f"{file.name[:80]!r} is no name of a file of the folder")
        for value in (file.samples, file.bytes):
            if not _is_count(value):
                raise TypeError(f"{file.name} states {value!r} where a number of 0 or more is needed")
        return file


@dataclass(frozen=True)
class SlideEntry:
    """One slide: its shards, the table of its spots (ids, places, neighbours), σ in pixels, and what was left out.

    ``key`` names the files and options that it was made from; ``rejected`` counts spots by reason.
    """

    name: str
    patient: str
    spots: int
    shards: list[ShardFile]
    table: ShardFile
    sigma: float
    pixel_size: float | None
    side: int | None
    rejected: dict[str, int]
    key: str

    def as_dict(self) -> Json:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Json) -> SlideEntry:
        """What `as_dict` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: something else, or files outside of the folder.
        """
        files = {
            "shards": [ShardFile.from_dict(each) for each in saved["shards"]],
            "table": ShardFile.from_dict(saved["table"]),
        }
        entry = cls(**{**saved, **files})
        for name in ("name", "patient", "key"):
            if not isinstance(getattr(entry, name), str):
                raise TypeError(f"{name} of a slide is {getattr(entry, name)!r}, and text is needed")
        if sum(shard.samples for shard in entry.shards) != entry.spots or entry.table.samples != entry.spots:
            raise ValueError(f"slide {entry.name} does not hold as many samples as spots")
        return entry


@dataclass(frozen=True)
class ShardIndex:
    """All slides of a folder.

    Attributes:
        folder: where the shards are.
        genes: the columns of every sample's expression.
        expression: ``values`` ("log1p" or "counts"), ``target_sum``, and how the genes were chosen.
        patch: ``pixels``, and the field that they show.
        neighbors: ``k`` and the rule.
        slides: their entries, in the order of names.
    """

    folder: Path
    genes: list[str]
    expression: Json
    patch: Json
    neighbors: Json
    slides: list[SlideEntry] = field(default_factory=list)

    @property
    def content(self) -> str:
        """The hash of everything that the shards hold."""
        return content_key(
            FORMAT,
            self.genes,
            self.expression,
            [[s.name, *(f.sha256 for f in [*s.shards, s.table])] for s in self.slides],
        )

    def entry(self, name: str) -> SlideEntry:
        """A slide by name."""
        for slide in self.slides:
            if slide.name == name:
                return slide
        names = [slide.name for slide in self.slides]
        raise NearfarError(f"{self.folder} has no slide {name!r}; {nearest_name(name, names)}")

    def write(self, splits: Mapping[str, Sequence[str]]) -> Path:
        """Write ``index.json``; the splits are the ones at the time of writing, the split files decide."""
        path = self.folder / "index.json"
        write_json(
            path,
            {
                "format": FORMAT,
                "content": self.content,
                "spots": sum(slide.spots for slide in self.slides),
                "patch": self.patch,
                "expression": self.expression,
                "neighbors": self.neighbors,
                "splits": {name: list(slides) for name, slides in splits.items()},
                "slides": [slide.as_dict() for slide in self.slides],
                "genes": self.genes,
            },
            indent=1,
        )
        return path


def read_index(folder: str | Path) -> ShardIndex:
    """The index of a folder of shards.

    Raises:
        NearfarError: no index (unfinished shards, or a different folder), an unknown format, missing shards, shards
            of a different size than the index states.
    """
    folder = Path(folder)
    path = folder / "index.json"
    check_inside(folder, path)
    if not path.is_file():
        unfinished = (folder / "slides").is_dir()
        raise NearfarError(
            f"{folder} has no index.json: "
            + (
                "its shards are not finished; run nearfar data shards again, it goes on where it stopped."
                if unfinished
                else "no shards were written there; see nearfar data shards --help."
            )
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.get("format") != FORMAT:
            raise NearfarError(f"{path}: format {saved.get('format')!r}; this version reads {FORMAT}.")
        slides = [SlideEntry.from_dict(each) for each in saved["slides"]]
        parts = {name: saved[name] for name in ("genes", "expression", "patch", "neighbors")}
        _check_parts(**parts)
        if len({slide.name for slide in slides}) != len(slides):
            raise ValueError("a slide stands twice")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, NearfarError):
            raise
        raise NearfarError(f"{path} is damaged: {error}. Write the shards anew.") from None
    for slide in slides:
        for shard in [*slide.shards, slide.table]:
            at = folder / shard.name
            check_inside(folder, at)
            size = at.stat().st_size if at.is_file() else None
            if size != shard.bytes:
                problem = "is missing" if size is None else f"has {size} bytes, {shard.bytes} were written"
                raise NearfarError(f"{at} {problem}. Copy the shards again, or write them anew.")
    return ShardIndex(folder=folder, slides=slides, **parts)


def check_inside(folder: Path, path: Path) -> None:
    """``NearfarError`` for a file of a folder of shards that is, through a link, a file elsewhere."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        inside = False
    if not inside:
        raise NearfarError(f"{path} is a link out of the folder: put the file itself there.")


def _check_parts(genes: object, expression: Json, patch: Json, neighbors: Json) -> None:
    """``ValueError`` or ``TypeError`` for invalid parts of an index."""
    if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
        raise TypeError("genes are no list of names")
    if not genes or len(set(genes)) != len(genes):
        raise ValueError("genes are missing, or one stands twice")
    if expression["values"] not in ("log1p", "counts"):
        raise ValueError(f"values are {expression['values']!r}")
    target = expression["target_sum"]
    if not isinstance(target, (int, float)) or not 0 < target < float("inf"):
        raise ValueError(f"target_sum is {target!r}")
    if not _is_count(patch["pixels"]) or not 1 <= patch["pixels"] <= _MAX_SIDE:
        raise ValueError(f"patches have a side of {patch['pixels']!r} pixels")
    if not _is_count(neighbors["k"]) or not 0 <= neighbors["k"] <= 10_000:
        raise ValueError(f"each spot has {neighbors['k']!r} neighbours")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_splits(folder: str | Path) -> dict[str, list[str]]:
    """The slides of each split as the ``*_samples.txt`` of a folder of shards list them; empty splits are left out.

    Raises:
        NearfarError: a slide in two splits, or one that has no shards.
    """
    index = read_index(folder)
    for split in SPLITS:
        check_inside(index.folder, index.folder / f"{split}_samples.txt")
    splits = read_split_files(index.folder)
    check_splits(splits, [slide.name for slide in index.slides], where=str(folder))
    return {name: slides for name, slides in splits.items() if slides}
