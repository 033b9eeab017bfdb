"""The state of a run under training: its counters, the weights it begins with, its optimiser."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.schedules import learning_rate_factor
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.system import System

__all__ = ["Mean", "RunState", "build_optimizer", "dropout_seed", "initial_model", "load_weights"]


class Mean:
    """The running mean of an epoch's loss, in the checkpoint so that a resumed epoch reports the whole of it.

    The sum stays on the device: adding to it does not wait for the step to be computed.

    >>> mean = Mean(); mean.add(torch.tensor(1.0)); mean.add(torch.tensor(2.0)); mean.value()
    1.5
    """

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total: Tensor | float = total
        self.count = count

    def add(self, value: Tensor) -> None:
        """Add one batch."""
        self.total = self.total + value.detach().float()
        self.count += 1

    def value(self) -> float:
        """The mean so far, NaN before the first batch."""
        return float(self.total) / self.count if self.count else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """Sum and count."""
        return {"total": float(self.total), "count": self.count}


@dataclass
class RunState:
    """Where a run is: ``step`` optimiser steps done, ``batches`` batches of epoch ``epoch`` (from 0).

    ``best``: value and epoch (from 1) of the best validation so far, and the epochs since. ``seconds_before``: training
    time of earlier processes.
    """

    epoch: int = 0
    batches: int = 0
    step: int = 0
    loss_mean: Mean = field(default_factory=Mean)
    best: dict[str, Any] = field(
        default_factory=lambda: {"value": None, "epoch": None, "epochs_without_gain": 0}
    )
    seconds_before: float = 0.0
    started_at: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RunState:
        """The state that a checkpoint holds."""
        return cls(
            checkpoint.epoch,
            checkpoint.batches,
            checkpoint.step,
            Mean(**checkpoint.meters),
            dict(checkpoint.best),
            checkpoint.seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields of a ``Checkpoint`` that are counters."""
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "step": self.step,
            "meters": self.loss_mean.state_dict(),
            "best": dict(self.best),
            "seconds": self.seconds(),
        }

    def seconds(self) -> float:
        """Training time of the run so far, earlier parts included."""
        return self.seconds_before + time.perf_counter() - self.started_at

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.batches, self.loss_mean = self.epoch + 1, 0, Mean()


def dropout_seed(seed: int, rank: int, step: int = 0) -> int:
    """What dropout starts from: always the same on the first process, something else on each other one."""
    if rank == 0:
        return seed + 1
    return int(np.random.SeedSequence([seed + 1, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def initial_model(system: System, seed: int) -> nn.Module:
    """The model as ``seed`` initialises it; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return system.build_model()


def load_weights(model: nn.Module, checkpoint: Checkpoint, system: System, origin: str) -> None:
    """The weights of a checkpoint into ``model``; ``NearfarError`` where they belong to a different system or model."""
    if checkpoint.system != system.name:
        raise NearfarError(
            f"{origin}: weights of system '{checkpoint.system}' cannot start a run of '{system.name}'."
        )
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NearfarError(
            f"{origin}: the weights do not fit this model ({first}). "
            "Use the same encoder, layers and text encoder as that run (its config.yaml shows them)."
        ) from None


def build_optimizer(
    config: Any, groups: list[dict[str, Any]], state: RunState, batches: int, resume: Checkpoint | None
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and a learning-rate factor per optimiser step; a resumed run gets the state of both.

    ``batches``: those of a whole epoch. Of an epoch's optimiser steps the last may accumulate fewer of them.
    """
    # One pass over all weights instead of one per tensor and operation. Not in mixed precision, where gradients are
    # not clipped for an optimiser that could unscale them by itself.
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=config.trainer.precision == "32-true")
    per_epoch = -(-batches // int(config.trainer.accumulate))
    total = max(1, per_epoch * int(config.epochs))
    rule = learning_rate_factor(config.lr_schedule, warmup=config.warmup)

    def factor(step: int) -> float:
        return rule(step, total)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    if resume is None or resume.optimizer is None:
        return optimizer, scheduler
    # The state is continued; learning rate and weight decay are those of the configuration, which may be new.
    fresh = [{key: group[key] for key in ("initial_lr", "weight_decay")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(resume.optimizer)
    except ValueError as error:
        raise NearfarError(
            f"the optimiser of that run belongs to other weights ({error}): an option changes which weights "
            "are trained. Take the weights alone with init_from=."
        ) from None
    scheduler.load_state_dict(dict(resume.scheduler or {}))
    # Steps count from the run's start, at the present number of steps per epoch: a new batch size or start_epoch moves
    # the position in the schedule, and nothing else.
    scheduler.last_epoch = state.epoch * per_epoch + state.batches // config.trainer.accumulate
    scheduler.base_lrs = [group["initial_lr"] for group in fresh]
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group |= new
        group["lr"] = new["initial_lr"] * factor(scheduler.last_epoch)
    return optimizer, scheduler
