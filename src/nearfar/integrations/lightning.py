"""Lightning: a callback of its ``Trainer`` that watches a run and ends with the doctor's verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nearfar.batching import BatchSampler
from nearfar.data.files import Json
from nearfar.doctor import Diagnosis
from nearfar.doctor.logs.names import map_names
from nearfar.errors import NearfarError
from nearfar.integrations.pytorch import Monitor, Scores
from nearfar.metrics import Estimate

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:  # pragma: no cover - where the library is installed
    raise NearfarError(
        "nearfar.integrations.lightning needs lightning: pip install 'nearfar[train]'"
    ) from error

__all__ = ["WatchCallback"]


class WatchCallback(Callback):
    """Writes a run folder that ``nearfar doctor``, ``compare`` and ``report`` read, beside Lightning's own logs.

    Args:
        folder: where the run is written; not a folder that holds anything else.
        probe: a function of the LightningModule that gives the embeddings of fixed rows, (rows, d), or one for each
            view in a dictionary. None: embeddings are not watched.
        evaluate: a function of the module that gives `Scores`, or a mapping of metrics to estimates or numbers. None:
            what the module logs in validation; the score before training is then not known.
        loss: the loss, where its ``record`` (of a nearfar loss) is to go into the log.
        sampler: the nearfar sampler of the training loader: its state goes into Lightning's checkpoints, and a run that
            is resumed in the middle of an epoch goes on with the batches that were left. (Lightning itself begins the
            epoch's batches anew.)
        monitor: the metric that matters; None: the first.
        config: what is to be known of the run (``batch_size``, ``lr``, …), by which arms are told apart.
        seed: of the run.
        log_every: optimiser steps between records.
        quiet: do not print the verdict; it is in ``diagnosis``.

    With accumulation, the loss of a step is that of its last batch. A run that is resumed from a checkpoint goes on in
    the same folder. Only the main process writes.
    """

    def __init__(
        self,
        folder: str | Path = "runs/watched",
        *,
        probe: Callable[[Any], object] | None = None,
        evaluate: Callable[[Any], Scores | Mapping[str, Estimate | float]] | None = None,
        loss: nn.Module | None = None,
        sampler: BatchSampler | None = None,
        monitor: str | None = None,
        config: Mapping[str, object] | None = None,
        seed: int = 0,
        log_every: int = 10,
        quiet: bool = False,
    ) -> None:
        self.folder, self.probe, self.evaluate, self.loss = Path(folder), probe, evaluate, loss
        self.sampler, self._used = sampler, 0
        self.monitor, self.config, self.seed = monitor, dict(config or {}), seed
        self.log_every, self.quiet = log_every, quiet
        self.watch: Monitor | None = None
        self.diagnosis: Diagnosis | None = None
        self._last: Tensor | float | None = None
        self._scores: Scores | None = None
        self._resume = 0
        self._begun = False  # whether this process has begun an epoch

    # -- state, in Lightning's checkpoints ------------------------------------------------------------------------
    def state_dict(self) -> Json:
        state: Json = {} if self.watch is None else {"steps": self.watch.steps}
        if self.sampler is not None:
            # A loader with workers draws ahead: what counts is what was trained on.
            state["sampler"] = self.sampler.state_dict(self._used)
        return state

    def load_state_dict(self, state_dict: Json) -> None:
        self._resume = int(state_dict.get("steps", 0))
        if self.sampler is not None:
            if "sampler" not in state_dict:
                raise NearfarError(
                    "the checkpoint holds no state of the sampler: it was written without sampler= of WatchCallback. "
                    "Leave it out, or begin anew."
                )
            self.sampler.load_state_dict(state_dict["sampler"])
            self._used = int(state_dict["sampler"]["position"])

    # -- what the trainer calls -----------------------------------------------------------------------------------
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        evaluate = self.evaluate
        epochs = {} if trainer.max_epochs is None else {"epochs": int(trainer.max_epochs)}
        about = {
            "accumulate": int(trainer.accumulate_grad_batches),
            "precision": str(trainer.precision),
            "world_size": int(trainer.world_size),
        }
        self.watch = Monitor(
            pl_module,
            self.probe,
            self.folder,
            evaluate=None if evaluate is None else lambda: Scores.of(evaluate(pl_module)),
            config=epochs | about | self.config,
            seed=self.seed,
            monitor=self.monitor,
            log_every=self.log_every,
            resume=self._resume,
        )
        if not self._resume:
            self.watch.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Lightning divides the loss by the batches that are accumulated.
        self._last = loss.detach() * trainer.accumulate_grad_batches

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.watch is None or self._last is None:
            return
        lr = float(optimizer.param_groups[0]["lr"])
        record = None
        if (self.watch.steps + 1) % self.log_every == 0 or self.watch.steps == 0:
            record = getattr(self.loss, "record", None)
        self.watch.step(self._last, record=record, lr=lr)
        self._last = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._begun:
            self._used = 0
        self._begun = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._used = batch_idx + 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the epoch's validation, which Lightning runs before this."""
        if self.watch is None:
            return
        values = {
            str(name): float(value)
            for name, value in trainer.callback_metrics.items()
            if isinstance(value, Tensor) and value.numel() == 1
        }
        used = map_names(values).used
        theirs = {field[4:]: values[name] for field, name in used.items() if field.startswith("val/")}
        loss = {"val_loss": values[used["val_loss"]]} if "val_loss" in used else {}
        if self.evaluate is not None:
            self._scores = self.watch.scores()
        elif theirs:
            self._scores = Scores(theirs)
        self.watch.epoch(self._scores, **loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.watch is None:
            return
        self.diagnosis = self.watch.finish(self._scores)
        if not self.quiet:
            print(f"{self.folder}: " + "\n".join(self.diagnosis.lines))
