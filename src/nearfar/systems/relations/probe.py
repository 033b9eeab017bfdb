"""What probes of the relation are fitted on: parts of the embeddings and inputs of training pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from torch import Tensor

from nearfar.data.batch import ItemDataset
from nearfar.data.scenes.triples import NAMES, SPATIAL, VISUAL
from nearfar.models.parts_probe import Blocks
from nearfar.systems.view_system import PRESENT

__all__ = [
    "FUSED",
    "LINEAR",
    "blocks_of",
    "blocks_of_rows",
    "has_pixels",
    "probe_inputs",
]


#: the views whose inputs are parts of probes, and what these parts are called
INPUTS = ((SPATIAL, "numbers"), (VISUAL, "pixels"), (NAMES, "words"))


FUSED, LINEAR = "probe/accuracy", "linear_probe/accuracy"


def has_pixels(dataset: ItemDataset) -> Bool[ndarray, " n"]:
    """Which pairs of a split have a photo that is used."""
    if VISUAL not in dataset.inputs:
        return np.zeros(len(dataset), dtype=bool)
    if f"{PRESENT}{VISUAL}" not in dataset.inputs:
        return np.ones(len(dataset), dtype=bool)
    return dataset.tensor(f"{PRESENT}{VISUAL}").numpy()


def blocks_of(dataset: ItemDataset, outputs: Mapping[str, Tensor], at: Int[ndarray, " n"]) -> Blocks:
    """The embeddings of some rows ("view …") and their inputs: numbers, pixels, words."""
    positions, inputs = torch.from_numpy(at), {}
    for view, _ in INPUTS:
        if view in dataset.inputs:
            rows = dataset.inputs[view].batch(positions)
            assert isinstance(rows, Tensor)
            inputs[view] = rows.numpy()
    return blocks_of_rows(inputs, outputs, has_pixels(dataset)[at])


def blocks_of_rows(
    inputs: Mapping[str, ndarray], outputs: Mapping[str, Tensor], pixels: Bool[ndarray, " n"]
) -> Blocks:
    """The parts that probes are fitted on: embeddings of rows ("view NAME"), and inputs by the names of their views.

    ``pixels``: which pairs have a photo; of the others the parts of pixels are missing.
    """
    blocks = {}
    for view, name in INPUTS:
        if view in inputs:
            blocks[name] = _missing_as_nan(inputs[view], pixels) if view == VISUAL else inputs[view]
    for view, embedded in outputs.items():
        rows = embedded.numpy()
        blocks[f"view {view}"] = _missing_as_nan(rows, pixels) if view == VISUAL else rows
    return blocks


def probe_inputs(names: Sequence[str], keep_inputs: bool) -> dict[str, list[str]]:
    """Metric → the blocks that its classifier gets, out of ``names``.

    >>> probe_inputs(["numbers", "view spatial"], keep_inputs=True)["spatial_only/accuracy"]
    ['view spatial', 'numbers']
    """
    learned = [name for name in names if name.startswith("view ")]
    kept = [name for name in names if name in ("numbers", "words")] if keep_inputs else []
    fused = learned + kept
    chosen = {
        FUSED: fused,
        "untrained/accuracy": fused,
        "raw_features/accuracy": [name for name in names if not name.startswith("view ")],
        "spatial_only/accuracy": [name for name in fused if name in ("view spatial", "numbers")],
        "numbers_only/accuracy": ["numbers"],
        "visual_only/accuracy": [name for name in names if name == "view visual"],
        "categories_only/accuracy": [name for name in names if name == "words"],
    }
    return {metric: blocks for metric, blocks in chosen.items() if blocks}


def _missing_as_nan(rows: ndarray, pixels: ndarray) -> ndarray:
    return rows if pixels.all() else np.where(pixels[:, None], rows, np.nan)
