"""The state of a run under training: its counters, the weights it begins with, its optimiser."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.config.training import RunOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.schedules import learning_rate_factor
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.system import Batch, Model, System

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

    def state_dict(self) -> Json:
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
    best: Json = field(default_factory=lambda: {"value": None, "epoch": None, "epochs_without_gain": 0})
    seconds_before: float = 0.0
    started_at: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RunState:
        """The state that a checkpoint holds."""
        state = cls(checkpoint.epoch, checkpoint.batches, checkpoint.step, seconds_before=checkpoint.seconds)
        meters, best = checkpoint.meters, checkpoint.best
        state.loss_mean = Mean(meters.get("total") or 0.0, meters.get("count") or 0)
        state.best |= {key: best[key] for key in state.best if best.get(key) is not None}
        return state

    def to_dict(self) -> Json:
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


def initial_model(system: System[Batch, Model], seed: int) -> Model:
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
        model.load_state_dict(system.read_weights(checkpoint.model))
    except (RuntimeError, AttributeError, TypeError) as error:  # the latter two of names that are no text
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NearfarError(
            f"{origin}: the weights do not fit this model ({first}). "
            "Use the same encoder, layers and text encoder as that run (its config.yaml shows them)."
        ) from None


def build_optimizer(
    config: RunOptions, groups: list[Json], state: RunState, batches: int, resume: Checkpoint | None
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and a learning-rate factor per optimiser step; a resumed run gets the state of both.

    ``batches``: those of a whole epoch. Of an epoch's optimiser steps the last may accumulate fewer of them.
    """
    if not any(len(list(group["params"])) for group in groups):
        raise NearfarError(
            "nothing is trained: the encoders are frozen, and the model has no weights beside them. Take a head "
            "(head=linear), an encoder that is trained (train=full), or a temperature that learns."
        )
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
    # The state of the weights is continued; every option is that of the configuration, which may be new.
    fresh = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    _load_moments(optimizer, resume, fresh)
    # Steps count from the run's start, at the present number of steps per epoch: a new batch size or start_epoch moves
    # the position in the schedule, and nothing else. All else of a schedule follows from that.
    position = state.epoch * per_epoch + state.batches // config.trainer.accumulate
    rates = [group["initial_lr"] * factor(position) for group in fresh]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict(
        {
            "last_epoch": position,
            "base_lrs": [group["initial_lr"] for group in fresh],
            "lr_lambdas": [None] * len(fresh),
            "_step_count": position + 1,
            "_last_lr": rates,
        }
    )
    return optimizer, scheduler


def _load_moments(optimizer: torch.optim.AdamW, resume: Checkpoint, groups: list[Json]) -> None:
    """What AdamW remembers of each weight, from a checkpoint that anybody may have written.

    Shapes are checked: its compiled step would write beyond the end of a moment that is smaller than its weight.
    """
    saved: Any = resume.optimizer
    try:
        members = [group["params"] for group in saved["param_groups"]]
        if len(members) == len(groups):
            groups = [group | {"params": ids} for group, ids in zip(groups, members, strict=True)]
        else:
            groups = [{"params": ids} for ids in members]  # told apart below
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        for weight, moments in optimizer.state.items():
            if unfit := _unfit(weight, moments):
                raise ValueError(unfit)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise NearfarError(
            f"{resume.origin}: the optimiser of that run belongs to other weights ({reason}): an option changes which "
            "weights are trained, or the file was edited or damaged. Take the weights alone with init_from=."
        ) from None


def _unfit(weight: Tensor, moments: Json) -> str | None:
    """What is wrong with AdamW's memory of a weight."""
    if sorted(moments) != ["exp_avg", "exp_avg_sq", "step"]:
        return f"a weight's state holds {', '.join(map(str, moments))[:80]}"
    step = moments["step"]
    if not isinstance(step, Tensor) or step.numel() != 1 or not step.is_floating_point() or not step >= 1:
        return "its number of steps is no number"
    for name in ("exp_avg", "exp_avg_sq"):
        value = moments[name]
        dense = isinstance(value, Tensor) and value.layout == torch.strided and value.device == weight.device
        if not dense or value.shape != weight.shape or value.dtype != weight.dtype:
            return f"{name} has not the shape of its weight, {tuple(weight.shape)}"
    return None
