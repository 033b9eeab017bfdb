"""One run from configuration to metrics: prepare, train (or resume), evaluate the best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from nearfar.errors import NearfarError
from nearfar.training import ranks
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.evaluation import evaluate, outputs_of
from nearfar.training.loop import Interrupted, StopRequest, TrainingLoop, stop_signals
from nearfar.training.recorder import Recorder
from nearfar.training.results import write_diagnosis, write_results
from nearfar.training.resume import Resume
from nearfar.training.run_folder import RunFolder, environment, make_folder, remove_left_over
from nearfar.training.shared_step import check_shared
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import System

__all__ = ["fit", "train"]

Say = Callable[[str], None]


def train(
    system: System,
    config: Any,
    folder: RunFolder,
    request: StopRequest,
    resume: Resume | None = None,
    say: Say = print,
    console: Console | None = None,
) -> TrainingLoop:
    """The training of ``fit`` alone: the loop that is returned holds the weights and the state of the last step.

    Called within a fork of the generators and ``stop_signals()``, which gives ``request``.
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

    recorder = Recorder(folder, config, console)
    loop = TrainingLoop(system, model, sampler, config, data_hash, recorder, request, checkpoint, say)
    check_shared(system, model, loop.sharing)
    if resume is None:
        system.check_sampler(sampler, say)
    if line := loop.sharing.describe(config.get("batch_size")):
        say(line)
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
    over = loop.finished
    if over is None:
        loop.run()
    elif checkpoint is not None:
        say(f"{over[0]}; evaluating (raise {over[1]}= to go on)")
    return loop


def _begin(
    folder: RunFolder,
    config: Any,
    system: System,
    layout: dict[str, Any],
    resume: Resume | None,
    checkpoint: Checkpoint | None,
) -> None:
    """Everything that stands in a run folder before the first step."""
    make_folder(folder.path)
    if resume is None:
        folder.clear()
    else:
        folder.check_own()
        remove_left_over(folder.path)
        remove_left_over(folder.checkpoints)
    folder.write_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
    folder.write_json("environment.json", environment())
    folder.write_json("dataset_layout.json", layout)
    system.save_assets(folder.path)
    if resume is not None and checkpoint is not None:
        resume.carry_over(folder, checkpoint)
    else:
        folder.write_text("train_log.jsonl", "")


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
    with torch.random.fork_rng(), stop_signals() as request:
        loop = train(system, config, folder, request, resume, say, console)
        model, state, seconds = loop.model, loop.state, loop.state.seconds()
        others = not ranks.is_first()
        ranks.leave()
        if others:
            return folder
        results, outputs = {}, {}
        best = find_checkpoint(folder.path, prefer="best")
        load_weights(model, Checkpoint.load(best), system, str(best))
        system.calibrate(lambda split: outputs_of(system, model, config, split), say)
        for split in ("val", "test"):
            evaluated = evaluate(system, model, config, split)
            if request.asked:
                raise Interrupted(str(folder))
            if evaluated is not None:
                results[split], outputs[split] = evaluated
    if not results:
        raise NearfarError("there is neither a validation nor a test split: nothing to evaluate on.")
    about = {
        # Cut before its first epoch was over, a run is evaluated as it stands.
        "best_epoch": state.best["epoch"] or state.epoch + 1,
        "epochs": state.epoch,
        "steps": state.step,
        "train_seconds": round(seconds, 2),
    }
    write_results(folder, system, results, outputs, about)
    write_diagnosis(folder, say)
    return folder
