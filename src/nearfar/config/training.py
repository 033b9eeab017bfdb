"""The options that every run has, whatever its system: where it lies, how it goes on, the optimiser, the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nearfar.config.options import fraction, option, path, section
from nearfar.errors import NearfarError, nearest_name
from nearfar.schedules import learning_rate_factor

__all__ = ["LOGGERS", "RunOptions", "TrainerOptions"]

#: loggers beside the run's own log
LOGGERS = ("tensorboard", "mlflow", "wandb")


class _Devices:
    """A number of processes, or ``auto``."""

    def check(self, name: str, value: object) -> None:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and value != "auto":
            raise NearfarError(
                f"{name}={'null' if value is None else value}: the number of processes on this machine, or auto, is "
                "needed (CUDA_VISIBLE_DEVICES chooses among GPUs)."
            )

    def __str__(self) -> str:
        return "at least 1, or auto"


class _Loggers:
    """One of ``LOGGERS``, or a list of them."""

    def check(self, name: str, value: object) -> None:
        if value is None:
            return
        for each in [value] if isinstance(value, str) or not isinstance(value, Sequence) else value:
            if each not in LOGGERS:
                raise NearfarError(
                    f"{name}={each}: there is no such logger; {nearest_name(str(each), LOGGERS)}"
                )

    def __str__(self) -> str:
        return ", ".join(LOGGERS) + ", or a list of them"


class _Overrides:
    """The overrides that a saved run was composed with."""

    def check(self, name: str, value: object) -> None:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise NearfarError(f"{name}={value}: a list of key=value texts is needed.")

    def __str__(self) -> str:
        return "a list, written by nearfar"


@dataclass
class TrainerOptions:
    """How a run is computed: devices, precision, several processes, memory, and how often something is written."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = option("auto", "the kind of device")
    devices: int | str = option(
        1, "processes on this machine that share every batch; auto: one for each GPU", rule=_Devices()
    )
    engine: Literal["torchrun", "ray"] = option(
        "torchrun",
        "what starts these processes: torchrun's engine on this machine, or Ray on the nodes of a cluster, where "
        "devices counts them all",
        role="place",
    )
    restarts: int = option(
        3,
        "with engine=ray: how often all processes start again from the last checkpoint when one is lost",
        least=0,
        role="place",
    )
    local_loss: bool = option(
        False, "of several processes: each computes the loss of its rows against all; the same gradients"
    )
    gather_with_grad: bool = option(
        True, "of several processes: false saves an exchange, and gradients are not exact"
    )
    ring: bool = option(
        False,
        "of several processes: embeddings pass from one to the next, and none holds those of all (InfoNCE, CLIP)",
    )
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = option("32-true", "of the model's computation")
    accumulate: int = option(1, "batches per optimiser step", least=1)
    cached_chunk: int | None = option(
        None,
        "rows encoded at a time, for batches larger than memory: the same gradient, a second forward pass",
        least=1,
    )
    gradient_clip: float | None = option(
        1.0, "largest norm of the gradient of a step; 0 switches it off", least=0
    )
    deterministic: bool = option(True, "deterministic algorithms of PyTorch")
    threads: int | None = option(
        None, "PyTorch's threads in a process; null leaves its choice", least=1, role="repeat"
    )
    workers: int = option(
        0, "loader processes of each process; batches are the same for every number", least=0, role="repeat"
    )
    eval_batch_size: int = option(512, "rows embedded at a time in an evaluation", least=1, role="repeat")
    evaluate_start: bool = option(
        True,
        "evaluate the model before training, too: what training changed, with an interval",
        role="repeat",
    )
    log_every: int = option(20, "optimiser steps between step records", least=1, role="repeat")
    probe_every: int | None = option(
        None,
        "steps between looks at the embeddings of a fixed sample; null: at the end of each epoch (of epochs under 64 "
        "steps, about every 64)",
        least=1,
        role="repeat",
    )
    probe_rows: int = option(256, "rows of that sample; 0 switches it off", least=0, role="repeat")
    checkpoint_minutes: float = option(
        1.0, "minutes between checkpoints within an epoch", least=0, role="repeat"
    )
    checkpoint_steps: int | None = option(
        None, "optimiser steps between checkpoints within an epoch", least=1
    )
    checkpoint_epochs: int | None = option(
        None,
        "epochs between states that are kept, checkpoints/epoch_NNNN.ckpt; null: only the last and the best",
        least=1,
        role="repeat",
    )
    max_steps: int | None = option(
        None,
        "optimiser steps, counted from the run's start, after which it ends; schedules still count in epochs",
        least=1,
    )


@dataclass
class RunOptions:
    """What every run has. A system's options are a subclass with its own options and defaults.

    ``system`` has no default here: every subclass names its system.
    """

    system: str = option("", "the system that is trained")
    seed: int = option(0, "of weights, batches and augmentation", least=0, most=2**32 - 1, role="repeat")
    name: str | None = option(
        None, "folder of the run below runs_dir; null: the experiment and what was overridden", role="place"
    )
    runs_dir: str = option("runs", "where runs lie", role="place")
    exists: Literal["number", "skip", "replace"] = option(
        "number",
        "where a run of that name is: number (a new folder), skip (keep it if it is finished and the same, go on with "
        "it if it was interrupted), replace",
        role="place",
    )
    resume_from: str | None = path(
        None, "a run or checkpoint: the same configuration goes on bit for bit", role="place"
    )
    start_epoch: int | None = option(
        None, "with resume_from: count the epochs from here", least=0, role="place"
    )
    init_from: str | None = path(None, "a run or checkpoint to take the weights of, and nothing else")
    needs_init_from: bool = option(
        False, "an experiment that only makes sense with init_from says so", role="place"
    )
    patience: int | None = option(
        None, "epochs without a better validation metric after which a run stops early", least=1
    )
    min_epochs: int = option(1, "epochs before a run may stop early", least=1)
    logger: str | list[str] | None = option(
        None, "loggers beside train_log.jsonl: tensorboard, mlflow, wandb", rule=_Loggers(), role="place"
    )
    report: bool = option(
        True, "write report.html at the end; `nearfar report RUN` writes it at any time", role="place"
    )
    overrides: list[str] = option(
        [], "what the run was composed with; nearfar writes it", rule=_Overrides(), role="place"
    )
    epochs: int = option(10, "passes over the training split", least=1, most=100_000)
    batch_size: int = option(64, "rows of a batch, of all processes together", least=2, role="batches")
    lr: float = option(1e-3, "learning rate at its highest", least=0)
    weight_decay: float = option(0.01, "of AdamW; biases, norms and scales have none", least=0)
    lr_schedule: str = option("cosine", "constant, linear or cosine")
    warmup: float = fraction(0.0, "share of the steps in which the learning rate rises")
    bootstrap: int = option(
        1000, "resamples of an interval; 0: intervals without resampling", least=0, role="repeat"
    )
    trainer: TrainerOptions = section(TrainerOptions())

    def check(self) -> None:
        """Raise ``NearfarError`` for the first options that do not go together; devices are checked where they are."""
        learning_rate_factor(self.lr_schedule, warmup=self.warmup)
        if 0 < self.bootstrap < 100:
            raise NearfarError(
                f"bootstrap={self.bootstrap}: the ends of an interval need at least 100 resamples; "
                "0 asks for intervals without resampling."
            )
        if self.start_epoch is not None and self.resume_from is None:
            raise NearfarError(
                f"start_epoch={self.start_epoch} counts the epochs of a resumed run: it needs resume_from=RUN."
            )
        if self.start_epoch is not None and self.start_epoch > self.epochs:
            raise NearfarError(f"start_epoch={self.start_epoch} lies outside 0 … epochs={self.epochs}.")
        trainer = self.trainer
        if trainer.ring and (trainer.local_loss or not trainer.gather_with_grad):
            raise NearfarError(
                "trainer.ring=true computes own rows with exact gradients; leave the other options out."
            )
