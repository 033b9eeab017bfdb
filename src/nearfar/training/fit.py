"""One run from configuration to metrics: prepare, train (or resume), evaluate the best checkpoint."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from nearfar.doctor import Diagnosis, diagnose
from nearfar.errors import NearfarError
from nearfar.training import ranks
from nearfar.training.callbacks import Interrupted, RunRecorder, StopRequest, stop_signals
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.embedding_map import write_map
from nearfar.training.loggers import build_loggers
from nearfar.training.module import RunModule
from nearfar.training.progress import ProgressBar
from nearfar.training.resume import Resume
from nearfar.training.run_folder import RunFolder, environment, write_atomically
from nearfar.training.sections import write_sections
from nearfar.training.shared_step import check_shared
from nearfar.training.system import Evaluation, System, hook

__all__ = [
    "evaluate",
    "fit",
    "initial_model",
    "load_weights",
    "outputs_of",
    "quiet_lightning",
    "train",
    "write_diagnosis",
    "write_results",
]

Say = Callable[[str], None]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's banners and its advice on loader workers do not concern a run that is set up here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # frozen parts are
        warnings.filterwarnings("ignore", message=".*Total length of `list`.*")  # no validation
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen parts
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def initial_model(system: System, seed: int) -> nn.Module:
    """The model as ``seed`` initialises it; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return system.build_model()


def _trainer(config: Any, folder: RunFolder, callbacks: list[L.Callback], epochs: int) -> L.Trainer:
    settings = config.trainer
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # On a GPU some scatter kernels have no deterministic form: that is worth a warning and not the end of the run.
    on_gpu = torch.cuda.is_available() and settings.accelerator != "cpu"
    deterministic: Any = ("warn" if on_gpu else True) if settings.deterministic else False
    here = ranks.on_this_machine()
    return L.Trainer(
        default_root_dir=folder.path,
        max_epochs=epochs,
        accelerator=settings.accelerator,
        devices=here,
        num_nodes=ranks.count() // here,
        **_together(),
        precision=settings.precision,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip or None,
        deterministic=deterministic,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=(ranks.is_first() and build_loggers(config.logger, folder.path, folder.name)) or False,
        callbacks=callbacks,
    )


def _together() -> dict[str, Any]:
    """How Lightning trains in several processes, which are there already, or in one, whatever Slurm may have set."""
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    if ranks.count() == 1:
        return {"plugins": [LightningEnvironment()]}
    from lightning.pytorch.strategies import DDPStrategy

    # A weight may have no part in a step, as where a term of the loss is switched off. Buffers are the same on all
    # ranks: a memory gets the rows of all, and statistics of a batch are refused.
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    return {"strategy": strategy, "plugins": [TorchElasticEnvironment()]}


def load_weights(model: nn.Module, checkpoint: Checkpoint, system: System, origin: str) -> None:
    """The weights of a checkpoint into ``model``; says so where they belong to another system or model."""
    if checkpoint.system != system.name:
        raise NearfarError(
            f"{origin}: weights of system '{checkpoint.system}' cannot start a run of '{system.name}'."
        )
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NearfarError(
            f"{origin}: the weights do not fit this model ({first}). "
            "Use the same encoder, layers and text encoder as that run (its config.yaml shows them)."
        ) from None


def train(
    system: System,
    config: Any,
    folder: RunFolder,
    request: StopRequest,
    resume: Resume | None = None,
    say: Say = print,
    console: Console | None = None,
) -> RunModule:
    """The training of ``fit`` alone: what comes back holds the weights of the last step.

    Called within ``quiet_lightning()``, a fork of the generators and ``stop_signals()``, which gives ``request``.
    """
    layout = system.layout()
    data_hash = layout["data_hash"]
    sampler = system.build_sampler()
    model = initial_model(system, config.seed)
    checkpoint = None
    if resume is not None:
        checkpoint = resume.checkpoint_for(system.name, data_hash, config)
        load_weights(model, checkpoint, system, str(resume.path))
    elif config.init_from:
        path = find_checkpoint(config.init_from, prefer="best")
        load_weights(model, Checkpoint.load(path), system, str(path))
        say(f"weights from {path}")

    module = RunModule(system, model, sampler, config, data_hash, checkpoint, say)
    check_shared(system, model, module.sharing)
    if resume is None:
        system.check_sampler(sampler, say)
    if told := module.sharing.describe(config.get("batch_size")):
        say(told)
    ranks.any_rank()  # all have read what they go on from
    if ranks.is_first():
        _begin(folder, config, system, layout, resume, checkpoint)
    if checkpoint is not None:
        say(f"resumed at epoch {checkpoint.epoch + 1}, step {checkpoint.step}, from {resume and resume.path}")
        if checkpoint.processes != ranks.count():
            say(
                f"that run had {checkpoint.processes} process(es), this one has {ranks.count()}: batches, schedules "
                "and optimiser go on, dropout draws something else and sums are rounded otherwise"
            )
    callbacks: list[L.Callback] = [RunRecorder(folder, config, request)]
    if console is not None:
        callbacks.append(ProgressBar(console))
    epochs_left = config.epochs - module.epoch
    over = _over(module)
    if over is None:
        _trainer(config, folder, callbacks, epochs_left).fit(module)
    elif checkpoint is not None:
        say(f"{over[0]}; evaluating (raise {over[1]}= to go on)")
    return module


def _begin(
    folder: RunFolder,
    config: Any,
    system: System,
    layout: dict[str, Any],
    resume: Resume | None,
    checkpoint: Checkpoint | None,
) -> None:
    """Everything that stands in a run folder before the first step."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if resume is None:
        folder.clear()
    folder.write_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
    folder.write_json("environment.json", environment())
    folder.write_json("dataset_layout.json", layout)
    system.save_assets(folder.path)
    if resume is not None and checkpoint is not None:
        resume.carry_over(folder, checkpoint)
    else:
        folder.write_text("train_log.jsonl", "")


def _over(module: RunModule) -> tuple[str, str] | None:
    """Why there is nothing left to train, and the option that would let it go on."""
    if module.exhausted:
        return "stopped early", "patience"
    if module.epoch >= module.config.epochs:
        return f"all {module.config.epochs} epochs are done", "epochs"
    if module.steps_left == 0:
        return f"all {module.step} steps are done", "trainer.max_steps"
    return None


def fit(
    system: System,
    config: Any,
    folder: RunFolder,
    resume: Resume | None = None,
    say: Say = print,
    console: Console | None = None,
) -> RunFolder:
    """Train ``system`` (already prepared) into ``folder`` and evaluate its best checkpoint.

    Called on every process of those that train together (``nearfar.training.ranks.start``); they part after the last
    step, and the first alone evaluates.

    Raises ``Interrupted`` after a Ctrl-C, with a checkpoint in place from which ``resume_from`` goes on.
    """
    devices = config.trainer.devices
    if isinstance(devices, int) and devices > 1 and ranks.count() == 1:
        raise NearfarError(
            f"trainer.devices={devices}, but this process is alone: nearfar train starts the others, or torchrun; or "
            "set trainer.devices=1."
        )
    with quiet_lightning(), torch.random.fork_rng(), stop_signals() as request:
        module = train(system, config, folder, request, resume, say, console)
        seconds = module.seconds()
        others = not ranks.is_first()
        ranks.leave()
        if others:
            return folder
        results, outputs = {}, {}
        best = find_checkpoint(folder.path, prefer="best")
        load_weights(module.model, Checkpoint.load(best), system, str(best))
        if calibrate := hook(system, "calibrate"):
            calibrate(lambda split: outputs_of(system, module.model, config, folder, split), say)
        for split in ("val", "test"):
            found = evaluate(system, module.model, config, folder, split)
            if request.asked:
                raise Interrupted(str(folder))
            if found is not None:
                results[split], outputs[split] = found
    if not results:
        raise NearfarError("there is neither a validation nor a test split: nothing to evaluate on.")
    about = {
        # Cut before its first epoch was over, a run is evaluated as it stands.
        "best_epoch": module.best["epoch"] or module.epoch + 1,
        "epochs": module.epoch,
        "steps": module.step,
        "train_seconds": round(seconds, 2),
    }
    write_results(folder, system, results, outputs, about)
    write_diagnosis(folder, say)
    return folder


def write_results(
    folder: RunFolder,
    system: System,
    results: dict[str, Evaluation],
    outputs: dict[str, dict[str, torch.Tensor]],
    about: dict[str, Any],
) -> None:
    """What came of the evaluation: examples, tables and map of the reported split, scores, and last the metrics.

    ``about`` stands in ``metrics.json`` beside the estimates and says how the model came about.
    """
    split = "test" if "test" in outputs else "val"
    folder.write_json("examples.json", system.report_examples(outputs[split], split))
    sections = hook(system, "report_sections")
    write_sections(folder, sections(outputs[split], split) if sections else ())
    write_map(folder, outputs[split])
    if save_results := hook(system, "save_results"):
        save_results(folder.path)
    write_metrics(folder, system, results, about)


def outputs_of(
    system: System, model: nn.Module, config: Any, folder: RunFolder, split: str
) -> dict[str, torch.Tensor]:
    """What ``system.embed`` gives of a split's rows, in order."""
    shell = RunModule(system, model, None, config, "")
    shell.evaluation_split = split
    with quiet_lightning():
        trainer = _trainer(OmegaConf.merge(config, {"logger": None}), folder, [], 1)
        trainer.test(shell, dataloaders=shell.evaluation_loader(split), verbose=False)
    return shell.outputs


def evaluate(
    system: System, model: nn.Module, config: Any, folder: RunFolder, split: str
) -> tuple[Evaluation, dict[str, torch.Tensor]] | None:
    """Estimates, with intervals, of one split; None where the system has no such split."""
    if system.dataset(split) is None:
        return None
    outputs = outputs_of(system, model, config, folder, split)
    return system.evaluate(outputs, split, final=True), outputs


def write_diagnosis(folder: RunFolder, say: Say) -> Diagnosis:
    """``doctor.json``: what the finished run looks like to the doctor; warnings and errors are said."""
    found = diagnose(folder.path)
    folder.write_json("doctor.json", found.to_dict())
    say(f"doctor: {found.verdict}")
    for finding in found.of("error", "warning"):
        say(f"  {finding}")
    return found


def write_metrics(
    folder: RunFolder, system: System, results: dict[str, Evaluation], about: dict[str, Any]
) -> None:
    """``per_item.npz`` and then ``metrics.json``: a run that has its metrics is finished."""
    arrays: dict[str, np.ndarray] = {}
    for split, result in results.items():
        arrays[f"{split}/ids"] = np.asarray(list(result.ids), dtype=np.str_)
        for name, values in result.per_item.items():
            arrays[f"{split}/{name}"] = np.asarray(values, dtype=np.float32)
    facts = results["test" if "test" in results else "val"].facts
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub wants allow_pickle first
    write_atomically(folder.path / "per_item.npz", lambda file: file.write(buffer.getvalue()))
    folder.write_json(
        "metrics.json",
        dict(facts)
        | {
            "system": system.name,
            "monitor": system.monitor,
            **about,
            "splits": {
                split: {name: estimate.to_dict() for name, estimate in result.estimates.items()}
                for split, result in results.items()
            },
        },
    )
