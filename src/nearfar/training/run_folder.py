"""A run on disk.

``runs/NAME/`` holds ``config.yaml``, ``environment.json``, ``dataset_layout.json``, ``train_log.jsonl``,
``metrics.json``, ``checkpoints/`` and ``report.html``. Every file is written beside its place and renamed
into it, so that a killed process leaves either the old file or the new one and never half of either; the log
alone is appended to, and a line that was cut off is dropped when the run is resumed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.data.files import (
    DAMAGED,
    Json,
    Maybe,
    check_shape,
    is_temporary,
    parse_json,
    read_arrays,
    read_json,
    read_yaml,
    remove_left_over,
    write_text,
)
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["RunFolder", "environment", "same_file"]


def _number(value: object) -> str | None:
    """As ``Estimate.to_dict`` writes numbers: NaN and infinities as text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return None
    return (
        None
        if value in ("NaN", "Infinity", "-Infinity")
        else f"is {str(value)[:40]!r}, and a number is expected"
    )


_ESTIMATE = {
    "metric": str,
    "value": _number,
    "low": _number,
    "high": _number,
    "chance": _number,
    "n": int,
    "trivial": bool,
    "protocol": dict,
}
#: what the files of a run hold, as far as other verbs read it
SHAPES: Json = {
    "metrics.json": {
        "system": Maybe(str),
        "monitor": str,
        "best_epoch": Maybe(int),
        "epochs": Maybe(int),
        "steps": Maybe(int),
        "train_seconds": Maybe(float),
        "splits": {str: {str: _ESTIMATE}},
        "members": Maybe([str]),
        "baselines": Maybe(dict),
        "groups": Maybe(dict),
        "change": Maybe(dict),
        "comparison": Maybe((dict, list)),
    },
    "dataset_layout.json": {"data_hash": Maybe(str), "splits": Maybe({str: dict})},
    "environment.json": dict,
    "model.json": dict,
    "examples.json": [{"kind": str, "query": dict, "items": [dict]}],
    "sections.json": [
        {"title": str, "lead": str, "tables": [dict], "pictures": [{"source": str, "caption": str}]}
    ],
    "resumed.json": [dict],
}
CONFIG = {"system": str, "seed": int}


def same_file(path: Path, second: Path) -> None:
    """Let ``second`` name the bytes of ``path``, atomically; checkpoints are replaced and never written into."""
    second.parent.mkdir(parents=True, exist_ok=True)
    temporary = second.with_name(f".{second.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links, or another one
        shutil.copyfile(path, temporary)
    os.replace(temporary, second)


def _plain(value: object) -> object:
    """What JSON can hold: tensors and numpy scalars become numbers, infinities and NaN become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _interpolation(content: object) -> str | None:
    """The first value of a configuration that refers to something else."""
    if isinstance(content, str):
        return content if "${" in content else None
    values = (
        content.values() if isinstance(content, Mapping) else content if isinstance(content, list) else ()
    )
    return next(filter(None, map(_interpolation, values)), None)


#: of what a run folder holds; 1 (not written): version 0.1, without towers of every view
FORMAT = 2


class RunFolder:
    """The files of one run.

    >>> import tempfile
    >>> folder = RunFolder(Path(tempfile.mkdtemp()) / "first")
    >>> folder.append({"kind": "step", "step": 1, "loss": 2.5})
    >>> folder.append({"kind": "step", "step": 2, "loss": float("nan")})
    >>> [record["loss"] for record in folder.log()]
    [2.5, None]
    >>> folder.keep_log_until(step=1)
    >>> len(list(folder.log()))
    1
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where ``best.ckpt`` and ``last.ckpt`` lie."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run has written its final metrics."""
        return (self.path / "metrics.json").exists()

    @property
    def started(self) -> bool:
        """Whether there is a run here at all."""
        return (self.path / "config.yaml").exists()

    @classmethod
    def of(cls, checkpoint: Path) -> RunFolder:
        """The run that a checkpoint file lies in."""
        parent = checkpoint.parent
        return cls(parent.parent if parent.name == "checkpoints" else parent)

    @property
    def is_run(self) -> bool:
        """Whether this folder is a run of nearfar, by the configuration in it; any version's."""
        try:
            check_shape(read_yaml(self.path / "config.yaml"), CONFIG | {"trainer": dict}, "")
        except NearfarError:
            return False
        return True

    def check_format(self) -> None:
        """``NearfarError`` for a run that a later version wrote in a form that this one does not know.

        Version 0.1 wrote no number, and its runs are read.
        """
        if not self.has("environment.json"):
            return
        number = self.read_json("environment.json").get("format", 1)
        if not isinstance(number, int) or number > FORMAT:
            raise NearfarError(
                f"{self.path} was written in format {number}, and this version of nearfar reads formats up to "
                f"{FORMAT}: install the version that its environment.json names, or a later one."
            )

    def check_own(self) -> None:
        """``NearfarError`` where there is a folder with content that no run has put there: it is never written into.

        Neither is what a link inside a run leads to.
        """
        if not os.path.lexists(self.path):
            return
        if self.is_run:
            for path in sorted(self.path.iterdir()):
                if path.is_symlink() and path.is_dir():
                    raise NearfarError(
                        f"{path} is a link to a different folder, and a run writes into its own folder alone. Remove "
                        "the link; to keep a run on a different disk, choose runs_dir=."
                    )
            return
        if not self.path.is_dir():
            raise NearfarError(
                f"{self.path} is no folder; it is left as it is. Give a different name= or runs_dir=."
            )
        content = sorted(path.name for path in self.path.iterdir() if not is_temporary(path.name))
        if content:
            shown = ", ".join(map(repr, content[:3])) + (", …" if len(content) > 3 else "")
            raise NearfarError(
                f"{self.path} is not a run of nearfar (it holds {shown}), so nothing is written into it. Give a "
                "different name= or runs_dir=."
            )

    def clear(self) -> None:
        """Remove what an earlier run of this name left; first of all that it was finished."""
        self.check_own()
        remove_left_over(self.path)
        remove_left_over(self.checkpoints)
        for name in (
            "metrics.json",
            "doctor.json",
            "resumed.json",
            "per_item.npz",
            "examples.json",
            "sections.json",
            "map.npz",
            "predictions_val.npz",
            "predictions_test.npz",
            "report.html",
            "train_log.jsonl",
            "what_if.json",
        ):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path / "trials", self.path / "galleries"):
            shutil.rmtree(folder, ignore_errors=True)

    # -- whole files ---------------------------------------------------------------------------------------
    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically."""
        path = self.path / name
        write_text(path, text)
        return path

    def write_json(self, name: str, content: object) -> Path:
        """Write a JSON file atomically; numbers that are not finite become ``null``."""
        return self.write_text(name, json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n")

    def has(self, name: str) -> bool:
        """Whether there is anything of this name in the run's folder."""
        return os.path.lexists(self.path / name)

    def read_json(self, name: str) -> Any:
        """Read one of the run's JSON files, whose content has the shape that a run gives it."""
        path = self.path / name
        if not self.has(name):
            raise NearfarError(f"{path}: no such file. Is {self.path} a run, and has it finished?")
        return read_json(path, SHAPES.get(name, object))

    def read_arrays(self, name: str) -> Json:
        """Read one of the run's files of arrays."""
        return read_arrays(self.path / name)

    def config(self, fields: Mapping[str, object] = CONFIG) -> DictConfig:
        """The run's configuration, as it was composed and resolved; ``fields`` are those that it has to hold.

        It holds plain values. An interpolation (``${…}``) could read the environment of whoever opens the run, and is
        refused.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        path = self.path / "config.yaml"
        if not self.has("config.yaml"):
            raise NearfarError(f"{self.path} is not a run: it has no config.yaml.")
        content = read_yaml(path)
        check_shape(content, dict(fields), str(path))
        if interpolation := _interpolation(content):
            raise NearfarError(
                f"{path}: {interpolation} refers to something else, and a run's configuration holds plain values "
                "alone. Write the value in its place."
            )
        try:
            return OmegaConf.create(content)
        except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            raise NearfarError(f"{path}: not the configuration of a run ({error}). {DAMAGED}") from None

    # -- the log ---------------------------------------------------------------------------------------------
    @property
    def log_path(self) -> Path:
        """``train_log.jsonl``, one object per logged step and per epoch."""
        return self.path / "train_log.jsonl"

    def append(self, record: Mapping[str, object]) -> None:
        """Append one object to the log."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")

    def log(self) -> Iterator[Json]:
        """The log's records, oldest first; a last line that a killed process cut off is left out."""
        if not self.has("train_log.jsonl"):
            return
        if not self.log_path.is_file():
            raise NearfarError(f"{self.log_path} is no file, and the log of a run is expected in its place.")
        with self.log_path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = parse_json(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record

    def keep_log_until(self, step: int, epochs: int | None = None) -> None:
        """Forget records later than optimiser step ``step``, and of epochs after the first ``epochs``.

        A resumed run writes them anew.
        """
        kept = [record for record in self.log() if record.get("step", 0) <= step]
        if epochs is not None:
            kept = [record for record in kept if record.get("epoch", 0) <= epochs]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_text(self.log_path, text)


def environment() -> Json:
    """Python, platform, threads, devices and the versions of what a run computes with."""
    import torch

    packages = {}
    for package in (
        "nearfar",
        "torch",
        "lightning",
        "hydra-core",
        "numpy",
        "numba",
        "faiss-cpu",
        "scikit-learn",
        "torch_geometric",
        "rdkit",
        "transformers",
    ):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "format": FORMAT,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": devices,
        "packages": packages,
    }
