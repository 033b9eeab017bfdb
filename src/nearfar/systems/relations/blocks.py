"""What a probe may look at: the learned views of a pair and what they were made from, and which metric sees which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from nearfar.systems.relations.dataset import RelationDataset
from nearfar.systems.relations.probe import RelationProbe

__all__ = ["FUSED", "LINEAR", "Rows", "blocks_of", "looks_at", "scored"]

#: parts of a pair by name, (n, d) each; a row of NaN is a part that this pair has not
Rows = dict[str, Float[ndarray, "n d"]]
FUSED, LINEAR = "probe/accuracy", "linear_probe/accuracy"


def blocks_of(dataset: RelationDataset, outputs: Mapping[str, Tensor], at: Int[ndarray, " n"]) -> Rows:
    """The embeddings of some rows ("view …"), and their numbers, pixels and words as they went in."""
    seen = dataset.seen.numpy()[at]
    found: Rows = {"numbers": dataset.numbers.numpy()[at]}
    if dataset.visual is not None:
        found["pixels"] = _unseen_as_nan(dataset.visual.numpy()[at], seen)
    if dataset.names is not None:
        found["words"] = dataset.names.numpy()[at]
    for name, view in outputs.items():
        rows = view.numpy()
        found[f"view {name}"] = _unseen_as_nan(rows, seen) if name == "visual" else rows
    return found


def looks_at(names: Sequence[str], keep_inputs: bool) -> dict[str, list[str]]:
    """Metric → the blocks that its classifier sees, out of those that there are.

    >>> looks_at(["numbers", "view spatial"], keep_inputs=True)["spatial_only/accuracy"]
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
    return {metric: found for metric, found in chosen.items() if found}


def scored(
    kind: str, train: Rows, test: Rows, names: Sequence[str], label: Int[ndarray, " n"], count: int
) -> Float[ndarray, "m classes"]:
    """How much speaks for each class of the test pairs, by a probe fitted on the training pairs' blocks."""
    probe = RelationProbe(kind).fit({name: train[name] for name in names}, label)
    return probe.scores({name: test[name] for name in names}, count)


def _unseen_as_nan(rows: ndarray, seen: ndarray) -> ndarray:
    return rows if seen.all() else np.where(seen[:, None], rows, np.nan)
