"""What was said of every pair of a split, kept with the run: what re-scoring and cross-validation start from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from nearfar.errors import NearfarError
from nearfar.training.run_folder import write_atomically

__all__ = ["Predictions"]


@dataclass(frozen=True)
class Predictions:
    """Pairs, their relation, and by metric how much each classifier found to speak for every class."""

    ids: Sequence[str]
    image: Sequence[str]
    truth: Int[ndarray, " n"]
    seen: Bool[ndarray, " n"]  # whether there is a photo
    relations: Sequence[str]
    scores: Mapping[str, Float[ndarray, "n classes"]]

    def __len__(self) -> int:
        return len(self.ids)

    def said(self, among: Sequence[int] | None = None) -> dict[str, Int[ndarray, " n"]]:
        """The class with the highest score, by metric; ``among`` leaves only some classes to choose from."""
        out = {}
        for metric, scores in self.scores.items():
            if among is None:
                out[metric] = scores.argmax(axis=1)
            else:
                out[metric] = np.asarray(among)[scores[:, list(among)].argmax(axis=1)]
        return out

    def save(self, path: Path) -> None:
        """Write a compressed ``.npz``."""
        arrays = {f"scores/{metric}": scores.astype(np.float32) for metric, scores in self.scores.items()}
        texts = {"ids": self.ids, "image": self.image, "relations": self.relations}
        arrays |= {name: np.asarray(list(column), dtype=np.str_) for name, column in texts.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, truth=self.truth, seen=self.seen, **arrays)  # type: ignore[arg-type]
        write_atomically(path, lambda file: file.write(buffer.getvalue()))

    @classmethod
    def load(cls, run: Path, split: str) -> Predictions:
        """Of a finished run."""
        path = run / f"predictions_{split}.npz"
        if not path.is_file():
            raise NearfarError(
                f"{path}: there are no predictions; is {run} a finished run of the relation system?"
            )
        with np.load(path, allow_pickle=False) as entry:
            return cls(
                entry["ids"].tolist(),
                entry["image"].tolist(),
                entry["truth"],
                entry["seen"],
                entry["relations"].tolist(),
                {name[7:]: entry[name] for name in entry.files if name.startswith("scores/")},
            )

    @classmethod
    def pooled(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several test sets as one; of the metrics those that all have."""
        metrics = [name for name in parts[0].scores if all(name in part.scores for part in parts)]
        if len({tuple(part.relations) for part in parts}) != 1:
            raise NearfarError("these runs have different relations; they cannot be pooled")
        ids = [name for part in parts for name in part.ids]
        if len(set(ids)) != len(ids):
            raise NearfarError("these test sets share pairs: they are not the folds of one cross-validation")
        return cls(
            ids,
            [image for part in parts for image in part.image],
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.seen for part in parts]),
            parts[0].relations,
            {name: np.concatenate([part.scores[name] for part in parts]) for name in metrics},
        )
