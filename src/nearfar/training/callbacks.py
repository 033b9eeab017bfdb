"""What happens around the steps: the log, checkpoints, early stopping, a clean stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L

from nearfar.training.module import RunModule
from nearfar.training.run_folder import RunFolder, same_file

__all__ = ["Interrupted", "RunRecorder", "StopRequest", "stop_signals"]


class Interrupted(Exception):
    """Training was asked to stop and has written a checkpoint from which it resumes exactly."""


class StopRequest:
    """Set by the first Ctrl-C (or SIGTERM); the run stops after the current step."""

    asked = False


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

    def ask(number: int, frame: Any) -> None:
        if request.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunRecorder(L.Callback):
    """Writes ``train_log.jsonl`` and the checkpoints of a run, and stops it early.

    ``checkpoints/last.ckpt`` is the newest state (every ``checkpoint_minutes``, at each epoch's end, and when the
    run is asked to stop), ``checkpoints/best.ckpt`` the best by validation. Both names are stable; older ones
    are replaced.
    """

    def __init__(self, folder: RunFolder, config: Any, request: StopRequest) -> None:
        self.folder, self.config, self.request = folder, config, request
        self._saved_at = time.monotonic()
        self._epoch_started = time.perf_counter()
        self._last_logged: tuple[int, float] | None = None

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
        """Count and log the step; save if it is time or if somebody asked to stop."""
        assert isinstance(module, RunModule)
        module.count_batch()
        every = self.config.trainer.log_every
        if module.at_boundary and module.step % every == 0:
            now = time.perf_counter()
            record = {
                "kind": "step",
                "epoch": module.epoch + 1,
                "step": module.step,
                "batch": module.batches,
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "loss": module.last.loss.item(),
                **module.last.logs(),
            }
            if self._last_logged and module.step > self._last_logged[0]:
                seconds = (now - self._last_logged[1]) / (module.step - self._last_logged[0])
                record["seconds_per_step"] = round(seconds, 6)
            self._last_logged = (module.step, now)
            self._log(trainer, record)
        last = module.batches == module.epoch_batches
        due = time.monotonic() - self._saved_at > 60 * self.config.trainer.checkpoint_minutes
        steps = self.config.trainer.checkpoint_steps
        due = due or bool(steps and module.step % steps == 0)
        # After the last batch of an epoch the epoch's own checkpoint follows, with its validation done.
        if (self.request.asked or due) and module.at_boundary and not last:
            self._save(trainer, module)
            if self.request.asked:
                raise Interrupted(str(self.folder))

    # -- epochs ----------------------------------------------------------------------------------------------
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the epoch, remember the best, save, and stop early where that was asked for."""
        assert isinstance(module, RunModule)
        if module.cut:
            # The state in mid-epoch, so that a resumed run with more steps goes on as if it had not been cut.
            module.say(f"trainer.max_steps={module.step}: ended in epoch {module.epoch + 1}")
            self._save(trainer, module)
            trainer.should_stop = True
            if self.request.asked:
                raise Interrupted(str(self.folder))
            return
        evaluation, module.evaluation = module.evaluation, None
        record: dict[str, Any] = {"kind": "epoch", "epoch": module.epoch + 1, "step": module.step}
        record["train_loss"] = module.loss_mean.value()
        record["seconds"] = round(time.perf_counter() - self._epoch_started, 3)
        gained = True
        if evaluation is not None:
            record["val"] = {name: estimate.value for name, estimate in evaluation.estimates.items()}
            value = record["val"][module.system.monitor]
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
        if self.request.asked:
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
        self._saved_at = time.monotonic()


def epoch_line(record: dict[str, Any], module: RunModule, epochs: int) -> str:
    """One line for the terminal."""
    parts = [f"epoch {record['epoch']}/{epochs}", f"loss {record.get('train_loss', float('nan')):.3f}"]
    for name, value in (record.get("val") or {}).items():
        if name == module.system.monitor or name.endswith("R@1"):
            parts.append(f"{name} {value:.3f}")
    parts.append(f"{record['seconds']:.0f} s")
    return "  ".join(parts)
