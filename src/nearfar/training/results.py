"""What comes of a run: a split's outputs and estimates, and the files that hold them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from nearfar.doctor import Diagnosis, diagnose
from nearfar.training.embedding_map import write_map
from nearfar.training.lightning_trainer import build_trainer, quiet_lightning
from nearfar.training.module import RunModule
from nearfar.training.run_folder import RunFolder, write_atomically
from nearfar.training.sections import write_sections
from nearfar.training.system import Evaluation, System, hook

__all__ = ["evaluate", "outputs_of", "write_diagnosis", "write_metrics", "write_results"]

Say = Callable[[str], None]


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
        trainer = build_trainer(OmegaConf.merge(config, {"logger": None}), folder, [], 1)
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
