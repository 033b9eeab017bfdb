"""Going on with a run: the same configuration bit for bit, or the same state under new values.

``resume_from=RUN`` without further options continues the run in its own folder. With options that change the
configuration the state (model, optimiser, sampler, epoch) is continued in a folder of its own, and
``resumed.json`` records where from and which values changed. Other data or another system is an error.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfar.errors import NearfarError
from nearfar.training.checkpoint import Checkpoint, epoch_path, find_checkpoint
from nearfar.training.run_folder import RunFolder, same_file

__all__ = ["Resume", "changed_values", "flatten"]

#: keys that say where a run lies or how it was started, and not what it computes
NOT_PART_OF_A_RUN = (
    "resume_from",
    "start_epoch",
    "name",
    "runs_dir",
    "exists",
    "overrides",
    "logger",
    "needs_init_from",
)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested configuration to dotted keys.

    >>> flatten({"lr": 0.1, "data": {"train": None}})
    {'lr': 0.1, 'data.train': None}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = (
                list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
            )
    return flat


def changed_values(before: Any, after: Any) -> dict[str, list[Any]]:
    """The keys whose value differs, with both values; keys that do not belong to the computation left out.

    >>> changed_values({"lr": 0.1, "name": "a"}, {"lr": 0.2, "name": "b"})
    {'lr': [0.1, 0.2]}
    """
    old, new = flatten(before), flatten(after)
    return {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        if key.split(".")[0] not in NOT_PART_OF_A_RUN and old.get(key) != new.get(key)
    }


@dataclass
class Resume:
    """A run to go on with: its checkpoint, and what the new configuration changes."""

    path: Path
    folder: RunFolder
    changed: dict[str, list[Any]] = field(default_factory=dict)
    start_epoch: int | None = None

    @classmethod
    def find(cls, resume_from: str, config: Any) -> Resume:
        """Look up ``resume_from`` (a run folder or a checkpoint in one) and compare configurations."""
        path = find_checkpoint(resume_from, prefer="last")
        folder = RunFolder.of(path)
        saved = folder.config()
        if saved.system != config.system:
            raise NearfarError(
                f"resume_from={resume_from}: that run belongs to system '{saved.system}', this one is "
                f"'{config.system}'. A run goes on within its system; init_from= takes over weights alone."
            )
        return cls(path, folder, changed_values(saved, config), config.start_epoch)

    @property
    def exact(self) -> bool:
        """Whether nothing that matters has changed, so that the run continues in its own folder."""
        return not self.changed and self.start_epoch is None

    def checkpoint_for(self, system: str, data_hash: str, config: Any) -> Checkpoint:
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
