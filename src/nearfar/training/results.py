"""The results of a run: the files that hold its estimates, scores, examples, map and diagnosis."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from nearfar.doctor import Diagnosis, diagnose
from nearfar.training.run_folder import RunFolder, write_atomically
from nearfar.training.sections import write_sections
from nearfar.training.system import Evaluation, System, whole_rows

__all__ = ["project", "write_diagnosis", "write_map", "write_metrics", "write_results"]

Say = Callable[[str], None]

#: rows on the map of embeddings; the first of the split, which is in no order of difficulty
MAP_ROWS = 300


def write_results(
    folder: RunFolder,
    system: System,
    results: dict[str, Evaluation],
    outputs: dict[str, dict[str, Tensor]],
    about: dict[str, Any],
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


def project(outputs: Mapping[str, Tensor], rows: int = MAP_ROWS) -> dict[str, np.ndarray] | None:
    """Coordinates (rows, 2) as ``view/NAME`` for every view in one common space, and the share of variance they hold.

    Views are the matrices of floats with as many columns and rows as the first; None where there is none. Rows are
    scaled to unit length, since losses see directions only. Components have the sign that makes their largest
    weight positive, so that the same embeddings give the same map.

    >>> found = project({"texts": torch.eye(6), "molecules": torch.eye(6).flip(0), "labels": torch.arange(6)})
    >>> sorted(found), found["view/texts"].shape
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
    found = {
        f"view/{name}": ((unit - middle) @ axes.T).numpy().astype(np.float32) for name, unit in units.items()
    }
    return found | {"explained": np.float64(explained)}


def write_map(folder: RunFolder, outputs: Mapping[str, Tensor]) -> None:
    """``map.npz`` of a run, where its outputs hold embeddings."""
    found = project(outputs)
    if found is None:
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **found)  # type: ignore[arg-type]  # numpy's stub wants allow_pickle first
    write_atomically(folder.path / "map.npz", lambda file: file.write(buffer.getvalue()))
