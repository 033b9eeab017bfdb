"""Whatever data is kept in, read as items: files, folders, shards and names on a hub; and the splits in them."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from nearfar.data.embedded import idx_files, idx_items
from nearfar.data.folders import (
    dataset_items,
    dataset_splits,
    hub_items,
    hub_name,
    hub_splits,
    image_folder_items,
)
from nearfar.data.items import Items, hold_out, joined, linked_groups
from nearfar.data.shards import SHARD_SUFFIXES, is_shard, shard_items
from nearfar.data.splits import SPLIT_NAMES
from nearfar.data.table_formats import PARQUET_SUFFIXES, REFUSED, full_suffix
from nearfar.data.table_items import Wanted, select, table_items
from nearfar.data.tables import TABLE_SUFFIXES, require_file
from nearfar.data.typed_tables import ARRAY_SUFFIXES, array_items, parquet_items
from nearfar.errors import NearfarError

__all__ = ["Source", "read_items", "read_splits", "split_sources"]

Source = str | int | Path | Sequence[str | Path]
"""What `read_items` reads: a path, a pattern, a name on the hub, or several files; a number is a name like others."""


class Reading(TypedDict, total=False):
    """How the columns of a file are chosen and decoded, and what messages call these arguments: see `read_items`."""

    id_column: str | int | None
    group_column: str | int | None
    encoding: str | None
    encoding_option: str
    naming: str
    id_naming: str
    group_naming: str


def read_items(
    path: Source,
    columns: Sequence[str | int] | None = None,
    *,
    id_column: str | int | None = None,
    group_column: str | int | None = None,
    encoding: str | None = None,
    encoding_option: str = "encoding",
    naming: str = "columns=[NAME]",
    id_naming: str = "id_column=NAME",
    group_naming: str = "group_column=NAME",
) -> Items:
    """The items of a file, a folder or a name on the Hugging Face hub, whatever its format.

    A missing value is None (in floats: NaN), not a rejection. Texts lose blanks around them; empty ones, and words for
    *missing* (``N/A``, ``nan``, ``-``), are None. Lists of numbers become an array (n, d), and a row of a different
    length is rejected; so is a row whose picture is not on disk. Values of a column of pictures are paths.

    Args:
        path: a table (CSV, TSV, JSON, JSON lines, Parquet, xlsx, also packed), ``.npy`` or ``.npz``; WebDataset shards
            (``.tar``); a folder of pictures by class, of shards, of IDX files, of parts of one table, or saved by
            ``datasets``; ``hf:OWNER/NAME[:CONFIGURATION][#SPLIT]``; a pattern of files (``*``, ``{000..003}``), or
            several files. Of a folder that holds splits the train part is read; `read_splits` reads all.
        columns: names of those wanted; None: all. In tables letter case, blanks and ``-`` against ``_`` do not matter,
            and numbers (1, 2, …) are columns of a file without a header line; ``x*`` is an array of all columns of
            numbers whose names fit; ``text`` of a ``.txt`` file without columns is its lines. Pictures in folders, IDX
            files and shards are called ``image``, classes ``label``.
        id_column: of ids; None: a column called ``id`` whose values differ, or else ``row2``, ….
        group_column: what splits keep together.
        encoding, encoding_option: of a text file, and how the caller's users give it; None: UTF-8.
        naming, id_naming, group_naming: how the caller's users give the column ``{name}``, that of ids and that of
            groups, for the message that asks them to.

    Raises:
        NearfarError: nothing to read, damaged files, a missing column (with the nearest name and the columns there
            are), ids that repeat, no usable row.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.tsv"
    >>> _ = file.write_text("id\\tword\\tdefinition\\nn1\\tnear\\tat a short distance\\nn2\\tfar\\t\\n")
    >>> items = read_items(file, ["word", "definition"])
    >>> items.ids, items["word"], items["definition"]
    (['n1', 'n2'], ['near', 'far'], ['at a short distance', None])
    """
    wanted = Wanted(
        None if columns is None else [str(name) for name in columns],
        None if id_column is None else str(id_column),
        None if group_column is None else str(group_column),
        naming,
        id_naming,
        group_naming,
        encoding,
        encoding_option,
    )
    return _read(path, wanted)


def _read(path: Source, wanted: Wanted) -> Items:
    if isinstance(path, (str, int, Path)):
        place = Path(str(path)).expanduser()
        if not _is_here(place) and _by_hub(str(path)):
            return hub_items(str(path), wanted)
        if place.is_dir():
            return _read_folder(place, wanted)
        files = [place] if _is_here(place) else _matching(str(place))
    else:
        files = [Path(each).expanduser() for each in path]
    return _read_files(files or [Path(str(path))], wanted)


def _read_files(files: Sequence[Path], wanted: Wanted) -> Items:
    """The items of files of one kind, one after the other."""
    source = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if all(is_shard(file) for file in files):
        for file in files:
            require_file(file)
        return shard_items(files, source, wanted)
    parts = []
    for file in files:
        if len(files) > 1 and file.is_dir():
            raise NearfarError(f"{file} is a folder among files: name one folder, or files alone.")
        require_file(file)
        name = file.name.lower().removesuffix(".gz")
        if full_suffix(file) in PARQUET_SUFFIXES:
            parts.append(parquet_items(file, wanted))
        elif file.suffix.lower() in ARRAY_SUFFIXES:
            parts.append(array_items(file, wanted))
        elif name.endswith(("images-idx3-ubyte", "images.idx3-ubyte")):
            parts.append(select(idx_items(file), wanted))
        elif full_suffix(file) == ".arrow":
            raise NearfarError(f"{file} is a part of a saved dataset: name its folder, {file.parent}.")
        else:
            parts.append(table_items(file, wanted))
    return joined(parts, source)


def _read_folder(folder: Path, wanted: Wanted) -> Items:
    splits, others = _folder_splits(folder)
    if splits or others:
        if "train" not in splits:
            raise _no_train(folder, [*splits, *others])
        items = _read(splits["train"], wanted)
        items.notes["splits that are not read"] = sorted({*splits, *others} - {"train"})
        return items
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return dataset_items(folder, wanted)
    files = [file for file in _entries(folder) if file.is_file()]
    shards = [file for file in files if is_shard(file)]
    tables = [file for file in files if _ending(file) in (*TABLE_SUFFIXES, *ARRAY_SUFFIXES)]
    about = [file for file in tables if file.name.lower().split(".")[0] == "metadata"]
    if shards:
        return _read_files(shards, wanted)
    if about:
        return _read_files(about[:1], wanted)
    parts = [file for file in tables if _ending(file) == _ending(tables[0])]
    if len(tables) == 1 or (tables and len(parts) == len(tables) and _ending(tables[0]) in PARQUET_SUFFIXES):
        return _read_files(tables, wanted)
    if len(tables) > 1:
        shown = ", ".join(file.name for file in tables[:8])
        raise NearfarError(f"{folder} holds several tables ({shown}): name the one that is meant.")
    return select(image_folder_items(folder), wanted)


def _ending(file: Path) -> str:
    """The ending that says what a file is, without opening a zip."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()


def _is_here(place: Path) -> bool:
    try:
        return place.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise NearfarError(f"{str(place)[:200]} cannot be read: {error.strerror}.") from None


def _entries(folder: Path) -> list[Path]:
    try:
        return [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    except OSError as error:
        raise NearfarError(f"{folder} cannot be read: {error.strerror}.") from None


def _by_hub(text: str) -> bool:
    """Whether ``a/b``, which is no file or folder here, means a name on the hub: no folder ``a``, no known ending."""
    known = (*TABLE_SUFFIXES, *ARRAY_SUFFIXES, *SHARD_SUFFIXES, ".gz", ".zip", *REFUSED)
    if text.startswith("hf:"):
        return True
    return (
        hub_name(text) is not None
        and Path(text).suffix.lower() not in known
        and not Path(text).parent.exists()
    )


def _matching(pattern: str) -> list[Path]:
    """The files that a pattern means: braces as of a shell, ``{000..003}`` and ``{a,b}``, and ``*``; all are to be."""
    files: list[Path] = []
    for name in _braces(pattern):
        if any(sign in name for sign in "*?[") and not Path(name).exists():
            files += [Path(match) for match in sorted(glob.glob(name))]
        else:
            files.append(Path(name))
    return files


def _braces(pattern: str) -> list[str]:
    """
    >>> _braces("a-{08..10}.{tar,tgz}")
    ['a-08.tar', 'a-08.tgz', 'a-09.tar', 'a-09.tgz', 'a-10.tar', 'a-10.tgz']
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Iterable[str]] = []
    for i, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part) if i % 2 else None
        if span:
            width = len(span[1]) if span[1].startswith("0") else 0
            choices.append([str(n).zfill(width) for n in range(int(span[1]), int(span[2]) + 1)])
        else:
            choices.append([part] if i % 2 == 0 else part.split(",") if "," in part else ["{" + part + "}"])
    return ["".join(choice) for choice in itertools.product(*choices)]


# -- splits --------------------------------------------------------------------------------------------------
def split_sources(
    dir: str | int | Path | None = None,
    train: Source | None = None,
    val: Source | None = None,
    test: Source | None = None,
) -> dict[str, Source]:
    """What to read for each split (``train``, ``val``, ``test``), as far as there is something for it.

    Args:
        dir: a folder with splits: files ``train.csv``, ``val.tsv``, ``test-00000.parquet``, shards ``train-000.tar``,
            folders ``train/``, ``val/``, a saved ``DatasetDict``, IDX files as of MNIST, a folder ``data/`` of these;
            or a name on the hub. A folder or file without splits is all ``train``.
        train, val, test: named one by one; they come before what ``dir`` holds.

    Raises:
        NearfarError: no such folder, several sources of one split, splits none of which is ``train``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("train-000.tar", "train-001.tar", "valid.tar"):
    ...     (folder / name).touch()
    >>> {split: [Path(file).name for file in files] for split, files in split_sources(folder).items()}
    {'train': ['train-000.tar', 'train-001.tar'], 'val': ['valid.tar']}
    """
    given = {"train": train, "val": val, "test": test}
    sources: dict[str, Source] = {split: source for split, source in given.items() if source is not None}
    if dir is not None:
        place = Path(str(dir)).expanduser()
        if not _is_here(place) and _by_hub(str(dir)):
            every = hub_splits(str(dir))
            held: dict[str, Source] = {
                split: text for name, text in every.items() if (split := _split_of(name))
            }
            others = [name for name in every if _split_of(name) is None]
        elif not _is_here(place):
            raise NearfarError(f"data.dir={dir}: no such folder.")
        else:
            held, others = _folder_splits(place) if place.is_dir() else ({"train": place}, [])
            if not held and not others:
                held = {"train": place}
        if "train" not in held and "train" not in sources:
            raise _no_train(place, [*held, *others])
        sources = {**held, **sources}
    if sources and "train" not in sources:
        raise NearfarError("data.val or data.test is given, but no data.train to learn from.")
    return {split: sources[split] for split in SPLIT_NAMES if split in sources}


def _no_train(folder: Path, names: Iterable[str]) -> NearfarError:
    return NearfarError(
        f"{folder} holds the splits {', '.join(sorted(names))}, and none to train on (called "
        f"{' or '.join(SPLIT_NAMES['train'])}): name what is trained on with data.train=."
    )


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _folder_splits(folder: Path) -> tuple[dict[str, Source], list[str]]:
    """What a folder holds for each split, and the names of its splits that are none of the three."""
    saved = dataset_splits(folder)
    if saved is not None:
        known: dict[str, Source] = {split: path for name, path in saved.items() if (split := _split_of(name))}
        return known, [name for name in saved if _split_of(name) is None]
    entries = _entries(folder)
    files = [entry for entry in entries if entry.is_file()]
    sources = _files_by_split(folder, files) or dict(idx_files(folder))
    if "train" in sources or (sources and not (folder / "train").is_dir()):
        return dict(sources), []
    folders = {split: entry for entry in entries if entry.is_dir() and (split := _split_of(entry.name))}
    if "train" in folders:  # without it, a class that is called test is no split
        return dict(folders), []
    inner = folder / "data"
    if inner.is_dir():  # as repositories on the hub keep their tables
        within, others = _folder_splits(inner)
        if "train" in within:
            return within, others
    return {}, []


def _files_by_split(folder: Path, files: Sequence[Path]) -> dict[str, Source]:
    """Tables and shards by the split that their names begin with; several of one split are parts if numbered."""
    endings = (*TABLE_SUFFIXES, *ARRAY_SUFFIXES, *SHARD_SUFFIXES)
    names = [name for known in SPLIT_NAMES.values() for name in known]
    pattern = re.compile(rf"({'|'.join(names)})(?:[-_.]?\d[-_.\w]*?)?((?:\.[a-z]+)+)", re.IGNORECASE)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        match = pattern.fullmatch(file.name)
        if match and _ending(file) in endings and (split := _split_of(match[1])):
            by_split.setdefault(split, []).append(file)
    sources: dict[str, Source] = {}
    for split, same in by_split.items():
        whole = [file for file in same if _split_of(file.name.split(".")[0])]
        kinds = {"".join(file.suffixes[-2:]).lower() if is_shard(file) else _ending(file) for file in same}
        if len(same) > 1 and (whole or len(kinds) > 1):
            shown = ", ".join(file.name for file in same)
            raise NearfarError(
                f"data.dir={folder} has {len(same)} files for {split} ({shown}): say which with data.{split}={same[0]}."
            )
        sources[split] = same
    return sources


def read_splits(
    sources: Mapping[str, Source],
    columns: Sequence[str | int] | None = None,
    *,
    fractions: Mapping[str, float] | None = None,
    apart: Sequence[str] = (),
    seed: int = 0,
    **reading: Unpack[Reading],
) -> dict[str, Items]:
    """The items of every split; a split that has no source is held out from ``train``.

    Args:
        sources: of `split_sources`.
        columns, reading: as of `read_items`.
        fractions: the share of ``train`` that a split without a source gets; a split of 0, or not named, is left out.
        apart: columns no value of which is to be in two of the parts that are drawn; groups never are.
        seed: of the draw.

    Raises:
        NearfarError: as `read_items`; values so common that no share can be drawn.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "words.csv"
    >>> _ = file.write_text("word,text\\n" + "".join(f"w{i // 2},t{i}\\n" for i in range(20)))
    >>> splits = read_splits({"train": file}, fractions={"val": 0.1, "test": 0.2}, apart=["word"])
    >>> {name: len(items) for name, items in splits.items()}, set(splits["val"]["word"]) & set(splits["train"]["word"])
    ({'train': 14, 'val': 2, 'test': 4}, set())
    """
    splits = {split: read_items(source, columns, **reading) for split, source in sources.items()}
    shares = {split: share for split, share in (fractions or {}).items() if split not in splits and share > 0}
    if not shares or "train" not in splits:
        return splits
    whole = splits["train"]
    keys = linked_groups(whole, apart) if apart else None
    try:
        parts = hold_out(whole, shares, seed, keys)
    except NearfarError as error:
        if keys is None:
            raise
        raise NearfarError(f"{error} Items that share a value of {', '.join(apart)} stay together.") from None
    for split, part in parts.items():
        notes = {**whole.notes, "held out": f"{len(part)} of {len(whole)} rows, drawn with seed {seed}"}
        splits[split] = replace(part, notes=notes if split != "train" else whole.notes)
    splits["train"] = replace(splits["train"], rejections=whole.rejections)
    return {split: splits[split] for split in SPLIT_NAMES if split in splits}
