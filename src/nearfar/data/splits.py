"""Splits by file name or drawn, an order-free hash of their ids, and a check that nothing is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Literal, Protocol

from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.ids import plain_ids

__all__ = ["SPLIT_NAMES", "check_disjoint", "column_name", "data_paths"]


SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
ENDINGS = (
    *(".txt", ".tsv", ".csv", ".parquet", ".jsonl", ".json", ".xlsx"),
    *(".csv.gz", ".tsv.gz", ".txt.gz", ".jsonl.gz", ".smi", ".smi.gz", ".sdf", ".sdf.gz", ".xml"),
)


def column_name(value: object) -> str | None:
    """The option of a column: a number stands for its digits, as of a file without a header line."""
    return None if value is None else str(value)


class SplitFiles(Protocol):
    """Options that name the file of each split, or a folder that holds them."""

    @property
    def dir(self) -> str | int | None: ...

    @property
    def train(self) -> str | int | None: ...

    @property
    def val(self) -> str | int | None: ...

    @property
    def test(self) -> str | int | None: ...


def data_paths(data: SplitFiles) -> dict[str, Path | None]:
    """The files of the splits: as given by ``data.train`` and so on, or found in ``data.dir`` (``Train.csv`` as well as
    ``train.csv``).

    Raises ``NearfarError`` if a file is missing, if a folder has two files for one split, or if there is a val or test
    file and nothing to train on.
    """
    paths: dict[str, Path | None] = {
        name: None if (value := getattr(data, name)) is None else Path(str(value)) for name in SPLIT_NAMES
    }
    if data.dir is not None:
        folder = Path(str(data.dir))
        if not folder.is_dir():
            raise NearfarError(f"data.dir={folder}: no such folder.")
        by_name = {file.name.lower(): file for file in sorted(folder.iterdir(), reverse=True)}
        for split, names in SPLIT_NAMES.items():
            matching = [
                by_name[f"{name}{end}"] for name in names for end in ENDINGS if f"{name}{end}" in by_name
            ]
            if paths[split] is None and len(matching) > 1:
                shown = ", ".join(file.name for file in matching)
                raise NearfarError(
                    f"data.dir={folder} has {len(matching)} files for {split} ({shown}): "
                    f"say which with data.{split}={matching[0]}."
                )
            if paths[split] is None and matching:
                paths[split] = matching[0]
        if paths["train"] is None:
            shown = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
            raise NearfarError(
                f"data.dir={folder}: there is no train file ({', '.join('train' + e for e in ENDINGS[:7])}, …). "
                f"In it: {shown}. Name the files with data.train=, data.val=, data.test=."
            )
    for split, path in paths.items():
        if path is not None and not path.exists():
            raise NearfarError(f"data.{split}={path}: no such file.")
    if paths["train"] is None and (paths["val"] or paths["test"]):
        raise NearfarError("data.val or data.test is given, but no data.train to learn from.")
    return paths


def check_disjoint(
    splits: Mapping[str, Iterable[str]],
    what: str = "id",
    on_leak: Literal["count", "error"] = "error",
    keep: int = 3,
) -> dict[str, Json]:
    """Look for values that stand in two splits: the leak that makes a test score look better than it is.

    Values are compared as ids are (`nearfar.ids`): 1 and "1" differ, containers and integer widths do not.

    Args:
        splits: the ids (or canonical structures, or texts) of each split.
        what: the word for one value in messages.
        on_leak: ``"error"`` raises, ``"count"`` returns what was found for the caller to warn about.
        keep: how many shared values to show per pair of splits.

    Returns:
        for each pair with an overlap, ``"train/test"`` → ``{"shared": distinct values, "rows": rows of the
        second split that hold one, "first": the first few}``; empty if the splits are disjoint.

    >>> check_disjoint({"train": ["1", "2"], "test": ["2", "2", "3"]}, on_leak="count")
    {'train/test': {'shared': 1, 'rows': 2, 'first': ['2']}}
    >>> check_disjoint({"train": ["1", "2"], "test": ["2", "3"]})
    Traceback (most recent call last):
    nearfar.errors.NearfarError: Split leak: train and test share 1 id (1 row of test): 2. ...
    """
    values = {name: plain_ids(items, f"{what}s of {name}") for name, items in splits.items()}
    leaks: dict[str, Json] = {}
    for first, second in combinations(values, 2):
        shared = set(values[first]) & set(values[second])
        if shared:
            rows = sum(value in shared for value in values[second])
            leaks[f"{first}/{second}"] = {
                "shared": len(shared),
                "rows": rows,
                "first": sorted(map(str, shared))[:keep],
            }
    if leaks and on_leak == "error":
        parts = []
        for pair, leak in leaks.items():
            first, second = pair.split("/")
            parts.append(
                f"{first} and {second} share {_count(leak['shared'], what)} "
                f"({_count(leak['rows'], 'row')} of {second}): {', '.join(leak['first'])}"
            )
        raise NearfarError(
            "Split leak: " + "; ".join(parts) + ". Remove the shared rows from one of the splits."
        )
    return leaks


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
