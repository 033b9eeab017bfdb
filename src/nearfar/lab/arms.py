"""The arms of a trial: a run's last checkpoint, gone on with for some steps under other options, and evaluated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from nearfar.errors import NearfarError
from nearfar.schedules import learning_rate_factor
from nearfar.systems import build_system, check_config
from nearfar.training.altered import altered
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.evaluation import evaluate
from nearfar.training.fit import train
from nearfar.training.loop import Interrupted, stop_signals
from nearfar.training.resume import Resume
from nearfar.training.run_folder import RunFolder
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import Evaluation, System

__all__ = ["Arms"]

#: what is kept of an arm; its weights are not
KEPT = ("config.yaml", "train_log.jsonl", "resumed.json")


@dataclass(frozen=True)
class Arms:
    """Where all arms of a trial start, how far they go, and where they leave their logs (``home``).

    ``overrides`` are those of the changed arm. ``start_epoch``: where the schedules start (epochs done), None for what
    ``start`` says.
    """

    path: Path
    state: Checkpoint
    steps: int
    overrides: tuple[str, ...]
    home: Path
    start_epoch: int | None = None

    def config(self, changed: bool, seed: int | None = None, start: int | None = None) -> Any:
        """The run's configuration, made to go on from its checkpoint for so many steps."""
        common = [f"trainer.max_steps={self.state.step + self.steps}", "patience=null"]
        saved = RunFolder.of(self.path).config()
        if saved.trainer.devices != 1:  # a batch is the same, however many processes share it
            common.append("trainer.devices=1")
        config = altered(saved, [*common, *(self.overrides if changed else ())])
        config.logger, config.resume_from, config.start_epoch = None, str(self.path), start
        config.seed = saved.seed if seed is None else seed
        check_config(config)
        return config

    def system(self, config: Any) -> System:
        """Built and prepared."""
        system = build_system(config)
        system.prepare(lambda _: None)
        if system.dataset("val") is None:
            raise NearfarError(f"{RunFolder.of(self.path)}: there is no validation split to compare on.")
        return system

    # -- where the schedules start ---------------------------------------------------------------------------
    @cached_property
    def _per_epoch(self) -> tuple[int, int]:
        """Optimiser steps of an epoch, of the unchanged and of the changed arm."""
        configs = [self.config(changed=changed) for changed in (False, True)]
        batches = [len(self.system(config).build_sampler()) for config in configs]
        unchanged, changed = (
            -(-n // int(config.trainer.accumulate)) for n, config in zip(batches, configs, strict=True)
        )
        return unchanged, changed

    @cached_property
    def start(self) -> int | None:
        """The epoch (from 0) that the schedules start in; None: where the checkpoint stands, between two epochs.

        A checkpoint in mid-epoch starts its epoch anew: the batches left of it were drawn under the old options.
        """
        epochs, per_epoch = int(self.config(changed=False).epochs), min(self._per_epoch)
        needed = -(-self.steps // per_epoch)
        if needed > epochs:
            raise NearfarError(
                f"{self.steps} steps are {self.steps / per_epoch:.1f} epochs, and the run's schedules have {epochs}: "
                f"ask for {epochs * per_epoch} steps or fewer."
            )
        if self.start_epoch is not None:
            if not 0 <= self.start_epoch <= epochs - needed:
                raise NearfarError(
                    f"start_epoch={self.start_epoch}: {self.steps} steps fit from 0 to {epochs - needed}."
                )
            return self.start_epoch
        if self.state.epoch + needed > epochs:
            return min(epochs // 2, epochs - needed)
        return self.state.epoch if self.state.batches else None

    @property
    def epoch(self) -> int:
        """The epoch (from 0) that is trained first."""
        return self.state.epoch if self.start is None else self.start

    def learning_rates(self) -> tuple[float, float]:
        """Of the unchanged arm, at the first step and after the last."""
        config, per_epoch = self.config(changed=False), self._per_epoch[0]
        rule, total = (
            learning_rate_factor(config.lr_schedule, warmup=config.warmup),
            per_epoch * config.epochs,
        )
        first = self.epoch * per_epoch
        return config.lr * rule(first, total), config.lr * rule(first + self.steps, total)

    # -- training --------------------------------------------------------------------------------------------
    def before(self) -> tuple[Evaluation, str]:
        """The state that all arms start from, evaluated, and the name of the metric that judges."""
        config = self.config(changed=False)
        system = self.system(config)
        model = initial_model(system, config.seed)
        load_weights(model, self.state, system, str(self.path))
        return _evaluated(system, model, config), system.monitor

    def run(self, changed: bool, seed: int, say: Callable[[str], None]) -> Evaluation:
        """Train one arm and evaluate what its last step left."""
        arm = "changed" if changed else "unchanged"
        config = self.config(changed, seed, self.start)
        system = self.system(config)
        with TemporaryDirectory(dir=self.home, prefix=".") as place:
            folder = RunFolder(place)
            resume = Resume.find(str(self.path), config)
            try:
                with torch.random.fork_rng(), stop_signals() as request:
                    loop = train(system, config, folder, request, resume, lambda _: None)
            except Interrupted:
                raise KeyboardInterrupt from None  # nothing of a trial is worth going on with
            except NearfarError as error:
                tried = f"{' '.join(self.overrides)} cannot be tried on this state: " if changed else ""
                raise NearfarError(f"{tried}{error}") from None
            if loop.state.step != self.state.step + self.steps:
                raise NearfarError(
                    f"{arm} ended at step {loop.state.step} and not {self.state.step + self.steps}: is the run still "
                    "being trained?"
                )
            found = _evaluated(system, loop.model, config)
            kept = self.home / f"{arm},seed={seed}"
            kept.mkdir()
            for name in KEPT:
                shutil.copyfile(folder.path / name, kept / name)
        value = found.estimates[system.monitor].value
        say(f"{arm}, seed {seed}: {system.monitor} {value:.4f} after {self.steps} steps")
        return found


def _evaluated(system: System, model: nn.Module, config: Any) -> Evaluation:
    with torch.random.fork_rng():
        found = evaluate(system, model, config, "val")
    assert found is not None
    return found[0]
