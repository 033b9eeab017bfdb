"""transformers: a callback of its ``Trainer`` that watches a run and ends with the doctor's verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nearfar.data.files import Json
from nearfar.doctor import Diagnosis
from nearfar.doctor.logs.names import map_names
from nearfar.errors import NearfarError
from nearfar.integrations.pytorch import Monitor, Scores
from nearfar.metrics import Estimate

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:  # pragma: no cover - where the library is installed
    raise NearfarError(
        "nearfar.integrations.transformers needs transformers and accelerate: pip install 'nearfar[transformers]'"
    ) from error

__all__ = ["WatchCallback"]

#: what of the training arguments goes into the configuration of a run
_ARGUMENTS = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "world_size": "world_size",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
}
#: the loss's own weights in a checkpoint folder of the trainer, which saves the model's alone
LOSS_FILE = "nearfar_loss.pt"


class WatchCallback(TrainerCallback):
    """Writes a run folder that ``nearfar doctor``, ``compare`` and ``report`` read, beside what the trainer writes.

    Before the first step the score is taken and the probe looked at; every log of the trainer becomes a record; every
    evaluation (where the trainer makes none, every epoch) is one of validation with a look at the probe. At the end
    stand the final scores beside those before training, and the doctor's verdict, printed.

    Args:
        folder: where the run is written; not a folder that holds anything else.
        probe: a function of the model that gives the embeddings of fixed rows, (rows, d), or one for each view in a
            dictionary. None: embeddings are not watched.
        evaluate: a function of the model that gives `Scores`, or a mapping of metrics to estimates or numbers, of the
            rows of validation. None: the metrics that the trainer evaluates; the score before training is then not
            known unless it evaluates at the start (``eval_on_start=True``).
        loss: a module with a ``record`` (the losses of nearfar) or weights of its own, where the trainer has one;
            what it learns goes into the trainer's checkpoints, and back when training is resumed.
        monitor: the metric that matters; None: the trainer's ``metric_for_best_model``, otherwise the first.
        config: what else is to be known of the run, by which arms are told apart.
        quiet: do not print the verdict; it is in ``diagnosis``.

    A run that is resumed goes on in the same folder. Only the main process writes.
    """

    def __init__(
        self,
        folder: str | Path = "runs/watched",
        *,
        probe: Callable[[Any], object] | None = None,
        evaluate: Callable[[Any], Scores | Mapping[str, Estimate | float]] | None = None,
        loss: nn.Module | None = None,
        monitor: str | None = None,
        config: Mapping[str, object] | None = None,
        quiet: bool = False,
    ) -> None:
        self.folder, self.probe, self.evaluate, self.loss = Path(folder), probe, evaluate, loss
        self.monitor, self.config, self.quiet = monitor, dict(config or {}), quiet
        self.watch: Monitor | None = None
        self.diagnosis: Diagnosis | None = None
        self._evaluated = -1
        self._metrics: Scores | None = None

    # -- what the trainer calls -----------------------------------------------------------------------------------
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        step = int(state.global_step)
        if step:
            self._load_loss(Path(str(args.output_dir)) / f"checkpoint-{step}", args)
        if not state.is_world_process_zero:
            return
        model = kwargs.get("model")
        if not isinstance(model, nn.Module):
            raise NearfarError("the trainer names no model to its callbacks: WatchCallback cannot watch it.")
        evaluate = self.evaluate
        self.watch = Monitor(
            model,
            self.probe,
            self.folder,
            evaluate=None if evaluate is None else lambda: Scores.of(evaluate(model)),
            config=self._configuration(args),
            seed=int(args.seed),
            monitor=self.monitor,
            resume=step,
        )
        self._evaluated, self._metrics = -1, None
        if not step:
            self.watch.start()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.watch is None:
            return
        # so that every log follows a look of its own step, and a run that logs seldom is looked at all the same
        every = min(int(state.logging_steps) or self.watch.log_every, self.watch.log_every)
        if (int(state.global_step) + 1) % every == 0:
            self.watch.look_at_weights()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if self.watch is None or not logs or "train_runtime" in logs:  # the last is a mean over the whole run
            return
        used = map_names(logs).used
        fields = {
            name: float(logs[used[name]])
            for name in ("loss", "lr", "gradient_norm")
            if name in used and _is_number(logs[used[name]])
        }
        if "loss" in fields:
            record = getattr(self.loss, "record", None)
            self.watch.log(int(state.global_step), record=record, **fields)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        step = int(state.global_step)
        if self.watch is None or not metrics or self._evaluated == step:
            return
        used = map_names(metrics, validation=True).used
        theirs = {
            field[4:]: float(metrics[name])
            for field, name in used.items()
            if field.startswith("val/") and _is_number(metrics[name])
        }
        scores = self._latest(step)
        if scores is None and self.evaluate is None and theirs:
            scores = Scores(theirs)
        loss = {"val_loss": float(metrics[used["val_loss"]])} if "val_loss" in used else {}
        self._evaluated = step
        self.watch.steps = step
        if step == 0:  # evaluated at the start: the score before training
            if self.watch.before is None and scores is not None:
                self.watch.before = scores
            return
        if self.watch.evaluate is not None and scores is None:
            scores = self.watch.scores()
        self._metrics = scores
        self.watch.epoch(scores, **loss)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.watch is None or _value(args.eval_strategy) != "no":
            return
        step = int(state.global_step)
        self.watch.steps, self._evaluated = step, step
        scores = None if self.watch.evaluate is None else self.watch.scores()
        self._metrics = scores
        self.watch.epoch(scores)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        weights = self._own_weights()
        folder = Path(str(args.output_dir)) / f"checkpoint-{int(state.global_step)}"
        if weights and state.is_world_process_zero and folder.is_dir():
            torch.save({name: each.detach().cpu() for name, each in weights.items()}, folder / LOSS_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.watch is None:
            return
        watch, step = self.watch, int(state.global_step)
        # The trainer may have loaded its best model by now: then the scores of the last step are not this model's.
        same = self._evaluated == step and not args.load_best_model_at_end
        scores = self._metrics if same or watch.evaluate is None else watch.scores()
        self.diagnosis = watch.finish(scores)
        if not self.quiet:
            print(f"{self.folder}: " + "\n".join(self.diagnosis.lines))

    # -- parts ---------------------------------------------------------------------------------------------------
    def _latest(self, step: int) -> Scores | None:
        """Scores of the rows of validation that are known at this step already."""
        return None

    def _about(self) -> Json:
        """What else is to be known of the run."""
        return {}

    def _configuration(self, args: TrainingArguments) -> Json:
        config: Json = {
            ours: _value(getattr(args, theirs))
            for theirs, ours in _ARGUMENTS.items()
            if getattr(args, theirs, None) is not None
        }
        half = "bf16-mixed" if args.bf16 else "16-mixed" if args.fp16 else "32-true"
        config["precision"] = half
        if self.loss is not None:
            given: Callable[[], Json] = getattr(self.loss, "get_config_dict", dict)
            options = given()
            config["loss"] = type(self.loss).__name__
            config |= {
                n: v for n, v in options.items() if v is None or isinstance(v, (bool, int, float, str))
            }
        return config | self._about() | self.config

    def _own_weights(self) -> dict[str, torch.Tensor]:
        """What the loss learns beside the model."""
        if self.loss is None:
            return {}
        model = {id(each) for each in getattr(self.loss, "model", nn.Module()).parameters()}
        return {name: each for name, each in self.loss.named_parameters() if id(each) not in model}

    def _load_loss(self, folder: Path, args: TrainingArguments) -> None:
        weights = self._own_weights()
        if not weights:
            return
        given = getattr(args, "resume_from_checkpoint", None)
        places = [folder, *([Path(given)] if isinstance(given, str) else [])]
        path = next((place / LOSS_FILE for place in places if (place / LOSS_FILE).is_file()), None)
        if path is None:
            raise NearfarError(
                f"{folder} holds no {LOSS_FILE}, from which {', '.join(weights)} of the loss would go on: the run was "
                "begun without this callback. Set them by hand and leave loss= out, or begin anew."
            )
        saved = torch.load(path, weights_only=True, map_location="cpu")
        if set(saved) != set(weights):
            raise NearfarError(f"{path} holds {sorted(saved)}, and the loss learns {sorted(weights)}.")
        with torch.no_grad():
            for name, each in weights.items():
                each.copy_(saved[name])


def _value(given: object) -> object:
    return getattr(given, "value", given)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
