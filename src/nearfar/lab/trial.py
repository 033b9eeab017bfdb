"""``nearfar doctor RUN --try N``: does an override that the doctor prescribed help? N steps with it against N steps
without.

Both arms go on from the run's last checkpoint with the same weights, optimiser, generators and, as far as the options
allow, the same rows in the same order. What differs afterwards is the effect of the override, and how far chance
carries N steps apart; more than one draw of batches (``seeds``) shows how far that is.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from nearfar.config.compose import override_config
from nearfar.config.training import RunOptions
from nearfar.data.files import make_folder
from nearfar.errors import NearfarError
from nearfar.lab.batch_evaluation import run_arithmetic
from nearfar.metrics import Difference, comparable, paired_difference
from nearfar.schedules import learning_rate_factor
from nearfar.systems import build_system, check_config
from nearfar.training.checkpoint import Checkpoint, Resume, find_checkpoint
from nearfar.training.evaluation import evaluate
from nearfar.training.fit import train
from nearfar.training.loop import Interrupted, stop_signals
from nearfar.training.run_folder import RunFolder
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import Evaluation, System

__all__ = ["Arms", "Prescription", "Trial", "prescriptions", "try_prescription"]


SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Prescription:
    """The overrides (``key=value``) that a finding asks to try."""

    finding: str
    severity: str
    overrides: tuple[str, ...]


def prescriptions(folder: RunFolder) -> list[Prescription]:
    """Every prescription of ``doctor.json``; none without such a file, or where no finding has an override."""
    if not (folder.path / "doctor.json").exists():
        return []
    content = folder.read_json("doctor.json")
    findings = content.get("findings", []) if isinstance(content, Mapping) else content
    every = []
    for each in findings:
        override = each.get("override")
        overrides = shlex.split(override) if isinstance(override, str) else list(override or ())
        overrides = [text for text in map(str, overrides) if "=" in text]
        if overrides:
            every.append(Prescription(str(each["id"]), str(each.get("severity", "note")), tuple(overrides)))
    return sorted(
        every, key=lambda p: SEVERITIES.index(p.severity) if p.severity in SEVERITIES else len(SEVERITIES)
    )


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

    @cached_property
    def _saved(self) -> DictConfig:
        return RunFolder.of(self.path).config()

    def config(self, changed: bool, seed: int | None = None, start: int | None = None) -> RunOptions:
        """The run's configuration, made to go on from its checkpoint for so many steps."""
        common = [f"trainer.max_steps={self.state.step + self.steps}", "patience=null"]
        saved = self._saved
        if saved.trainer.devices != 1:  # a batch is the same, however many processes share it
            common.append("trainer.devices=1")
        config = override_config(saved, [*common, *(self.overrides if changed else ())])
        config.logger, config.resume_from, config.start_epoch = None, str(self.path), start
        config.seed = saved.seed if seed is None else seed
        return check_config(config, saved=True)

    def system(self, config: RunOptions) -> System:
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
            evaluation = _evaluated(system, loop.model, config)
            kept = self.home / f"{arm},seed={seed}"
            kept.mkdir()
            for name in KEPT:
                shutil.copyfile(folder.path / name, kept / name)
        value = evaluation.estimates[system.monitor].value
        say(f"{arm}, seed {seed}: {system.monitor} {value:.4f} after {self.steps} steps")
        return evaluation


def _evaluated(system: System, model: nn.Module, config: RunOptions) -> Evaluation:
    with torch.random.fork_rng():
        evaluated = evaluate(system, model, config, "val")
    assert evaluated is not None
    return evaluated[0]


Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """``overrides`` tried for ``steps`` optimiser steps from ``start_step`` on; schedules at epoch ``epoch`` (from 1).

    ``before``, ``unchanged``, ``changed``: validation metrics at the start and of each arm, means over ``seeds``;
    ``differences``: changed − unchanged, paired item by item; ``refused``: metrics that are not compared, and why.
    ``moved_back``: whether the schedules went back, because too few steps were left. ``learning_rates``: at the first
    and after the last step, of the unchanged arm. ``folder`` holds logs and configurations.
    """

    run: str
    overrides: tuple[str, ...]
    prescribed_by: str | None
    steps: int
    start_step: int
    epoch: int
    moved_back: bool
    learning_rates: tuple[float, float]
    seeds: tuple[int, ...]
    monitor: str
    before: dict[str, float]
    unchanged: dict[str, float]
    changed: dict[str, float]
    differences: dict[str, Difference]
    refused: dict[str, str]
    folder: str

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "not distinguishable" by the metric that chooses a run's best epoch."""
        return self.differences[self.monitor].verdict

    def to_dict(self) -> dict[str, object]:
        """As ``trial.json`` holds it."""
        differences = {name: d.to_dict() for name, d in self.differences.items()}
        return asdict(self) | {"differences": differences, "verdict": self.verdict}


def try_prescription(
    run: str | Path,
    steps: int,
    *,
    overrides: Sequence[str] | None = None,
    seeds: int = 1,
    start_epoch: int | None = None,
    say: Say = lambda _: None,
) -> Trial:
    """Train ``steps`` optimiser steps from a run's last checkpoint without and with ``overrides``, and compare.

    ``overrides`` (``key=value``) are by default those of the gravest finding of ``doctor.json``. ``seeds`` repeats both
    arms with so many draws of batches, the run's own first. A run with fewer steps left than that, such as a finished
    one, goes back in its schedules, to their middle or as far as the steps need; ``start_epoch`` (epochs done) chooses
    where. Weights and optimiser are those of the checkpoint all the same. A checkpoint in mid-epoch starts its epoch
    anew, and early stopping is off.

    Both arms are evaluated on the validation split, never on the test split. Writes ``trials/NAME/`` into the run's
    folder: ``trial.json``, and log and configuration of each arm; their weights are deleted.

    Raises ``NearfarError`` without a prescription, a checkpoint or a validation split, for more steps than the
    schedules have, and for overrides that cannot be or do not fit the state of the run.
    """
    if steps < 1 or seeds < 1:
        raise NearfarError(f"steps={steps}, seeds={seeds}: at least 1 of each is needed.")
    path = find_checkpoint(run, prefer="last")
    folder = RunFolder.of(path)
    chosen, finding = _chosen(folder, overrides)
    config, state = folder.config(), Checkpoint.load(path)
    with (
        _home(folder, chosen, steps) as home,
        run_arithmetic(config.trainer.threads, config.trainer.deterministic),
    ):
        arms = Arms(path, state, steps, chosen, home, start_epoch)
        rates = arms.learning_rates()
        say(
            f"{steps} steps from step {state.step}, in the schedules from epoch {arms.epoch + 1} of {config.epochs} "
            f"(learning rate {rates[0]:.2g} to {rates[1]:.2g})"
        )
        before, monitor = arms.before()
        if monitor not in before.per_item:
            raise NearfarError(
                f"{monitor} has no item scores on the validation split: there is nothing to pair."
            )
        numbers = tuple(int(config.seed) + k for k in range(seeds))
        results = [(arms.run(False, seed, say), arms.run(True, seed, say)) for seed in numbers]
        unchanged, changed = [a for a, _ in results], [b for _, b in results]
        differences, refused = _compare(unchanged, changed)
        if monitor not in differences:
            raise NearfarError(f"{monitor} cannot be compared: {refused[monitor]}.")
        trial = Trial(
            run=str(folder),
            overrides=chosen,
            prescribed_by=finding,
            steps=steps,
            start_step=state.step,
            epoch=arms.epoch + 1,
            moved_back=arms.epoch < state.epoch,
            learning_rates=rates,
            seeds=numbers,
            monitor=monitor,
            before=_values([before]),
            unchanged=_values(unchanged),
            changed=_values(changed),
            differences=differences,
            refused=refused,
            folder=str(home),
        )
        RunFolder(home).write_json("trial.json", trial.to_dict())
    return trial


def _chosen(folder: RunFolder, overrides: Sequence[str] | None) -> tuple[tuple[str, ...], str | None]:
    """The overrides to try, and the finding that they come from."""
    finding = None
    if overrides is None:
        every = prescriptions(folder)
        if not every:
            raise NearfarError(
                f"{folder}: there is no prescription to try (no doctor.json, or no finding in it with an override). "
                "Give one: --override key=value."
            )
        finding, overrides = every[0].finding, every[0].overrides
    if not overrides:
        raise NearfarError("there is nothing to try: give at least one key=value.")
    for text in overrides:
        if text.partition("=")[0] in ("seed", "trainer.max_steps", "patience"):
            raise NearfarError(f"'{text}': a trial sets this for both arms (draws of batches: --seeds).")
    return tuple(overrides), finding


@contextmanager
def _home(folder: RunFolder, overrides: Sequence[str], steps: int) -> Iterator[Path]:
    """A new folder for a trial; gone again where the trial fails."""
    name = re.sub(r"[^\w=,.+-]+", "_", ",".join(overrides))[:100] + f",steps={steps}"
    home, number = folder.path / "trials" / name, 2
    while home.exists():
        home, number = home.with_name(f"{name}-{number}"), number + 1
    folder.check_own()
    make_folder(home)
    try:
        yield home
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        if not any(home.parent.iterdir()):
            home.parent.rmdir()
        raise


def _values(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """Means over the evaluations, by metric."""
    names = evaluations[0].estimates
    return {name: float(np.mean([each.estimates[name].value for each in evaluations])) for name in names}


def _compare(
    unchanged: Sequence[Evaluation], changed: Sequence[Evaluation]
) -> tuple[dict[str, Difference], dict[str, str]]:
    """The paired difference of every metric that has item scores, and why some have none."""
    first, other = unchanged[0], changed[0]
    differences, refused = {}, {}
    for name in first.per_item:
        reason = None
        if name not in other.per_item:
            reason = "the changed arm has no such metric"
        elif any(list(each.ids) != list(first.ids) for each in (*unchanged, *changed)):
            reason = "the arms were evaluated on different items"
        elif name in first.estimates and name in other.estimates:
            reason = comparable(other.estimates[name], first.estimates[name])
        if reason:
            refused[name] = reason
            continue
        a, b = (np.stack([np.asarray(e.per_item[name]) for e in arm]) for arm in (changed, unchanged))
        estimate = first.estimates.get(name)
        better = None if estimate is None else estimate.higher_is_better
        differences[name] = paired_difference(a, b, metric=name, higher_is_better=better)
    return differences, refused
