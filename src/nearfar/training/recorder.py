"""What a run writes while it trains: ``train_log.jsonl``, ``model.json``, optional loggers, lines, a progress bar."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nearfar.config.training import LOGGERS, RunOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.projection import Dropout
from nearfar.training import ranks
from nearfar.training.probe import Probe
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import modules_of

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from nearfar.training.loop import TrainingLoop

__all__ = ["Recorder", "build_loggers", "highest_scale", "model_facts"]


class Recorder:
    """The log of a run. Used as a context, so that loggers and progress bar are closed whatever ends the run."""

    def __init__(self, folder: RunFolder, config: RunOptions, console: Console | None = None) -> None:
        self.folder, self.config, self.console = folder, config, console
        self.loggers: list[Logger] = []
        self._probe: Probe | None = None
        self._scale_max: dict[str, float] = {}
        self._epoch_started = time.perf_counter()
        self._last_logged: tuple[int, float] | None = None  # step and time
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._close_bar()
        for logger in self.loggers:
            logger.finalize("success" if kind is None else "failed")

    # -- what is logged ----------------------------------------------------------------------------------------
    def log(self, record: Json) -> None:
        """Append a record to the log, and hand its numbers to the loggers; the first process alone writes."""
        if not ranks.is_first():
            return
        self.folder.append(record)
        flat = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in ("step",)}
        flat |= {f"val/{k}": v for k, v in (record.get("val") or {}).items()}
        flat = {f"{record['kind']}/{k}": v for k, v in flat.items()}
        for logger in self.loggers:
            logger.log_metrics(flat, step=record["step"])

    def start(self, loop: TrainingLoop) -> None:
        """Choose the rows of the probe, and write what the model is made of."""
        config = self.config
        if ranks.is_first():
            self.loggers = build_loggers(config.logger, self.folder)
        facts = model_facts(loop.model, loop.system)
        if config.trainer.probe_rows:
            size = int(config.batch_size or config.trainer.probe_rows)
            self._probe = Probe(loop.system, config.trainer.probe_rows, size, config.seed)
            with loop.fabric.autocast():
                facts["views"] = self._probe.views(loop.model, loop.to_device)
        self._scale_max = {key: facts[key] for key in ("scale_max",) if key in facts}
        if ranks.is_first():
            self.folder.write_json("model.json", facts | {"world_size": ranks.count()})

    def epoch_started(self, loop: TrainingLoop) -> None:
        """Write what the sampler promises for an epoch, before its first step."""
        state = loop.state
        self._epoch_started = time.perf_counter()
        self._last_logged = (state.step, self._epoch_started)
        if state.batches == 0:
            self.log({"kind": "plan", "epoch": state.epoch + 1, "step": state.step} | loop.epoch_logs)
        self._open_bar(loop)

    def log_step(self, loop: TrainingLoop) -> None:
        """A ``step`` record of the step just done."""
        now, state = time.perf_counter(), loop.state
        own = loop.sharing.rows_of(loop.rows, ranks.rank())
        record = {
            "kind": "step",
            "epoch": state.epoch + 1,
            "step": state.step,
            "batch": state.batches,
            "rows": own if loop.sharing.describes_own_rows else loop.rows,
            "lr": loop.optimizer.param_groups[0]["lr"],
            "loss": loop.last.loss.item(),
            **loop.gradient_logs,
            **self._scale_max,
            **loop.last.logs(),
        }
        if ranks.count() > 1:
            record |= {"world_size": ranks.count(), "rows_per_rank": own}
        if loop.gradient_norm is not None:
            norm, clip = loop.gradient_norm.item(), self.config.trainer.gradient_clip
            record |= {"gradient_norm": norm, "clipped": clip is not None and 0 < clip < norm}
        if self._last_logged and state.step > self._last_logged[0]:
            seconds = (now - self._last_logged[1]) / (state.step - self._last_logged[0])
            record["seconds_per_step"] = round(seconds, 6)
        self._last_logged = (state.step, now)
        self.log(record)

    def log_probe(self, loop: TrainingLoop, validated: dict[str, Tensor] | None = None) -> None:
        """A ``probe`` record; ``validated`` are outputs of the validation split under these very weights."""
        if self._probe is None:
            return
        started, state = time.perf_counter(), loop.state
        with loop.fabric.autocast():
            fields = self._probe.record(loop.model, loop.to_device, validated)
        seconds = time.perf_counter() - started
        record = {"kind": "probe", "epoch": state.epoch + 1, "step": state.step, **fields}
        self.log(record | {"seconds": round(seconds, 6)})
        if self._last_logged:  # no time of a step
            self._last_logged = (self._last_logged[0], self._last_logged[1] + seconds)

    def log_epoch(self, loop: TrainingLoop, values: dict[str, float] | None) -> None:
        """An ``epoch`` record, with the validation ``values`` if there are any, and its line in the terminal."""
        self._close_bar()
        state = loop.state
        record: Json = {"kind": "epoch", "epoch": state.epoch + 1, "step": state.step}
        record["train_loss"] = state.loss_mean.value()
        record["seconds"] = round(time.perf_counter() - self._epoch_started, 3)
        if values is not None:
            record["val"] = values
        self.log(record)
        parts = [f"epoch {record['epoch']}/{self.config.epochs}", f"loss {record['train_loss']:.3f}"]
        for name, value in (values or {}).items():
            if name == loop.system.monitor or name.endswith("R@1"):
                parts.append(f"{name} {value:.3f}")
        parts.append(f"{record['seconds']:.0f} s")
        loop.say("  ".join(parts))

    # -- the progress bar --------------------------------------------------------------------------------------
    def _open_bar(self, loop: TrainingLoop) -> None:
        """One bar per epoch, gone when the epoch is over (its line stays). None where there is no terminal."""
        if self.console is None or not (self.console.is_terminal and ranks.is_first()):
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(
            f"epoch {loop.state.epoch + 1}/{self.config.epochs}",
            total=loop.epoch_batches,
            completed=loop.state.batches,
            loss="…",
        )
        self._bar.start()

    def batch_done(self, loop: TrainingLoop) -> None:
        """Advance the bar by one batch."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1)
            if loop.state.batches % 10 == 1:
                self._bar.update(self._task, loss=f"{loop.last.loss.item():.3f}")

    def validation_started(self) -> None:
        """The bar makes room for the epoch's line."""
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def build_loggers(names: str | list[str] | None, folder: RunFolder) -> list[Logger]:
    """Lightning's loggers by name: ``tensorboard``, ``mlflow``, ``wandb``; they write below the run folder.

    Each is imported only when it is asked for. W&B writes there too, offline; ``wandb sync`` uploads it.
    """
    if not names:
        return []
    names = [names] if isinstance(names, str) else list(names)
    built: list[Logger] = []
    for name in names:
        if name not in LOGGERS:
            raise NearfarError(f"logger={name}: there is no such logger; {nearest_name(name, LOGGERS)}")
        try:
            if name == "tensorboard":
                from lightning.pytorch.loggers import TensorBoardLogger

                built.append(TensorBoardLogger(save_dir=folder.path, name=None, version="tensorboard"))
            elif name == "mlflow":
                from lightning.pytorch.loggers import MLFlowLogger

                uri = f"file:{folder.path / 'mlflow'}"
                built.append(MLFlowLogger("nearfar", run_name=folder.name, tracking_uri=uri))
            else:
                from lightning.pytorch.loggers import WandbLogger

                built.append(
                    WandbLogger(name=folder.name, project="nearfar", save_dir=folder.path, offline=True)
                )
        except ImportError as error:
            # Lightning raises ModuleNotFoundError, an ImportError, for a missing package.
            raise NearfarError(
                f"logger={name} needs a package that is not installed ({error}). "
                "Install it with: pip install 'nearfar[loggers]'"
            ) from None
    return built


def model_facts(model: nn.Module, system: object = None) -> Json:
    """Counts that say how a model may behave in training, for those who look at the run later.

    ``parameters`` and ``trained_parameters``; ``batchnorm``: layers that normalise by the statistics of the batch
    (in training mode); ``dropout``: the largest probability of a dropout layer, 0 without one; ``scale_max``, see
    `highest_scale`, where there is one.

    >>> model_facts(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.1)))
    {'parameters': 15, 'trained_parameters': 15, 'batchnorm': 1, 'dropout': 0.1}
    """
    modules = list(model.modules())
    facts: Json = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "batchnorm": sum(isinstance(m, _BatchNorm) and m.training for m in modules),
        "dropout": max((m.p for m in modules if isinstance(m, _DropoutNd | Dropout)), default=0.0),
    }
    highest = highest_scale(model, system)
    return facts if highest is None else facts | {"scale_max": highest}


def highest_scale(model: nn.Module, system: object = None) -> float | None:
    """The clamp of the scale: ``max_scale`` of a module of the model or of one of the system's own (its losses)."""
    values: list[object] = [getattr(module, "max_scale", None) for module in modules_of(model, system)]
    return min((float(value) for value in values if isinstance(value, (int, float))), default=None)
