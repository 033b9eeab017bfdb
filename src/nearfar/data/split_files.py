"""Which file is which split: as given by name, or found in a folder by the usual names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearfar.data.delimited import require_text_encoding
from nearfar.errors import NearfarError

__all__ = ["SPLIT_NAMES", "Encoding", "column_name", "data_paths"]

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
}
ENDINGS = (
    *(".txt", ".tsv", ".csv", ".parquet", ".jsonl", ".json", ".xlsx"),
    *(".csv.gz", ".tsv.gz", ".txt.gz", ".jsonl.gz", ".smi", ".smi.gz", ".sdf", ".sdf.gz", ".xml"),
)


class Encoding:
    """The rule of the option ``data.encoding``: null, or an encoding that Python knows."""

    def check(self, name: str, value: Any) -> None:
        """Raise ``NearfarError`` for anything else."""
        if value is not None:
            require_text_encoding(str(value), name)


def column_name(value: Any) -> str | None:
    """The option of a column: a number stands for its digits, as of a file without a header line."""
    return None if value is None else str(value)


def data_paths(data: Any) -> dict[str, Path | None]:
    """The files of the splits: as given by ``data.train`` and so on, or found in ``data.dir`` (``Train.csv`` as well as
    ``train.csv``).

    Raises ``NearfarError`` if a file is missing, if a folder has two files for one split, or if there is a val or test
    file and nothing to train on.
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
            if paths[split] is None and len(found) > 1:
                shown = ", ".join(file.name for file in found)
                raise NearfarError(
                    f"data.dir={folder} has {len(found)} files for {split} ({shown}): "
                    f"say which with data.{split}={found[0]}."
                )
            if paths[split] is None and found:
                paths[split] = found[0]
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
