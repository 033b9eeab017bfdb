"""One run from configuration to results: prepare, train or resume, evaluate the best checkpoint, write what a run
folder holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

from nearfar.config.options import to_dict
from nearfar.config.training import RunOptions
from nearfar.data.files import Json, make_folder, remove_left_over, write_arrays
from nearfar.doctor import Diagnosis, diagnose
from nearfar.errors import NearfarError
from nearfar.training import ranks
from nearfar.training.checkpoint import Checkpoint, Resume, find_checkpoint
from nearfar.training.evaluation import evaluate, evaluate_start, gains, outputs_of
from nearfar.training.loop import Interrupted, StopRequest, TrainingLoop, Watch, stop_signals
from nearfar.training.recorder import Recorder
from nearfar.training.run_folder import RunFolder, environment
from nearfar.training.sections import write_sections
from nearfar.training.shared_step import check_shared
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import Evaluation, System, whole_rows

__all__ = ["fit", "project", "train", "write_diagnosis", "write_map", "write_metrics", "write_results"]


Say = Callable[[str], None]

#: rows on the map of embeddings; the first of the split, which is in no order of difficulty
MAP_ROWS = 300


def write_results(
    folder: RunFolder,
    system: System,
    results: dict[str, Evaluation],
    outputs: dict[str, dict[str, Tensor]],
    about: Json,
) -> None:
    """Examples, tables and map of the reported split, scores, and last the metrics.

    ``about`` stands in ``metrics.json`` beside the estimates and says how the model was trained.
    """
    split = "test" if "test" in outputs else "val"
    folder.write_json("examples.json", system.report_examples(outputs[split], split))
    write_sections(folder, system.report_sections(outputs[split], split))
    write_map(folder, outputs[split])
    system.save_results(folder.path)
    write_metrics(folder, system, results, about)


def write_diagnosis(folder: RunFolder, say: Say) -> Diagnosis:
    """``doctor.json``: what the finished run looks like to the doctor; what training changed, warnings and errors are
    said."""
    diagnosis = diagnose(folder.path)
    folder.write_json("doctor.json", diagnosis.to_dict())
    for line in [f"doctor: {diagnosis.lines[0]}", *diagnosis.lines[1:]]:
        say(line)
    return diagnosis


def write_metrics(folder: RunFolder, system: System, results: dict[str, Evaluation], about: Json) -> None:
    """``per_item.npz`` and then ``metrics.json``: a run that has its metrics is finished."""
    arrays: dict[str, np.ndarray] = {}
    for split, result in results.items():
        arrays[f"{split}/ids"] = np.asarray(list(result.ids), dtype=np.str_)
        for name, values in result.per_item.items():
            arrays[f"{split}/{name}"] = np.asarray(values, dtype=np.float32)
    facts = results["test" if "test" in results else "val"].facts
    write_arrays(folder.path / "per_item.npz", arrays, compressed=True)
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


def project(outputs: Mapping[str, Tensor], rows: int = MAP_ROWS) -> dict[str, np.ndarray] | None:
    """Coordinates (rows, 2) as ``view/NAME`` for every view in one common space, and the share of variance they hold.

    Views are the matrices of floats with as many columns and rows as the first; None where there is none. Rows are
    scaled to unit length, since losses see directions only. Components have the sign that makes their largest
    weight positive, so that the same embeddings give the same map.

    >>> arrays = project({"texts": torch.eye(6), "molecules": torch.eye(6).flip(0), "labels": torch.arange(6)})
    >>> sorted(arrays), arrays["view/texts"].shape
    (['explained', 'view/molecules', 'view/texts'], (6, 2))
    """
    matrices = {
        name: tensor for name, tensor in outputs.items() if tensor.ndim == 2 and tensor.is_floating_point()
    }
    if not matrices:
        return None
    shape = next(iter(matrices.values())).shape
    views = {name: tensor for name, tensor in matrices.items() if tensor.shape == shape}
    if min(shape) < 2:
        return None
    views = {name: tensor[:rows] for name, tensor in whole_rows(views).items()}
    if not views:
        return None
    units = {name: normalize(tensor.double().cpu(), dim=1) for name, tensor in views.items()}
    together = torch.cat(list(units.values()))
    if not bool(together.isfinite().all()):
        return None
    middle = together.mean(0)
    _, singular, components = torch.linalg.svd(together - middle, full_matrices=False)
    axes = components[:2]
    largest = axes.abs().argmax(1, keepdim=True)
    axes = axes * axes.gather(1, largest).sign()
    variance = float((singular**2).sum())
    explained = float((singular[:2] ** 2).sum()) / variance if variance > 0.0 else 1.0
    arrays = {
        f"view/{name}": ((unit - middle) @ axes.T).numpy().astype(np.float32) for name, unit in units.items()
    }
    return arrays | {"explained": np.float64(explained)}


def write_map(folder: RunFolder, outputs: Mapping[str, Tensor]) -> None:
    """``map.npz`` of a run, where its outputs hold embeddings."""
    arrays = project(outputs)
    if arrays is None:
        return
    write_arrays(folder.path / "map.npz", arrays, compressed=True)


def train(
    system: System,
    config: RunOptions,
    folder: RunFolder,
    request: StopRequest,
    resume: Resume | None = None,
    say: Say = print,
    console: Console | None = None,
    watch: Watch | None = None,
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
    loop = TrainingLoop(system, model, sampler, config, data_hash, recorder, request, checkpoint, say, watch)
    check_shared(system, model, loop.sharing)
    if resume is None:
        system.check_sampler(sampler, say)
    if line := loop.sharing.describe(config.batch_size):
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
    config: RunOptions,
    system: System,
    layout: Json,
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
    folder.write_text("config.yaml", OmegaConf.to_yaml(to_dict(config)))
    folder.write_json("environment.json", environment())
    folder.write_json("dataset_layout.json", layout)
    system.save_assets(folder.path)
    if resume is not None and checkpoint is not None:
        resume.carry_over(folder, checkpoint)
    else:
        folder.write_text("train_log.jsonl", "")


def fit(
    system: System,
    config: RunOptions,
    folder: RunFolder,
    resume: Resume | None = None,
    say: Say = print,
    console: Console | None = None,
    watch: Watch | None = None,
) -> RunFolder:
    """Train ``system`` (already prepared) into ``folder`` and evaluate its best checkpoint.

    Called on every process of those that train together (``nearfar.training.ranks.start``); they part after the last
    step, and the first alone evaluates. ``watch`` is told the monitored metric on validation after every epoch.

    Raises ``Interrupted`` after a Ctrl-C, with a checkpoint in place from which ``resume_from`` goes on.
    """
    devices = config.trainer.devices
    if isinstance(devices, int) and devices > 1 and ranks.count() == 1:
        raise NearfarError(
            f"trainer.devices={devices}, but this process is alone: nearfar train starts the others, or torchrun; or "
            "set trainer.devices=1."
        )
    with torch.random.fork_rng(), stop_signals() as request:
        loop = train(system, config, folder, request, resume, say, console, watch)
        model, state, seconds = loop.model, loop.state, loop.state.seconds()
        others = not ranks.is_first()
        del loop  # with its wrapper for DDP: see leave
        ranks.leave()
        if others:
            return folder
        results, outputs = {}, {}
        judged = config.trainer.evaluate_start
        starts = evaluate_start(system, config, lambda: request.stop, say) if judged else {}
        if request.stop:
            raise Interrupted(str(folder))
        best = find_checkpoint(folder.path, prefer="best")
        load_weights(model, Checkpoint.load(best), system, str(best))
        system.calibrate(lambda split: outputs_of(system, model, config, split), say)
        for split in ("val", "test"):
            evaluated = evaluate(system, model, config, split)
            if request.stop:
                raise Interrupted(str(folder))
            if evaluated is not None:
                results[split], outputs[split] = evaluated
    if not results:
        raise NearfarError("there is neither a validation nor a test split: nothing to evaluate on.")
    about: Json = {
        # Cut before its first epoch was over, a run is evaluated as it stands.
        "best_epoch": state.best["epoch"] or state.epoch + 1,
        "epochs": state.epoch,
        "steps": state.step,
        "train_seconds": round(seconds, 2),
        **gains(results, starts),
    }
    write_results(folder, system, results, outputs, about)
    write_diagnosis(folder, say)
    return folder
