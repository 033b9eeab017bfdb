"""A progress bar that knows the run's epochs and not only those of this process."""

from __future__ import annotations

from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nearfar.training.module import RunModule

__all__ = ["ProgressBar"]


class ProgressBar(L.Callback):
    """One bar per epoch, gone when the epoch is over (its line stays). Silent where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task: Any = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the bar, at the batch where a resumed epoch goes on."""
        assert isinstance(module, RunModule)
        if not (self.console.is_terminal and trainer.is_global_zero):
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
            console=self.console,
            transient=True,
        )
        description = f"epoch {module.epoch + 1}/{module.config.epochs}"
        self.task = self.progress.add_task(
            description, total=module.epoch_batches, completed=module.batches, loss="…"
        )
        self.progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one batch."""
        assert isinstance(module, RunModule)
        if self.progress is not None:
            self.progress.update(self.task, advance=1)
            if batch_idx % 10 == 0:
                self.progress.update(self.task, loss=f"{module.last.loss.item():.3f}")

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The bar makes room for the epoch's line."""
        self.close()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The same where there is no validation split."""
        self.close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal clean."""
        self.close()

    def close(self) -> None:
        """Stop the bar if it runs."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
