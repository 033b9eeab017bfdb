"""Probes of the relation: what they are fitted on, and how a fitted one is kept for new pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from nearfar.data.batch import ItemDataset
from nearfar.data.files import read_arrays, read_json, write_arrays, write_json
from nearfar.data.scenes.triples import NAMES, SPATIAL, VISUAL
from nearfar.errors import NearfarError
from nearfar.metrics.classification import probabilities
from nearfar.models.parts_probe import Blocks, PartsProbe
from nearfar.systems.view_system import PRESENT

__all__ = ["FUSED", "LINEAR", "Predictor", "blocks_of", "blocks_of_rows", "has_pixels", "probe_inputs"]


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


FOLDER = "probe"


@dataclass(frozen=True)
class Predictor:
    """Predicts the relation of pairs from their embeddings and inputs, as the final evaluation of the run did.

    ``temperature`` turns scores into probabilities; it was fitted on validation pairs.
    """

    probe: PartsProbe
    relations: Sequence[str]
    temperature: float

    def __call__(self, blocks: Blocks) -> tuple[Int[ndarray, " n"], Float[ndarray, "n classes"]]:
        """The class of every pair, as a position in ``relations``, and the probability of each class."""
        scores = self.probe.scores(blocks, len(self.relations))
        return scores.argmax(axis=1), probabilities(scores, self.temperature)

    def save(self, folder: Path) -> None:
        """Write the folder ``probe``: JSON, and plain arrays (about 4 bytes for every number of a support vector)."""
        about = {
            "kind": self.probe.kind,
            "parts": self.probe.parts,
            "relations": list(self.relations),
            "temperature": self.temperature,
        }
        write_arrays(folder / FOLDER / "probe.npz", self.probe.arrays())
        write_json(folder / FOLDER / "probe.json", about)

    @classmethod
    def load(cls, folder: Path) -> Predictor | None:
        """What ``save`` wrote; None where there is nothing.

        Raises:
            NearfarError: files that are damaged or do not belong together.
        """
        path = folder / FOLDER / "probe.json"
        if not path.is_file():
            return None
        shape = {"kind": str, "parts": [str], "relations": [str], "temperature": float}
        about = read_json(path, shape)
        try:
            probe = PartsProbe.of_arrays(about["kind"], about["parts"], read_arrays(path.with_suffix(".npz")))
        except NearfarError as error:
            raise NearfarError(f"{path.parent}: {error}") from None
        if not about["temperature"] > 0 or probe.highest >= len(about["relations"]):
            raise NearfarError(f"{path}: what it holds is no probe of relations: it was edited or damaged.")
        return cls(probe, about["relations"], float(about["temperature"]))
