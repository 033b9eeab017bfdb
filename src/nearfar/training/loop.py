"""The training loop, top to bottom: epoch, step, log, validate, checkpoint, stop.

Lightning Fabric does devices, precision, several processes and clipping. Everything else is here: each epoch gets a
loader over the sampler's batches *that are left*, so that a resumed epoch is an ordinary, shorter one; a checkpoint is
taken between two optimiser steps and holds everything that the next step depends on (``nearfar.training.state``).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nearfar.config.training import RunOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.losses.memory import CrossBatchMemory
from nearfar.training import ranks
from nearfar.training.checkpoint import Checkpoint, epoch_path, generator_state, load_generator_state
from nearfar.training.evaluation import embed_split, loader
from nearfar.training.fabric import build_fabric, distribute
from nearfar.training.recorder import Recorder
from nearfar.training.run_folder import same_file
from nearfar.training.shared_step import Sharing
from nearfar.training.state import Mean, RunState, build_optimizer, dropout_seed
from nearfar.training.system import Evaluation, StepOutput, System, TrainSampler

if TYPE_CHECKING:
    from lightning_fabric.wrappers import _FabricOptimizer

__all__ = ["Interrupted", "StopRequest", "TrainingLoop", "Watch", "stop_signals"]

#: is told after an epoch how many there were, and the monitored metric on validation; what it raises ends the run
Watch = Callable[[int, float], None]

#: short epochs share a probe; so many steps keep it below 2 % of the time
PROBE_STEPS = 64


class TrainingLoop:
    """A run under training: ``run`` trains until epochs, ``trainer.max_steps`` or patience are used up.

    ``model`` holds the weights, ``state`` the counters; both are those of the last step when ``run`` returns or raises.
    """

    def __init__(
        self,
        system: System,
        model: nn.Module,
        sampler: TrainSampler,
        config: RunOptions,
        data_hash: str,
        recorder: Recorder,
        request: StopRequest,
        resume: Checkpoint | None = None,
        say: Callable[[str], None] = print,
        watch: Watch | None = None,
    ) -> None:
        self.system, self.model, self.sampler = system, model, sampler
        self.config, self.data_hash = config, data_hash
        self.recorder, self.request, self.say, self.watch = recorder, request, say, watch
        self.state = RunState() if resume is None else RunState.of(resume)
        self.sharing = Sharing.of(config)
        self._resume = resume
        # Read once: looking an option up in a configuration takes longer than a step may wait.
        trainer = config.trainer
        self.accumulate, self.log_every = int(trainer.accumulate), int(trainer.log_every)
        self.cached_chunk = trainer.cached_chunk
        self._clip, self._probe_every = trainer.gradient_clip or 0.0, trainer.probe_every
        self._save_steps, self._save_seconds = (
            trainer.checkpoint_steps,
            60 * float(trainer.checkpoint_minutes),
        )
        self._saved_at = time.monotonic()
        # Of the epoch at hand.
        self.epoch_batches = 0  # those of the whole epoch, trained or not
        self.epoch_logs: Json = {}
        self._rows: list[int] = []  # of the batches that were left when it was opened
        self._cut = False  # whether trainer.max_steps ends it before its last batch
        # Of the step at hand.
        self.last: StepOutput
        self.logged, self.gradient_logs = False, dict[str, float]()
        self.gradient_norm: Tensor | None = None  # before clipping

    # -- the loop --------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Train. Raises ``Interrupted`` after a Ctrl-C or SIGTERM, with a checkpoint written."""
        self.fabric = build_fabric(self.config)
        self._step = distribute(self.fabric, _Step(self))
        raw, self.scheduler = build_optimizer(
            self.config, self.system.parameter_groups(self.model), self.state, len(self.sampler), self._resume
        )
        self.optimizer = cast("_FabricOptimizer", self.fabric.setup_optimizers(raw))
        with self.recorder:
            self.recorder.start(self)
            if self._resume is None and self.config.trainer.evaluate_start:
                self._score_start()
            self._set_generators()
            while self.finished is None:
                self._train_epoch()

    def _train_epoch(self) -> None:
        batches = self._open_epoch()
        self.recorder.epoch_started(self)
        for batch in batches:
            self._train_step(self.to_device(batch))
            self._after_step()
        if self._cut:
            # The state in mid-epoch, so that a resumed run with more steps goes on as if it had not been cut.
            self.say(f"trainer.max_steps={self.state.step}: ended in epoch {self.state.epoch + 1}")
            self._save()
        else:
            self._close_epoch(self._validate())
        self._stop_if_requested()

    def _open_epoch(self) -> DataLoader[object]:
        """The batches of the current epoch that have not been trained on yet."""
        state, dataset = self.state, self.system.dataset("train")
        assert dataset is not None
        # What a system draws here, a resumed run would draw again.
        with torch.random.fork_rng(devices=[]):
            self.epoch_logs = self.system.on_epoch(state.epoch, self.sampler, self.say)
        self.sampler.set_epoch(state.epoch)
        if self._resume is not None and state.batches:
            try:
                self.sampler.load_state_dict(self._resume.sampler)
            except NearfarError as error:
                # Other sampler options than those of the interrupted epoch: its remaining batches do not exist.
                self.say(f"epoch {state.epoch + 1} starts again under the new sampler options ({error})")
                state.batches, state.loss_mean = 0, Mean()
        self._resume = None
        batches = list(self.sampler)
        self.epoch_batches = state.batches + len(batches)
        self._rows = [len(batch) for batch in batches]
        dataset.set_epoch(state.epoch)
        if self.steps_left is not None:
            batches = batches[: self.steps_left * self.accumulate]
        self._cut = state.batches + len(batches) < self.epoch_batches
        pin = self.fabric.device.type == "cuda"
        return loader(dataset, batches, self.config.trainer.workers, pin)

    def _train_step(self, batch: object) -> None:
        """Forward and backward of one batch; an optimiser step after every ``trainer.accumulate`` of them."""
        state = self.state
        begins, ends = state.batches % self.accumulate == 0, self._ends_a_step(state.batches + 1)
        self.logged = ends and (state.step + 1) % self.log_every == 0
        with self.fabric.no_backward_sync(self._step, enabled=not ends):
            self._step.batch = batch
            loss = self._step()
            if begins:
                self.optimizer.zero_grad()
            self.fabric.backward(loss / self.accumulate)
        if ends:
            self.gradient_norm = self._clip_gradients()
            self.optimizer.step()
            self.scheduler.step()
            state.step += 1
        state.batches += 1
        state.loss_mean.add(self.last.loss)

    def _clip_gradients(self) -> Tensor | None:
        """The norm of the gradient before clipping; without clipping, that of logged steps alone."""
        if self._clip:
            return self.fabric.clip_gradients(
                self._step, self.optimizer, max_norm=self._clip, error_if_nonfinite=False
            )
        if not self.logged:
            return None
        precision = self.fabric.strategy.precision
        precision.unscale_gradients(self.optimizer.optimizer)
        weights = precision.main_params(self.optimizer.optimizer)
        return torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])

    def _after_step(self) -> None:
        """Log, probe and save if it is time, or if a stop was requested."""
        state = self.state
        self.recorder.batch_done(self)
        if self.logged:
            self.recorder.log_step(self)
        if not self._ends_a_step(state.batches) or state.batches == self.epoch_batches:
            return  # after the last batch of an epoch, its own probe and checkpoint follow
        if self._probe_every and state.step % self._probe_every == 0:
            self.recorder.log_probe(self)
        due = time.monotonic() - self._saved_at > self._save_seconds
        due = due or bool(self._save_steps and state.step % self._save_steps == 0)
        stop, due = ranks.any_rank(self._stop_requested, due)
        if stop or due:
            self._save()
        if stop:
            raise Interrupted(str(self.recorder.folder))

    def _validate(self) -> tuple[Evaluation, dict[str, Tensor]] | None:
        """Estimates and outputs of the validation split, where there is one."""
        if self.system.dataset("val") is None:
            return None
        self.recorder.validation_started()
        outputs = embed_split(self.fabric, self.system, self.model, self.config, "val", final=False)
        with torch.no_grad():
            return self.system.evaluate(outputs, "val", final=False), outputs

    def _score_start(self) -> None:
        """Log the scores of validation before the first step, and what guessing scores: a run in progress is read by
        it."""
        validated = self._validate()
        if validated is not None:
            estimates = validated[0].estimates
            scores = {name: estimate.value for name, estimate in estimates.items()}
            chance = {name: estimate.chance for name, estimate in estimates.items()}
            monitor = self.system.monitor
            self.recorder.log(
                {"kind": "start", "step": 0, "monitor": monitor, "val": scores, "chance": chance}
            )

    def _close_epoch(self, validated: tuple[Evaluation, dict[str, Tensor]] | None) -> None:
        """Log the epoch, remember the best, go on to the next, save."""
        state, monitor = self.state, self.system.monitor
        if self._ends_with_probe():
            self.recorder.log_probe(self, validated and validated[1])
        values = None
        gained = True
        if validated is None:
            state.best["epoch"] = state.epoch + 1  # nothing to choose by: the last is the best
        else:
            values = {name: estimate.value for name, estimate in validated[0].estimates.items()}
            # One process decides for all: other machines may round it otherwise.
            value, before = ranks.from_first(lambda: float(values[monitor])), state.best["value"]
            rises = validated[0].estimates[monitor].higher_is_better
            gained = before is None or (value > before if rises else value < before)
            if gained:
                state.best = {"value": value, "epoch": state.epoch + 1, "epochs_without_gain": 0}
            else:
                state.best["epochs_without_gain"] += 1
        self.recorder.log_epoch(self, values)
        state.end_epoch()
        self._save(best=gained)
        if self.watch is not None and values is not None:
            self.watch(state.epoch, values[monitor])
        if self.exhausted:
            self.say(f"stopped early: {monitor} has not become better for {self.config.patience} epochs")

    # -- conditions ------------------------------------------------------------------------------------------
    @property
    def finished(self) -> tuple[str, str] | None:
        """Why there is nothing left to train, and the option that would let the run go on; None while there is."""
        if self.exhausted:
            return "stopped early", "patience"
        if self.state.epoch >= self.config.epochs:
            return f"all {self.config.epochs} epochs are done", "epochs"
        if self.steps_left == 0:
            return f"all {self.state.step} steps are done", "trainer.max_steps"
        return None

    @property
    def exhausted(self) -> bool:
        """Whether early stopping has had enough; also true of a resumed run that had stopped."""
        patience, state = self.config.patience, self.state
        waited = state.best["epochs_without_gain"]
        return bool(patience) and waited >= patience and state.epoch >= (self.config.min_epochs or 0)

    @property
    def steps_left(self) -> int | None:
        """Optimiser steps until ``trainer.max_steps``; None without one."""
        most = self.config.trainer.max_steps
        return None if most is None else max(0, int(most) - self.state.step)

    @property
    def rows(self) -> int:
        """Rows of the last batch that was counted."""
        return self._rows_at(self.state.batches - 1)

    def _rows_at(self, batch: int) -> int:
        return self._rows[batch - (self.epoch_batches - len(self._rows))]

    def _ends_a_step(self, batches: int) -> bool:
        """Whether the ``batches``-th batch of the epoch ends in an optimiser step."""
        return batches % self.accumulate == 0 or batches == self.epoch_batches

    def _ends_with_probe(self) -> bool:
        """Whether the epoch that ends is probed: all are, but of short ones about one in ``PROBE_STEPS`` steps, the
        first and the last, since a probe costs about a step. A function of the step alone, so that a resumed run probes
        where the run would have."""
        state = self.state
        if self._probe_every or state.epoch in (0, self.config.epochs - 1):
            return True
        began = state.step - -(-len(self.sampler) // self.accumulate)
        return state.step // PROBE_STEPS > began // PROBE_STEPS

    # -- state -----------------------------------------------------------------------------------------------
    def to_device(self, batch: object) -> Any:
        """The batch on the model's device; loaders give batches in the machine's own memory."""
        return batch if self.fabric.device.type == "cpu" else self.fabric.to_device(batch)

    def _set_generators(self) -> None:
        """Set the generators that dropout draws from: last of all, so that nothing draws in between."""
        self.state.started_at = time.perf_counter()
        if self._resume is None:
            torch.manual_seed(dropout_seed(self.config.seed, ranks.rank()))
            for module in self.model.modules():
                if isinstance(module, CrossBatchMemory):
                    module.clear()  # rows that came with the weights (init_from) belong to another run's data
            return
        generators = self._resume.generators_of(ranks.rank())
        if generators is None:  # there were fewer processes
            torch.manual_seed(dropout_seed(self.config.seed, ranks.rank(), self.state.step))
        else:
            load_generator_state(generators, self._resume.origin)
        if self._resume.precision:
            self.fabric.strategy.precision.load_state_dict(self._resume.precision)

    def checkpoint(self) -> Checkpoint:
        """The state of the run, between two steps; with several processes all of them must ask for it."""
        state = self.state
        generators = ranks.gathered(generator_state()) or [{}]
        return Checkpoint(
            system=self.system.name,
            data_hash=self.data_hash,
            model=self.model.state_dict(),
            optimizer=self.optimizer.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            precision=self.fabric.strategy.precision.state_dict(),
            sampler=dict(self.sampler.state_dict(position=state.batches)) if state.batches else {},
            generators=generators[0],
            other_generators=generators[1:],
            **state.to_dict(),
        )

    def _save(self, best: bool = False) -> None:
        checkpoint, folder = self.checkpoint(), self.recorder.folder.checkpoints
        if ranks.is_first():
            last = folder / "last.ckpt"
            if best:
                # The best first: killed in between, the run repeats the epoch and does not name a best it lacks.
                checkpoint.save(last.with_name("best.ckpt"))
                same_file(last.with_name("best.ckpt"), last)
            else:
                checkpoint.save(last)
            every = self.config.trainer.checkpoint_epochs
            if every and self.state.batches == 0 and self.state.epoch % every == 0:
                same_file(last, epoch_path(folder, self.state.epoch))
        self._saved_at = time.monotonic()

    # -- stopping --------------------------------------------------------------------------------------------
    @property
    def _stop_requested(self) -> bool:
        """Whether this process was asked to stop, or its launcher died."""
        return self.request.stop or ranks.launcher_died()

    def _stop_if_requested(self) -> None:
        (stop,) = ranks.any_rank(self._stop_requested)
        if stop:
            raise Interrupted(str(self.recorder.folder))


class _Step(nn.Module):
    """One training step as a module: DistributedDataParallel and mixed precision work around a forward.

    The batch is handed over as an attribute: systems have batches of their own types, which nothing may convert.
    """

    def __init__(self, loop: TrainingLoop) -> None:
        super().__init__()
        self.model = loop.model
        self.batch: object = None
        self._loop = loop

    def forward(self) -> Tensor:
        loop = self._loop
        if ranks.count() > 1:
            rows = loop._rows_at(loop.state.batches)
            output = loop.sharing.step(loop.system, self.model, self.batch, rows, loop.cached_chunk)
        else:
            output = loop.system.step(self.model, self.batch, loop.cached_chunk)
        self.batch = None
        loop.last = output
        if loop.logged:
            loop.gradient_logs = output.gradient_logs()
        return output.loss


class Interrupted(Exception):
    """Training was stopped on request and has written a checkpoint from which it resumes exactly."""


class StopRequest:
    """Set by the first Ctrl-C (or SIGTERM), or by `ranks.ask_to_stop`; the run stops after the current step."""

    _signalled = False

    @property
    def stop(self) -> bool:
        """Whether the run is to stop."""
        return self._signalled or ranks.stop_asked()

    def ask(self, number: int, frame: object) -> None:
        """What the signals call; a second Ctrl-C stops at once."""
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request; a second Ctrl-C stops at once.

    Stopping inside a step would leave an optimiser that has moved half of the weights, so the request waits
    for the end of the step.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
