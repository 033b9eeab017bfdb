"""The probe that a run fitted, as it is kept for new pairs: arrays and JSON, and probabilities of the classes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from nearfar.data.files import read_arrays, read_json
from nearfar.data.writing import write_atomically
from nearfar.errors import NearfarError
from nearfar.systems.relations.probe import Blocks, RelationProbe

__all__ = ["Predictor", "fitted_temperature", "probabilities"]

FOLDER = "probe"
#: of the temperature: where e^x is sought, and in how many steps
_RANGE, _STEPS = (-4.0, 3.0), 80


def probabilities(scores: Float[ndarray, "n k"], temperature: float) -> Float[ndarray, "n k"]:
    """softmax(scores / temperature); a score of −∞ is a probability of 0.

    >>> probabilities(np.array([[2.0, 0.0, -np.inf]]), 2.0).round(3).tolist()
    [[0.731, 0.269, 0.0]]
    """
    scaled = (scores - scores.max(axis=1, keepdims=True)) / temperature
    share = np.exp(scaled)
    return np.asarray(share / share.sum(axis=1, keepdims=True))


def fitted_temperature(scores: Float[ndarray, "n k"], label: Int[ndarray, " n"]) -> float:
    """The temperature under which the probability of the true classes is highest (Guo et al. 2017), .02 to 20.

    Pairs of a class that cannot be predicted (a score of −∞) do not count; without any others it is 1. No class changes
    by it: it says how sure a score is.

    >>> scores = np.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> temperature = fitted_temperature(scores, np.array([0, 0, 0, 1]))
    >>> probabilities(scores, temperature)[0].round(2).tolist()
    [0.75, 0.25]
    """
    own = scores[np.arange(len(label)), label] if len(label) else np.zeros(0)
    known = np.isfinite(own)
    if not known.any():
        return 1.0
    beyond = scores[known] - own[known, None]

    def loss(x: float) -> float:
        scaled = beyond * np.exp(-x)
        top = scaled.max(axis=1)
        return float(np.mean(top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))))

    low, high = _RANGE
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(_STEPS):  # golden section: the loss is convex in 1 / temperature, so it has one valley
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if loss(first) <= loss(second) else (first, high)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Predictor:
    """Predicts the relation of pairs from their embeddings and inputs, as the final evaluation of the run did.

    ``temperature`` turns scores into probabilities; it was fitted on validation pairs.
    """

    probe: RelationProbe
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
        buffer = io.BytesIO()
        np.savez(buffer, **self.probe.arrays())  # type: ignore[arg-type]
        write_atomically(folder / FOLDER / "probe.npz", lambda file: file.write(buffer.getvalue()))
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / FOLDER / "probe.json", lambda file: file.write(text.encode()))

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
            probe = RelationProbe.of_arrays(
                about["kind"], about["parts"], read_arrays(path.with_suffix(".npz"))
            )
        except NearfarError as error:
            raise NearfarError(f"{path.parent}: {error}") from None
        if not about["temperature"] > 0 or probe.highest >= len(about["relations"]):
            raise NearfarError(f"{path}: what it holds is no probe of relations: it was edited or damaged.")
        return cls(probe, about["relations"], float(about["temperature"]))
