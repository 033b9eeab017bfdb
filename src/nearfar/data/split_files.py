"""Which file is which split: as given by name, or found in a folder by the usual names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearfar.errors import NearfarError

__all__ = ["SPLIT_NAMES", "data_paths"]

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
ENDINGS = (".txt", ".tsv", ".csv", ".parquet")


def data_paths(data: Any) -> dict[str, Path | None]:
    """The files of the splits: as given by ``data.train`` and so on, or found in ``data.dir`` (``Train.csv`` as well as
    ``train.csv``).

    Raises ``NearfarError`` if a file is missing, or if there is a val or test file and nothing to train on.
    """
    paths: dict[str, Path | None] = {
        name: None if data[name] is None else Path(str(data[name])) for name in SPLIT_NAMES
    }
    if data.dir is not None:
        folder = Path(str(data.dir))
        if not folder.is_dir():
            raise NearfarError(f"data.dir={folder}: no such folder.")
        there = {file.name.lower(): file for file in sorted(folder.iterdir(), reverse=True)}
        for split, names in SPLIT_NAMES.items():
            found = [there[f"{name}{end}"] for name in names for end in ENDINGS if f"{name}{end}" in there]
            if paths[split] is None and found:
                paths[split] = found[0]
        if paths["train"] is None:
            shown = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
            raise NearfarError(
                f"data.dir={folder}: there is no train file ({', '.join('train' + e for e in ENDINGS)}). "
                f"In it: {shown}. Name the files with data.train=, data.val=, data.test=."
            )
    for split, path in paths.items():
        if path is not None and not path.exists():
            raise NearfarError(f"data.{split}={path}: no such file.")
    if paths["train"] is None and (paths["val"] or paths["test"]):
        raise NearfarError("data.val or data.test is given, but no data.train to learn from.")
    return paths
