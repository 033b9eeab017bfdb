"""Checkpoints, and going on from one: the same configuration bit for bit, or the same state under new values."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from nearfar.config.compose import changed_values, saved_values
from nearfar.config.training import RunOptions
from nearfar.data.files import Json, Maybe, check_shape, write_atomically
from nearfar.errors import NearfarError
from nearfar.training import ranks
from nearfar.training.run_folder import RunFolder, same_file

__all__ = [
    "Checkpoint",
    "Resume",
    "epoch_path",
    "find_checkpoint",
    "generator_state",
    "load_generator_state",
]


FORMAT = 1


@dataclass
class Checkpoint:
    """The state of a run after ``step`` optimiser steps, ``batches`` of them in epoch ``epoch`` (from 0)."""

    system: str
    epoch: int
    batches: int
    step: int
    model: Json
    data_hash: str
    optimizer: Json | None = None
    scheduler: Json | None = None
    precision: Json = field(default_factory=dict)
    sampler: Json = field(default_factory=dict)
    #: of the first process; those of the others, if there are any, in ``other_generators``
    generators: Json = field(default_factory=dict)
    other_generators: list[Json] = field(default_factory=list)
    meters: Json = field(default_factory=dict)
    best: Json = field(default_factory=dict)
    seconds: float = 0.0
    format: int = FORMAT
    #: the file it was read from, which is not written
    origin: str = "the checkpoint"

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        import torch

        write_atomically(path, lambda file: torch.save(_shallow(self), file))

    @property
    def processes(self) -> int:
        """How many processes trained together when the checkpoint was taken."""
        return 1 + len(self.other_generators)

    def generators_of(self, rank: int) -> Json | None:
        """The generators of a process, where there was one of that number."""
        every = [self.generators, *self.other_generators]
        return every[rank] if rank < len(every) else None

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a checkpoint; says what is wrong with a file that is none."""
        import torch

        path = find_checkpoint(path)
        _check_size(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise NearfarError(
                f"{path}: not a readable checkpoint ({type(error).__name__}: {error})."
            ) from None
        if not isinstance(content, Mapping) or "format" not in content or "system" not in content:
            raise NearfarError(f"{path}: a PyTorch file, but not a checkpoint of nearfar.")
        if content["format"] != FORMAT:
            raise NearfarError(
                f"{path}: checkpoint format {content['format']}, this version of nearfar reads {FORMAT}. "
                "Use the version of nearfar that wrote it (environment.json beside its run names it)."
            )
        check_shape(content, SHAPE, str(path))
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in content.items() if key in known and value is not None}
        return cls(**given | {"origin": str(path)})


def _count(value: object) -> str | None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return f"is {str(value)[:40]!r}, and a whole number from 0 on is expected"
    return None


#: what a file has to hold to be a checkpoint; what the optimiser or the sampler makes of theirs is their own affair
SHAPE = {
    "system": str,
    "epoch": _count,
    "batches": _count,
    "step": _count,
    "model": dict,
    "data_hash": str,
    "optimizer": Maybe(dict),
    "scheduler": Maybe(dict),
    "precision": Maybe(dict),
    "sampler": Maybe(dict),
    "generators": Maybe(dict),
    "other_generators": Maybe([dict]),
    "meters": Maybe({"total": Maybe(float), "count": Maybe(_count)}),
    "best": Maybe({"value": Maybe(float), "epoch": Maybe(_count), "epochs_without_gain": Maybe(_count)}),
    "seconds": Maybe(float),
}


def _check_size(path: Path) -> None:
    """PyTorch stores without compression: a file that unpacks to more than itself is none of its files."""
    if not path.is_file():
        raise NearfarError(f"{path} is no file, and a checkpoint is expected in its place.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise NearfarError(f"{path} would unpack to {unpacked:,} bytes: not a checkpoint of nearfar.")


def _shallow(checkpoint: Checkpoint) -> Json:
    """The fields as a plain dictionary, tensors shared (``dataclasses.asdict`` would copy every weight)."""
    return {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name != "origin"}


def epoch_path(folder: Path, epoch: int) -> Path:
    """Where the state after ``epoch`` epochs is kept, if ``trainer.checkpoint_epochs`` asks for it.

    >>> epoch_path(Path("checkpoints"), 7).name
    'epoch_0007.ckpt'
    """
    return folder / f"epoch_{epoch:04d}.ckpt"


def find_checkpoint(path: str | Path, prefer: str = "last") -> Path:
    """The checkpoint file that ``path`` means: itself, or ``last``/``best`` of a run folder."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise NearfarError(f"{path}: no such run or checkpoint.")
    other = "best" if prefer == "last" else "last"
    for name in (prefer, other):
        for folder in (path / "checkpoints", path):
            if (folder / f"{name}.ckpt").is_file():
                return folder / f"{name}.ckpt"
    raise NearfarError(
        f"{path}: no checkpoint in this folder. A run writes its first one after trainer.checkpoint_minutes "
        "or at the end of its first epoch."
    )


def generator_state() -> Json:
    """The generators that dropout draws from: PyTorch's own, on the CPU and on every CUDA device.

    One of several processes looks at its own device alone.
    """
    import torch

    state: Json = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and ranks.count() > 1:
        state["cuda"] = [torch.cuda.get_rng_state()]
    elif torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def load_generator_state(state: Json, origin: str = "the checkpoint") -> None:
    """Set the generators back to a saved state; ``NearfarError`` for what is no state of a generator."""
    import torch

    try:
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if not torch.cuda.is_available():
            return
        if ranks.count() > 1 and len(state.get("cuda", ())) == 1:
            torch.cuda.set_rng_state(state["cuda"][0])
        elif len(state.get("cuda", ())) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
    except (TypeError, RuntimeError, AttributeError) as error:
        raise NearfarError(
            f"{origin}: it does not hold the state of a generator ({error}); the file was edited or damaged. Take its "
            "weights alone with init_from=."
        ) from None


@dataclass
class Resume:
    """A run to go on with: its checkpoint, and what the new configuration changes."""

    path: Path
    folder: RunFolder
    changed: dict[str, list[object]] = field(default_factory=dict)
    start_epoch: int | None = None

    @classmethod
    def find(cls, resume_from: str, config: RunOptions) -> Resume:
        """Look up ``resume_from`` (a run folder or a checkpoint in one) and compare configurations."""
        path = find_checkpoint(resume_from, prefer="last")
        folder = RunFolder.of(path)
        saved = folder.config()
        if saved.system != config.system:
            raise NearfarError(
                f"resume_from={resume_from}: that run belongs to system '{saved.system}', this one is "
                f"'{config.system}'. A run goes on within its system; init_from= takes over weights alone."
            )
        return cls(path, folder, changed_values(saved_values(saved), config), config.start_epoch)

    @property
    def exact(self) -> bool:
        """Whether nothing that matters has changed, so that the run continues in its own folder."""
        return not self.changed and self.start_epoch is None

    def checkpoint_for(self, system: str, data_hash: str, config: RunOptions) -> Checkpoint:
        """The checkpoint, checked against the data at hand and moved to ``start_epoch`` if that is given."""
        checkpoint = Checkpoint.load(self.path)
        if checkpoint.system != system:
            raise NearfarError(f"{self.path}: checkpoint of system '{checkpoint.system}', not '{system}'.")
        if checkpoint.data_hash != data_hash:
            raise NearfarError(
                f"{self.path}: that run was trained on other data (split hash {checkpoint.data_hash}, here "
                f"{data_hash}). Give the same data files and split options, or take the weights alone with "
                f"init_from={self.path}."
            )
        if config.start_epoch is not None:
            if not 0 <= config.start_epoch <= config.epochs:
                raise NearfarError(
                    f"start_epoch={config.start_epoch} lies outside 0 … epochs={config.epochs}."
                )
            checkpoint.epoch, checkpoint.batches, checkpoint.sampler = int(config.start_epoch), 0, {}
            checkpoint.meters = {}
        return checkpoint

    def _best(self, checkpoint: Checkpoint) -> Path:
        """The best checkpoint as of this one: ``best.ckpt`` may be of a later epoch, which is then forgotten.

        Where the best of the earlier epochs is kept nowhere, this checkpoint stands for it, until an epoch has been
        trained: the memory of a best value without its weights would choose by what is not there.
        """
        epoch = checkpoint.best.get("epoch")
        if epoch is None:
            return self.path
        folder = self.folder.checkpoints
        for path in (folder / "best.ckpt", epoch_path(folder, epoch)):
            if path.is_file() and (path == self.path or Checkpoint.load(path).epoch == epoch):
                return path
        if epoch != checkpoint.epoch:
            checkpoint.best = {"value": None, "epoch": checkpoint.epoch, "epochs_without_gain": 0}
        return self.path

    def carry_over(self, folder: RunFolder, checkpoint: Checkpoint) -> None:
        """Bring log and best checkpoint into ``folder`` as they were at the checkpoint, and record the resume."""
        if folder.path.resolve() != self.folder.path.resolve():
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            if self.folder.log_path.exists():
                shutil.copyfile(self.folder.log_path, folder.log_path)
        best = self._best(checkpoint)
        if best != folder.checkpoints / "best.ckpt":
            same_file(best, folder.checkpoints / "best.ckpt")
        if self.path != folder.checkpoints / "last.ckpt":
            # Whatever came after this checkpoint is gone; killed now, the run goes on from here.
            same_file(self.path, folder.checkpoints / "last.ckpt")
        folder.keep_log_until(checkpoint.step, epochs=checkpoint.epoch + (checkpoint.batches > 0))
        history = folder.read_json("resumed.json") if (folder.path / "resumed.json").exists() else []
        entry = {
            "from": str(self.path),
            "epoch": checkpoint.epoch + 1,
            "step": checkpoint.step,
            "changed": self.changed,
        }
        folder.write_json("resumed.json", [*history, entry])
        for name in ("metrics.json", "doctor.json"):
            (folder.path / name).unlink(missing_ok=True)
