"""``nearfar doctor RUN --try N``: does a prescription help? N steps with it against N steps without, from one state.

Both arms go on from the run's last checkpoint with the same weights, optimiser, generators and, as far as the options
allow, the same rows in the same order. What differs afterwards is what the prescription did, and how far chance
carries N steps apart; more than one draw of batches (``seeds``) shows how far that is.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import NearfarError
from nearfar.lab.arms import Arms
from nearfar.lab.one_batch import quiet_arithmetic
from nearfar.lab.prescriptions import prescriptions
from nearfar.metrics import Difference, comparable, paired_difference
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import Evaluation

__all__ = ["Trial", "try_prescription"]

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

    def to_dict(self) -> dict[str, Any]:
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
    arms with so many draws of batches, the run's own first. A run with fewer steps left than asked, such as a finished
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
    asked, finding = _asked(folder, overrides)
    config, state = folder.config(), Checkpoint.load(path)
    with (
        _home(folder, asked, steps) as home,
        quiet_arithmetic(config.trainer.threads, config.trainer.deterministic),
    ):
        arms = Arms(path, state, steps, asked, home, start_epoch)
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
            overrides=asked,
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


def _asked(folder: RunFolder, overrides: Sequence[str] | None) -> tuple[tuple[str, ...], str | None]:
    """The overrides to try, and the finding that they come from."""
    finding = None
    if overrides is None:
        found = prescriptions(folder)
        if not found:
            raise NearfarError(
                f"{folder}: there is no prescription to try (no doctor.json, or nothing in it that an option mends). "
                "Say what to try: --override key=value."
            )
        finding, overrides = found[0].finding, found[0].overrides
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
    home.mkdir(parents=True)
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
            reason = "the arms were evaluated on other items"
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
