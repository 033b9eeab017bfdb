"""WebDataset shards: tar files in which the files of a sample have one name and different endings.

Format: https://github.com/webdataset/webdataset. Shards are read by ``tarfile``, as data from a stranger: nothing in
them is run, unpickled or written under a name of theirs.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nearfar.data.cache import kept_file
from nearfar.data.column_kinds import PICTURE_SUFFIXES, Reasons, stack_vectors, without_placeholders
from nearfar.data.files import Json, parse_json, read_array
from nearfar.data.items import Column, Items
from nearfar.data.table_formats import cell_text
from nearfar.data.table_items import Wanted, build_items, choose
from nearfar.errors import NearfarError

__all__ = ["SHARD_SUFFIXES", "is_shard", "sample_name", "shard_items", "shard_members"]

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_TEXTS = frozenset(
    ("txt", "text", "cls", "cls2", "caption", "transcript", "label", "id", "index", "inx", "url")
)
_PICKLED = frozenset(("pyd", "pickle", "pkl", "pth", "pt", "ckpt", "joblib", "dill"))
_COMMON = {"image": PICTURE_SUFFIXES, "text": (".txt",), "label": (".cls",)}
_MOST_KEYS = 1000  # of the JSON of all samples: more are no columns, and would fill the memory
_MOST_BYTES = 1 << 30  # of one file in a shard


def is_shard(path: Path) -> bool:
    """Whether a file is a shard by its name."""
    return path.name.lower().endswith(SHARD_SUFFIXES)


@dataclass
class _Samples:
    """What was read: for each ending, or key of the samples' JSON, the values by number of the sample."""

    keys: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    files: dict[str, dict[int, object]] = field(default_factory=dict)
    json: dict[str, dict[int, object]] = field(default_factory=dict)
    reasons: dict[str, dict[int, str]] = field(default_factory=dict)
    pickled: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)


def shard_items(
    files: Sequence[Path],
    source: str,
    wanted: Wanted,
) -> Items:
    """The samples of shards, in order; arguments and errors as of `nearfar.data.sources.read_items`.

    The key of a sample is its id, every ending a column: ``image`` for pictures (``jpg``, ``png``, ``webp``, …; by
    their endings where samples hold several), ``text`` for ``txt``, ``label`` for ``cls``, others as they are called;
    of ``json`` the keys are columns (``json.KEY`` where a file is called so). Pictures are put into the cache, and the
    values are their paths. ``npy`` is an array. Members that are pickles are refused and counted.

    Raises:
        NearfarError: a damaged shard, shards without a sample, a column that is missing, pickled or of a kind that is
            not read.
    """
    samples = _Samples()
    named = wanted.named
    endings = None if wanted.columns is None else {name.lower() for name in named}
    for file in files:
        _read_shard(file, samples, endings)
    n = len(samples.keys)
    if not n:
        raise NearfarError(f"{source} holds no sample: {len(files)} shards are empty.")
    table, places = _columns(samples)
    for name in named:  # the ending itself, where the column has a name that is easier to remember
        ending = name.lower()
        if name not in table and samples.files.get(ending):
            table[name], places[name] = samples.files[ending], ending
        elif name not in table and name in samples.json:
            table[name], places[name] = samples.json[name], name.split("json.", 1)[0] + "json"
    header = list(table)
    _refuse(source, named, header, samples)
    if wanted.columns is None and len(samples.json) > _MOST_KEYS:
        raise NearfarError(
            f"{source}: the JSON of its samples has {len(samples.json):,} keys, too many for columns: name those that "
            f"are wanted with {wanted.naming.format(name='NAME')}."
        )
    used, _ = choose(Path(source), header, wanted, "Its columns are")
    notes: Json = {"shards": len(files)}
    if samples.pickled:
        notes["refused: pickles, which run code"] = dict(samples.pickled)
    if samples.unread:
        notes["files that are not read"] = dict(samples.unread)
    values: dict[str, Column] = {}
    reasons: dict[str, Reasons] = {}
    for name, position in used.items():
        column, reason = _column(table[header[position]], n)
        values[name] = without_placeholders(name, column, notes) if isinstance(column, list) else column
        bad = samples.reasons.get(places[header[position]], {})
        if bad or reason is not None:
            reasons[name] = [bad.get(i) or (reason[i] if reason is not None else None) for i in range(n)]
    items = build_items(
        source,
        values,
        list(range(1, n + 1)),
        kept=header if wanted.columns is None else list(wanted.columns),
        id_name=wanted.id_column,
        group_name=wanted.group_column,
        asked=wanted.columns is not None,
        notes=notes,
        id_given=wanted.id_column is not None,
        reasons=reasons,
    )
    if wanted.id_column is None:
        keys = _distinct(samples)
        items.ids = [keys[row - 1] for row in items.rows or []]
    return items


def _distinct(samples: _Samples) -> list[str]:
    """The keys of the samples; where shards share some, with the name of the shard, and the number if need be."""
    keys = samples.keys
    if len(set(keys)) < len(keys):
        keys = [f"{shard}/{key}" for shard, key in zip(samples.shards, keys, strict=True)]
    if len(set(keys)) < len(keys):
        keys = [f"{key}#{i + 1}" for i, key in enumerate(keys)]
    return keys


# -- one shard -----------------------------------------------------------------------------------------------
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # key and ending; hidden files are no samples


def sample_name(name: str) -> tuple[str, str] | None:
    """The key and the ending of a file of a shard; None of a hidden one, which is in no sample.

    >>> sample_name("./train/0001.seg.PNG"), sample_name(".hidden")
    (('train/0001', 'seg.png'), None)
    """
    match = _NAME.match(name.removeprefix("./"))
    return None if match is None else (match[1], match[2].lower())


def _read_shard(path: Path, samples: _Samples, wanted: set[str] | None) -> None:
    key = None
    before = len(samples.keys)
    try:
        for name, data in shard_members(path):
            parts = sample_name(name)
            if parts is None:
                continue
            if parts[0] != key:
                key = parts[0]
                samples.keys.append(key)
                samples.shards.append(path.name.split(".")[0])
            _take(samples, parts[1], data, wanted)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        read = len(samples.keys) - before
        raise NearfarError(
            f"{path} is damaged after {read} samples ({error or type(error).__name__}): copy it again, or leave it out."
        ) from None


def shard_members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and content of the regular files in a tar; links, devices and folders are passed over."""
    with tarfile.open(path, "r:gz" if path.suffix.lower() in (".gz", ".tgz") else "r:") as archive:
        for member in archive:
            if not member.isfile():
                continue
            if member.size > _MOST_BYTES:
                raise NearfarError(
                    f"{path}: {member.name} has {member.size:,} bytes; more than {_MOST_BYTES:,} are not read."
                )

            def content(member: tarfile.TarInfo = member) -> bytes:
                file = archive.extractfile(member)
                assert file is not None
                data = file.read()
                if len(data) < member.size:
                    raise tarfile.ReadError(f"{member.name} ends early")
                return data

            yield member.name, content
            archive.members = []  # type: ignore[attr-defined]  # it would keep the heads of all
        # Where a head is damaged, tarfile takes it for the end; at the real one there are zeros, or nothing.
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("the head of a file in it is damaged")


def _take(samples: _Samples, ending: str, content: Callable[[], bytes], wanted: set[str] | None) -> None:
    """One file of the last sample."""
    at = len(samples.keys) - 1
    last = ending.rsplit(".", 1)[-1]
    if last in _PICKLED:
        samples.pickled[ending] += 1
        return
    if f".{last}" in PICTURE_SUFFIXES:
        value: object = True  # it is there; only a picture that is wanted is kept
        if wanted is None or wanted & {ending, "image"}:
            value = kept_file("pictures", content())
        samples.files.setdefault(ending, {})[at] = value
    elif last in ("json", "npy") or last in _TEXTS:
        _take_data(samples, ending, last, content(), at)
    else:
        samples.unread[ending] += 1


def _take_data(samples: _Samples, ending: str, last: str, data: bytes, at: int) -> None:
    try:
        if last == "npy":
            samples.files.setdefault(ending, {})[at] = read_array(io.BytesIO(data), len(data))
            return
        text = data.decode("utf-8-sig")
        value = parse_json(text) if last == "json" else text
    except (ValueError, EOFError, SyntaxError, OverflowError, MemoryError):
        kinds = {"npy": "array that cannot be read", "json": "no JSON"}
        samples.reasons.setdefault(ending, {})[at] = kinds.get(last, "text that is not UTF-8")
        samples.files.setdefault(ending, {})[at] = None
        return
    if last == "json" and isinstance(value, dict):
        samples.files.setdefault(ending, {})
        for name, each in value.items():
            samples.json.setdefault(f"{ending}.{name}", {})[at] = cell_text(each) or None
    else:
        samples.files.setdefault(ending, {})[at] = cell_text(value) or None


# -- columns -------------------------------------------------------------------------------------------------
def _columns(samples: _Samples) -> tuple[dict[str, dict[int, object]], dict[str, str]]:
    """Columns by the names they are called by, and the ending in which each stands."""
    columns: dict[str, dict[int, object]] = {}
    places: dict[str, str] = {}
    files = dict(samples.files)
    pictures = [ending for ending in files if f".{ending}" in PICTURE_SUFFIXES]
    whole = {i: value for ending in pictures for i, value in files[ending].items()}
    if pictures and len(whole) == sum(len(files[ending]) for ending in pictures):
        columns["image"], places["image"] = whole, pictures[0]
        files = {ending: values for ending, values in files.items() if ending not in pictures}
    for ending, values in files.items():
        if ending.rsplit(".", 1)[-1] == "json" and all(value is None for value in values.values()):
            continue  # all of it is in its keys
        name = next(
            (name for name, known in _COMMON.items() if f".{ending}" in known and name != "image"), ending
        )
        name = ending if name in columns or (name != ending and name in files) else name
        columns[name], places[name] = values, ending
    for full, values in samples.json.items():
        ending, short = full.split("json.", 1)
        name = full if short in columns or ending else short
        columns[name], places[name] = values, f"{ending}json"
    return columns, places


def _column(values: Mapping[int, object], n: int) -> tuple[Column, Reasons | None]:
    column = [values.get(i) for i in range(n)]
    if any(isinstance(value, np.ndarray) for value in column):
        return stack_vectors([value if isinstance(value, np.ndarray) else None for value in column])
    return column, None


def _refuse(source: str, named: Sequence[str], header: Sequence[str], samples: _Samples) -> None:
    """Columns that are asked for and cannot be had, for a reason of their own."""
    for name in named:
        if name in header:
            continue
        if name.lower() in samples.pickled:
            raise NearfarError(
                f"{source}: '{name}' holds pickles, and loading one runs what is in it: write it as npy, json or txt."
            )
        if name.lower() in samples.unread:
            known = "pictures, txt, cls, json and npy"
            raise NearfarError(f"{source}: files that end in .{name} are not read; {known} are.")
