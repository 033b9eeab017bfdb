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
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from nearfar.errors import NearfarError

__all__ = ["RunFolder", "environment", "same_file", "write_atomically"]


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write(file)`` on a temporary neighbour of ``path``, flush it to disk and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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


def _plain(value: Any) -> Any:
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

    def clear(self) -> None:
        """Remove what an earlier run of this name left; first of all that it was finished."""
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
        for folder in (self.checkpoints, self.path / "trials"):
            shutil.rmtree(folder, ignore_errors=True)

    # -- whole files ---------------------------------------------------------------------------------------
    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically."""
        path = self.path / name
        write_atomically(path, lambda file: file.write(text.encode()))
        return path

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file atomically; numbers that are not finite become ``null``."""
        return self.write_text(name, json.dumps(_plain(content), indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read one of the run's JSON files."""
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise NearfarError(f"{path}: no such file. Is {self.path} a run, and has it finished?") from None
        except json.JSONDecodeError as error:
            raise NearfarError(f"{path}: not valid JSON ({error}). The file was edited or damaged.") from None

    def config(self) -> Any:
        """The run's configuration, as it was composed and resolved."""
        from omegaconf import OmegaConf

        path = self.path / "config.yaml"
        if not path.exists():
            raise NearfarError(f"{self.path} is not a run: it has no config.yaml.")
        return OmegaConf.load(path)

    # -- the log ---------------------------------------------------------------------------------------------
    @property
    def log_path(self) -> Path:
        """``train_log.jsonl``, one object per logged step and per epoch."""
        return self.path / "train_log.jsonl"

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one object to the log."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")

    def log(self) -> Iterator[dict[str, Any]]:
        """The log's records, oldest first; a last line that a killed process cut off is left out."""
        if not self.log_path.exists():
            return
        with self.log_path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue

    def keep_log_until(self, step: int, epochs: int | None = None) -> None:
        """Forget records later than optimiser step ``step``, and of epochs after the first ``epochs``.

        A resumed run writes them anew.
        """
        kept = [record for record in self.log() if record.get("step", 0) <= step]
        if epochs is not None:
            kept = [record for record in kept if record.get("epoch", 0) <= epochs]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomically(self.log_path, lambda file: file.write(text.encode()))


def environment() -> dict[str, Any]:
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
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": devices,
        "packages": packages,
    }
