"""A map of a split's embeddings: both views in the plane of their first two principal components."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from nearfar.training.run_folder import RunFolder, write_atomically
from nearfar.training.system import whole_rows

__all__ = ["project", "write_map"]

#: rows on the map; the first of the split, which is in no order of difficulty
ROWS = 300


def project(outputs: Mapping[str, Tensor], rows: int = ROWS) -> dict[str, np.ndarray] | None:
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
