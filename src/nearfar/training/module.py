"""The Lightning module that runs a system, and the place where a run's state lives.

Lightning turns the crank (devices, precision, accumulation, clipping, processes); epoch, step, place in the
epoch and running means are counted here, because they are the run's and not the process's. Each epoch gets a
loader over the sampler's batches *that are left*, so a resumed epoch is an ordinary, shorter one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nearfar.errors import NearfarError
from nearfar.losses.memory import CrossBatchMemory
from nearfar.schedules import learning_rate_factor
from nearfar.training import ranks
from nearfar.training.checkpoint import Checkpoint, generator_state, load_generator_state
from nearfar.training.loading import consecutive, loader
from nearfar.training.shared_step import Sharing
from nearfar.training.system import Evaluation, StepOutput, System, TrainSampler, collect, hook, step_of

__all__ = ["RunModule"]


def _seed(seed: int, rank: int, step: int = 0) -> int:
    """What dropout starts from: of the first process always the same, of each other one something else."""
    if rank == 0:
        return seed + 1
    return int(np.random.SeedSequence([seed + 1, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


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


class RunModule(L.LightningModule):
    """A system's model under training."""

    def __init__(
        self,
        system: System,
        model: nn.Module,
        sampler: TrainSampler | None,
        config: Any,
        data_hash: str,
        resume: Checkpoint | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__()
        self.system, self.model, self.config = system, model, config
        self.sampler: Any = sampler  # None where the module only evaluates
        self.data_hash, self.say = data_hash, say
        self.epoch, self.batches, self.step = 0, 0, 0
        self.epoch_batches = 0
        self.sharing = Sharing.of(config)
        self._rows: list[int] = []  # of the batches still to come when the epoch's loader was made
        self.loss_mean = Mean()
        self.best: dict[str, Any] = {"value": None, "epoch": None, "epochs_without_gain": 0}
        self.last: StepOutput
        # Of the step at hand: whether it will be logged, what its graph told, and the norm before clipping.
        self.logged, self.gradient_logs = False, dict[str, float]()
        self.gradient_norm: Tensor | None = None
        # Read once: looking an option up in a configuration takes longer than a step may wait.
        self.accumulate, self.log_every = int(config.trainer.accumulate), int(config.trainer.log_every)
        self.cached_chunk = config.trainer.get("cached_chunk")
        self.evaluation: Evaluation | None = None
        self.evaluation_split = "val"
        self.outputs: dict[str, Tensor] = {}
        self.epoch_logs: dict[str, Any] = {}
        self.cut = False  # whether trainer.max_steps ends this epoch before its last batch
        self.seconds_before, self.started_at = 0.0, time.perf_counter()
        self._resume, self._partial_epoch = resume, False
        self._parts: list[dict[str, Tensor]] = []
        if resume is not None:
            self.epoch, self.batches, self.step = resume.epoch, resume.batches, resume.step
            self.loss_mean = Mean(**resume.meters)
            self.best = dict(resume.best)
            self.seconds_before = resume.seconds
            self._partial_epoch = resume.batches > 0
        self._step_at_start = self.step

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes which hook it calls, about fifty times a step, and a module looks for a parameter each time.
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # -- data ------------------------------------------------------------------------------------------------
    def train_dataloader(self) -> DataLoader[Any]:
        """The batches of the current epoch that have not been trained on yet (called once an epoch)."""
        dataset = self.system.dataset("train")
        assert dataset is not None
        self.epoch_logs = self.system.on_epoch(self.epoch, self.sampler, self.say)
        self.sampler.set_epoch(self.epoch)
        if self._resume is not None and self._partial_epoch:
            try:
                self.sampler.load_state_dict(self._resume.sampler)
            except NearfarError as error:
                # Other sampler options than those of the interrupted epoch: its remaining batches do not exist.
                self.say(f"epoch {self.epoch + 1} starts again under the new sampler options ({error})")
                self.batches, self._partial_epoch, self.loss_mean = 0, False, Mean()
        batches = list(self.sampler)
        self.epoch_batches = self.batches + len(batches)
        self._rows = [len(batch) for batch in batches]
        dataset.set_epoch(self.epoch)
        pin = torch.cuda.is_available() and self.config.trainer.accelerator != "cpu"
        if self.steps_left is not None:
            batches = batches[: self.steps_left * int(self.config.trainer.accumulate)]
        self.cut = self.batches + len(batches) < self.epoch_batches
        return loader(dataset, batches, self.config.trainer.workers, pin)

    def evaluation_loader(self, split: str) -> DataLoader[Any] | list[Any]:
        """Any split in order; empty where there is no such split."""
        dataset = self.system.dataset(split)
        if dataset is None:
            return []
        return loader(dataset, consecutive(len(dataset), self.config.trainer.eval_batch_size))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation split in order; nothing where the epoch is cut: it is no epoch's result."""
        return [] if self.cut else self.evaluation_loader("val")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on ``device``; loaders give batches in the machine's own memory."""
        return (
            batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)
        )

    # -- optimiser -------------------------------------------------------------------------------------------
    def configure_optimizers(self) -> Any:
        """AdamW and a learning-rate factor per optimiser step; a resumed run loads the state of both."""
        config = self.config
        groups = self.system.parameter_groups(self.model)
        # One pass over all weights instead of one per tensor and operation. Not in mixed precision, where Lightning
        # does not clip the gradients of an optimiser that could unscale them by itself.
        fused = config.trainer.precision == "32-true"
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=fused)
        total = max(1, self.total_steps())
        rule = learning_rate_factor(config.lr_schedule, warmup=config.warmup)

        def factor(step: int) -> float:
            return rule(step, total)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        if self._resume is not None and self._resume.optimizer is not None:
            # The state is continued; learning rate and weight decay are those of the configuration, which may be new.
            fresh = [
                {key: group[key] for key in ("initial_lr", "weight_decay")}
                for group in optimizer.param_groups
            ]
            try:
                optimizer.load_state_dict(self._resume.optimizer)
            except ValueError as error:
                raise NearfarError(
                    f"the optimiser of that run belongs to other weights ({error}): an option changes which weights "
                    "are trained. Take the weights alone with init_from=."
                ) from None
            scheduler.load_state_dict(dict(self._resume.scheduler or {}))
            # Steps count from the run's start, at the present number of steps per epoch: a new batch size or
            # start_epoch moves the position in the schedule, and nothing else.
            scheduler.last_epoch = (
                self.epoch * self.steps_per_epoch() + self.batches // config.trainer.accumulate
            )
            scheduler.base_lrs = [group["initial_lr"] for group in fresh]
            for group, new in zip(optimizer.param_groups, fresh, strict=True):
                group |= new
                group["lr"] = new["initial_lr"] * factor(scheduler.last_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def steps_per_epoch(self) -> int:
        """Optimiser steps of a whole epoch; the last may accumulate fewer batches."""
        return -(-len(self.sampler) // int(self.config.trainer.accumulate))

    def total_steps(self) -> int:
        """Optimiser steps of the whole run, for schedules."""
        return self.steps_per_epoch() * int(self.config.epochs)

    # -- steps -----------------------------------------------------------------------------------------------
    def on_train_start(self) -> None:
        """Set the generators that dropout draws from: last of all, so that nothing draws in between."""
        self.started_at = time.perf_counter()
        if self._resume is not None:
            state = self._resume.generators_of(ranks.rank())
            if state is None:  # there were fewer processes
                torch.manual_seed(_seed(self.config.seed, ranks.rank(), self.step))
            else:
                load_generator_state(state)
            if self._resume.precision:
                self.trainer.precision_plugin.load_state_dict(self._resume.precision)
        else:
            torch.manual_seed(_seed(self.config.seed, ranks.rank()))
            for module in self.model.modules():
                if isinstance(module, CrossBatchMemory):
                    module.clear()  # rows that came with the weights (init_from) belong to another run's data
        self._resume = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch."""
        chunk = self.cached_chunk
        if self.trainer.world_size > 1:
            rows = self._rows_at(self.batches)
            output = self.sharing.step(self.system, self.model, batch, rows, chunk)
        else:
            output = step_of(self.system, self.model, batch, chunk)
        self.last = output
        batch_number, step = self.batches + 1, self._step_at_start + self.trainer.global_step + 1
        ends = batch_number % self.accumulate == 0 or batch_number == self.epoch_batches
        self.logged = ends and step % self.log_every == 0
        if self.logged:
            self.gradient_logs = output.gradient_logs()
        return output.loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm as Lightning does, and keep the norm for the log; without clipping, take it of logged steps."""
        self.gradient_norm = None
        if not gradient_clip_val and not self.logged:
            return
        weights = list(self.trainer.precision_plugin.main_params(optimizer))
        if gradient_clip_val:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(weights, gradient_clip_val)
        else:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            self.gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def count_batch(self) -> None:
        """Count the batch just trained on; Lightning has stepped the optimiser by now if it was due."""
        self.batches += 1
        self.step = self._step_at_start + self.trainer.global_step
        self.loss_mean.add(self.last.loss)

    def on_validation_start(self) -> None:
        """What the system's metrics need beyond the split itself."""
        self._before_evaluation("val", final=False)

    def on_test_start(self) -> None:
        """The same, for the last evaluation."""
        self._before_evaluation(self.evaluation_split, final=True)

    def _before_evaluation(self, split: str, final: bool) -> None:
        if ready := hook(self.system, "before_evaluation"):
            ready(self.model, split, final)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collect what the metrics need."""
        self._parts.append({k: v.detach().cpu() for k, v in self.system.embed(self.model, batch).items()})

    def on_validation_epoch_end(self) -> None:
        """Estimates of the validation split."""
        self.outputs, self._parts = collect(self._parts), []
        self.evaluation = self.system.evaluate(self.outputs, "val", final=False)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Collect what the metrics need."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """The outputs of ``evaluation_split``."""
        self.outputs, self._parts = collect(self._parts), []

    # -- state -----------------------------------------------------------------------------------------------
    @property
    def rows(self) -> int:
        """Rows of the last batch that was counted."""
        return self._rows_at(self.batches - 1)

    def _rows_at(self, batch: int) -> int:
        return self._rows[batch - (self.epoch_batches - len(self._rows))]

    @property
    def at_boundary(self) -> bool:
        """Whether the last batch ended in an optimiser step, so that no half-summed gradient is lost."""
        return self.batches % self.accumulate == 0 or self.batches == self.epoch_batches

    @property
    def steps_left(self) -> int | None:
        """Optimiser steps until ``trainer.max_steps``; None without one."""
        most = self.config.trainer.get("max_steps")
        return None if most is None else max(0, int(most) - self.step)

    @property
    def exhausted(self) -> bool:
        """Whether early stopping has had enough; also true of a resumed run that had stopped."""
        patience = self.config.patience
        waited = self.best["epochs_without_gain"]
        return bool(patience) and waited >= patience and self.epoch >= (self.config.min_epochs or 0)

    def seconds(self) -> float:
        """Training time of the run so far, earlier parts included."""
        return self.seconds_before + time.perf_counter() - self.started_at

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.batches, self._partial_epoch = self.epoch + 1, 0, False
        self.loss_mean = Mean()

    def checkpoint(self) -> Checkpoint:
        """The state of the run, between two steps; with several processes all of them must ask for it."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        scheduler: Any = self.lr_schedulers()
        generators = ranks.gathered(generator_state()) or [{}]
        return Checkpoint(
            system=self.system.name,
            epoch=self.epoch,
            batches=self.batches,
            step=self.step,
            model=self.model.state_dict(),
            data_hash=self.data_hash,
            optimizer=optimizer.state_dict(),
            scheduler=scheduler.state_dict(),
            precision=self.trainer.precision_plugin.state_dict(),
            sampler=dict(self.sampler.state_dict(position=self.batches)) if self.batches else {},
            generators=generators[0],
            other_generators=generators[1:],
            meters=self.loss_mean.state_dict(),
            best=dict(self.best),
            seconds=self.seconds(),
        )
