"""What happens around the steps: the log, probes, checkpoints, early stopping, a clean stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor

from nearfar.training import ranks
from nearfar.training.checkpoint import epoch_path
from nearfar.training.facts import model_facts
from nearfar.training.module import RunModule
from nearfar.training.probe import Probe
from nearfar.training.run_folder import RunFolder, same_file

#: short epochs share a probe; so many steps keep it below 2 % of the time
PROBE_STEPS = 64

__all__ = ["Interrupted", "RunRecorder", "StopRequest", "stop_signals"]


class Interrupted(Exception):
    """Training was asked to stop and has written a checkpoint from which it resumes exactly."""


class StopRequest:
    """Set by the first Ctrl-C (or SIGTERM); the run stops after the current step."""

    asked = False

    def listen(self) -> None:
        """Let Ctrl-C and SIGTERM ask from now on, whoever has listened before.

        Lightning puts a handler of its own in front of those it finds, which waits for the other processes in the
        middle of whatever this one is doing.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


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

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    request.listen()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunRecorder(L.Callback):
    """Writes ``train_log.jsonl``, ``model.json`` and the checkpoints of a run, and stops it early.

    ``checkpoints/last.ckpt`` is the newest state (every ``checkpoint_minutes``, at each epoch's end, and when the
    run is asked to stop), ``checkpoints/best.ckpt`` the best by validation. Both names are stable; older ones
    are replaced. With ``checkpoint_epochs=N`` the state after every N-th epoch is kept beside them
    (``epoch_path``).
    """

    def __init__(self, folder: RunFolder, config: Any, request: StopRequest) -> None:
        self.folder, self.config, self.request = folder, config, request
        self._saved_at = time.monotonic()
        self._epoch_started = time.perf_counter()
        self._last_logged: tuple[int, float] | None = None
        self._probe: Probe | None = None
        self._scale_max: dict[str, float] = {}
        # Read once: looking an option up in a configuration takes longer than a step may wait.
        trainer = config.trainer
        self._probe_every, self._save_steps = trainer.probe_every, trainer.checkpoint_steps
        self._save_seconds = 60 * float(trainer.checkpoint_minutes)

    # -- log -------------------------------------------------------------------------------------------------
    def _log(self, trainer: L.Trainer, record: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.append(record)
        flat = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step",)}
        flat |= {f"val/{k}": v for k, v in (record.get("val") or {}).items()}
        flat = {f"{record['kind']}/{k}": v for k, v in flat.items()}
        for logger in trainer.loggers:
            logger.log_metrics(flat, step=record["step"])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Choose the rows of the probe, and write what the run is made of."""
        assert isinstance(module, RunModule)
        self.request.listen()
        config = self.config
        facts = model_facts(module.model, module.system)
        if config.trainer.probe_rows:
            size = int(config.get("batch_size") or config.trainer.probe_rows)
            self._probe = Probe(module.system, config.trainer.probe_rows, size, config.seed)
            with trainer.precision_plugin.val_step_context():
                facts["views"] = self._probe.views(module.model, trainer.strategy.batch_to_device)
        self._scale_max = {key: facts[key] for key in ("scale_max",) if key in facts}
        if trainer.is_global_zero:
            self.folder.write_json("model.json", facts | {"world_size": trainer.world_size})

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write what the sampler promises for this epoch, before its first step."""
        assert isinstance(module, RunModule)
        self._epoch_started = time.perf_counter()
        self._last_logged = (module.step, self._epoch_started)
        if module.batches == 0:
            record = {"kind": "plan", "epoch": module.epoch + 1, "step": module.step}
            self._log(trainer, record | module.epoch_logs)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count and log the step; probe and save if it is time, or if somebody asked to stop."""
        assert isinstance(module, RunModule)
        module.count_batch()
        if module.logged:
            self._log_step(trainer, module)
        last = module.batches == module.epoch_batches
        # After the last batch of an epoch the epoch's own probe follows.
        if self._probe_every and module.at_boundary and module.step % self._probe_every == 0 and not last:
            self._log_probe(trainer, module)
        due = time.monotonic() - self._saved_at > self._save_seconds
        due = due or bool(self._save_steps and module.step % self._save_steps == 0)
        # After the last batch of an epoch the epoch's own checkpoint follows, with its validation done.
        if module.at_boundary and not last:
            asked, due = ranks.any_rank(self._asked, due)
            if asked or due:
                self._save(trainer, module)
            if asked:
                raise Interrupted(str(self.folder))

    @property
    def _asked(self) -> bool:
        """Whether this process was asked to stop, or has nobody left who could ask."""
        return self.request.asked or ranks.abandoned()

    def _log_step(self, trainer: L.Trainer, module: RunModule) -> None:
        now = time.perf_counter()
        own = module.sharing.rows_of(module.rows, ranks.rank())
        record = {
            "kind": "step",
            "epoch": module.epoch + 1,
            "step": module.step,
            "batch": module.batches,
            "rows": own if module.sharing.describes_own_rows else module.rows,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "loss": module.last.loss.item(),
            **module.gradient_logs,
            **self._scale_max,
            **module.last.logs(),
        }
        if trainer.world_size > 1:
            record |= {"world_size": trainer.world_size, "rows_per_rank": own}
        if module.gradient_norm is not None:
            norm, clip = module.gradient_norm.item(), self.config.trainer.gradient_clip
            record |= {"gradient_norm": norm, "clipped": bool(clip) and norm > clip}
        if self._last_logged and module.step > self._last_logged[0]:
            seconds = (now - self._last_logged[1]) / (module.step - self._last_logged[0])
            record["seconds_per_step"] = round(seconds, 6)
        self._last_logged = (module.step, now)
        self._log(trainer, record)

    def _ends_with_probe(self, module: RunModule) -> bool:
        """Whether the epoch that ends is probed: all are, but of short ones about one in ``PROBE_STEPS`` steps, the
        first and the last, since a probe costs about a step. A function of the step alone, so that a resumed run probes
        where the run would have."""
        if self._probe_every or module.epoch in (0, self.config.epochs - 1):
            return True
        began = module.step - module.steps_per_epoch()
        return module.step // PROBE_STEPS > began // PROBE_STEPS

    def _log_probe(
        self, trainer: L.Trainer, module: RunModule, validated: dict[str, Tensor] | None = None
    ) -> None:
        if self._probe is None:
            return
        started = time.perf_counter()
        with trainer.precision_plugin.val_step_context():
            found = self._probe.record(module.model, trainer.strategy.batch_to_device, validated)
        seconds = time.perf_counter() - started
        record = {"kind": "probe", "epoch": module.epoch + 1, "step": module.step, **found}
        self._log(trainer, record | {"seconds": round(seconds, 6)})
        if self._last_logged:  # no time of a step
            self._last_logged = (self._last_logged[0], self._last_logged[1] + seconds)

    # -- epochs ----------------------------------------------------------------------------------------------
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the epoch, remember the best, save, and stop early where that was asked for."""
        assert isinstance(module, RunModule)
        if module.cut:
            # The state in mid-epoch, so that a resumed run with more steps goes on as if it had not been cut.
            module.say(f"trainer.max_steps={module.step}: ended in epoch {module.epoch + 1}")
            self._save(trainer, module)
            trainer.should_stop = True
            self._stop_if_asked()
            return
        evaluation, module.evaluation = module.evaluation, None
        if self._ends_with_probe(module):
            self._log_probe(trainer, module, module.outputs if evaluation is not None else None)
        record: dict[str, Any] = {"kind": "epoch", "epoch": module.epoch + 1, "step": module.step}
        record["train_loss"] = module.loss_mean.value()
        record["seconds"] = round(time.perf_counter() - self._epoch_started, 3)
        gained = True
        if evaluation is not None:
            record["val"] = {name: estimate.value for name, estimate in evaluation.estimates.items()}
            # One process decides for all: other machines may round it otherwise.
            found = record["val"]
            value = ranks.from_first(lambda: float(found[module.system.monitor]))
            gained = module.best["value"] is None or value > module.best["value"]
            if gained:
                module.best = {"value": value, "epoch": module.epoch + 1, "epochs_without_gain": 0}
            else:
                module.best["epochs_without_gain"] += 1
        else:
            module.best["epoch"] = module.epoch + 1  # nothing to choose by: the last is the best
        self._log(trainer, record)
        module.say(epoch_line(record, module, self.config.epochs))
        module.end_epoch()
        self._save(trainer, module, best=gained)
        if module.exhausted:
            module.say(
                f"stopped early: {module.system.monitor} has not risen for {self.config.patience} epochs"
            )
            trainer.should_stop = True
        if module.steps_left == 0:
            trainer.should_stop = True
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        (asked,) = ranks.any_rank(self._asked)
        if asked:
            raise Interrupted(str(self.folder))

    def _save(self, trainer: L.Trainer, module: RunModule, best: bool = False) -> None:
        checkpoint = module.checkpoint()
        if trainer.is_global_zero:
            last = self.folder.checkpoints / "last.ckpt"
            if best:
                # The best first: killed in between, the run repeats the epoch and does not name a best it lacks.
                checkpoint.save(last.with_name("best.ckpt"))
                same_file(last.with_name("best.ckpt"), last)
            else:
                checkpoint.save(last)
            every = self.config.trainer.get("checkpoint_epochs")
            if every and module.batches == 0 and module.epoch % every == 0:
                same_file(last, epoch_path(self.folder.checkpoints, module.epoch))
        self._saved_at = time.monotonic()


def epoch_line(record: dict[str, Any], module: RunModule, epochs: int) -> str:
    """One line for the terminal."""
    parts = [f"epoch {record['epoch']}/{epochs}", f"loss {record.get('train_loss', float('nan')):.3f}"]
    for name, value in (record.get("val") or {}).items():
        if name == module.system.monitor or name.endswith("R@1"):
            parts.append(f"{name} {value:.3f}")
    parts.append(f"{record['seconds']:.0f} s")
    return "  ".join(parts)
