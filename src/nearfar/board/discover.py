"""Which folders and files below a folder are runs: of nearfar, and logs of other trainers."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nearfar.doctor.logs import find_log
from nearfar.doctor.run import is_run

__all__ = ["Place", "find_places", "key_of"]

#: folders that are looked into, below the one that is named
DEPTH = 6
#: files of a trainer that make their folder a run
_MARK = re.compile(
    r"trainer_state\.json|metrics\.csv|out\.log|results\.jsonl|logging\.jsonl|trainer_log\.jsonl|"
    r".*_results\.csv|.*\.wandb|.*tfevents.*|.*\.db"
)
#: files that may be logs, each a run of its own; whether they are is seen when they are read
_MAYBE = re.compile(r".*\.(csv|tsv|jsonl|ndjson|log|out)", re.IGNORECASE)
#: folders in which nothing is a run
_ASIDE = re.compile(
    r"\..*|__pycache__|node_modules|site-packages|checkpoints?|checkpoint-\d+|galleries|trials|towers"
)
#: files beside the runs of nearfar which are no logs, and the bytes of a log that nobody marked as one
_NO_LOGS, MAYBE_BYTES = ("predictions.csv", "exclude.csv"), 64 << 20


@dataclass(frozen=True)
class Place:
    """Where a run lies.

    Attributes:
        key: its name in addresses, made of its path.
        name: its path below the folder that is shown.
        path: folder or file.
        kind: "nearfar", or what wrote the log.
        log: the file or folder that grows while it trains.
        sure: whether a log was recognised by its name; others are runs once their fields are understood.
    """

    key: str
    name: str
    path: Path
    kind: str
    log: Path
    sure: bool = True

    @property
    def own(self) -> bool:
        """Whether nearfar wrote it."""
        return self.kind == "nearfar"

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """What changes when the run does: time and size of its files."""
        if self.own:
            names = ("config.yaml", "metrics.json", "doctor.json", "train_log.jsonl")
            return tuple(_stamp(self.path / name) for name in names)
        if self.log.is_dir():
            return tuple(_stamp(each) for each in sorted(self.log.rglob("*"))[:500])
        return (_stamp(self.log),)

    @property
    def written(self) -> float:
        """When its log was last written, in seconds since 1970; 0 where it is gone."""
        log = self.path / "train_log.jsonl" if self.own else self.log
        if log.is_dir():
            return max((time for time, _ in self.stamp()), default=0) / 1e9
        return (_stamp(log)[0] or _stamp(self.path / "config.yaml")[0]) / 1e9


def _stamp(path: Path) -> tuple[int, int]:
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def key_of(name: str) -> str:
    """The name of a run in addresses.

    >>> key_of("molecules/seed=0")
    '49e95eea53'
    """
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def find_places(root: Path) -> list[Place]:
    """Runs at a path and below it, in order of their names; links are not followed."""
    if root.is_file():
        logs = find_log(root)
        return [_place(root.name, root, logs[0][0], logs[0][1])] if logs else []
    return sorted(_below(root, root, DEPTH), key=lambda place: place.name)


def _place(name: str, path: Path, kind: str, log: Path, sure: bool = True) -> Place:
    return Place(key_of(name), name, path, kind, log, sure)


def _below(folder: Path, root: Path, depth: int) -> Iterator[Place]:
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.is_file():
                    files.append(entry.name)
    except OSError:
        return  # removed, or not to be read
    name = str(folder.relative_to(root)) if folder != root else root.resolve().name
    if "train_log.jsonl" in files or ("config.yaml" in files and is_run(folder)):
        yield _place(name, folder, "nearfar", folder / "train_log.jsonl")
        return
    marked = any(map(_MARK.fullmatch, files)) or ("meta.yaml" in files and "metrics" in folders)
    if marked or any(re.fullmatch(r"checkpoint-\d+", each) for each in folders):
        logs = find_log(folder)
        if logs:
            yield _place(name, folder, logs[0][0], logs[0][1])
            return
    for each in sorted(files):
        path = folder / each
        if not _MAYBE.fullmatch(each) or each in _NO_LOGS or not _readable(path):
            continue
        for kind, log, _ in find_log(path)[:1]:
            own = each if folder == root else f"{name}/{each}"
            yield _place(own, path, kind, log, sure=False)
    if depth > 0:
        for each in folders:
            if not _ASIDE.fullmatch(each):
                yield from _below(folder / each, root, depth - 1)


def _readable(path: Path) -> bool:
    try:
        about = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(about.st_mode) and 0 < about.st_size <= MAYBE_BYTES
