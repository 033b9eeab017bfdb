"""The probe that a run fitted, as it is kept for new pairs: arrays and JSON, and probabilities of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float, Int
from numpy import ndarray

from nearfar.data.files import read_arrays, read_json
from nearfar.data.writing import write_arrays, write_json
from nearfar.errors import NearfarError
from nearfar.metrics.temperature_scaling import probabilities
from nearfar.models.parts_probe import Blocks, PartsProbe

__all__ = ["Predictor"]

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
