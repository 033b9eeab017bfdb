"""Batches of the tissue system, made whole by index operations instead of one object per spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.errors import NearfarError

__all__ = ["TissueBatch", "TissueDataset"]


@dataclass
class TissueBatch:
    """One batch: what both towers read of its spots, and their spatial neighbours with weights.

    ``positions`` and ``neighbors`` (-1 for none) are positions in the split.
    """

    positions: Int[Tensor, " b"]
    images: Shaped[Tensor, "b ..."]
    genes: Float[Tensor, "b g"]
    neighbors: Int[Tensor, "b k"]
    alpha: Float[Tensor, "b k"]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TissueBatch:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TissueBatch:
        return self._each(lambda part: part.pin_memory())

    def split(self, rows: int) -> list[TissueBatch]:
        """Parts of ``rows`` rows, the last perhaps shorter."""
        parts = [getattr(self, each.name).split(rows) for each in fields(self)]
        return [TissueBatch(*part) for part in zip(*parts, strict=True)]

    def _each(self, move: Callable[[Tensor], Tensor]) -> TissueBatch:
        return TissueBatch(*(move(getattr(self, each.name)) for each in fields(self)))


class TissueDataset(Dataset[TissueBatch]):
    """A split with everything a batch needs; ``__getitems__`` gives a whole `TissueBatch`.

    Args:
        images: frozen features (n, f), or patches (n, h, w, 3) of uint8, which batches hold as (b, 3, h, w).
        genes: (n, g) what the gene tower reads.
        neighbors: (n, k) positions of spatial neighbours in the split, -1 for none.
        alpha: (n, k) their weights.
        augment: turn and mirror patches, drawn from (seed, epoch, first position of the batch) and nothing else: the
            same whatever worker makes the batch and wherever a resumed run begins.
        seed: of the augmentation.

    The epoch lies in shared memory, so that persistent workers see it too.
    """

    def __init__(
        self,
        images: Float[np.ndarray, "n f"] | UInt8[np.ndarray, "n h w 3"],
        genes: Float[np.ndarray, "n g"],
        neighbors: Int[np.ndarray, "n k"],
        alpha: Float[np.ndarray, "n k"],
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        for name, part in (("genes", genes), ("neighbors", neighbors), ("alpha", alpha)):
            if len(part) != len(images):
                raise NearfarError(f"{name}: {len(part)} rows for the images of {len(images)} spots.")
        self.patches = images if images.ndim == 4 else None
        self.features = torch.from_numpy(np.asarray(images, np.float32)) if images.ndim == 2 else None
        if augment and self.patches is None:
            raise NearfarError("augmentation turns patches, and this dataset has frozen features.")
        if augment and self.patches is not None and self.patches.shape[1] != self.patches.shape[2]:
            raise NearfarError(
                f"patches of {self.patches.shape[1:3]} pixels cannot be turned: they are no squares."
            )
        self.genes = torch.from_numpy(np.asarray(genes, np.float32))
        self.neighbors = torch.from_numpy(np.asarray(neighbors, np.int64))
        self.alpha = torch.from_numpy(np.asarray(alpha, np.float32))
        self.augment, self.seed = augment, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.genes)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's augmentation."""
        self._epoch.fill_(epoch)

    def __getitem__(self, position: int) -> TissueBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> TissueBatch:
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return TissueBatch(
            positions=chosen,
            images=self._images(chosen),
            genes=self.genes[chosen],
            neighbors=self.neighbors[chosen],
            alpha=self.alpha[chosen],
        )

    def _images(self, chosen: Int[Tensor, " b"]) -> Tensor:
        if self.features is not None:
            return self.features[chosen]
        assert self.patches is not None
        patches: Any = np.ascontiguousarray(np.asarray(self.patches[chosen.numpy()]).transpose(0, 3, 1, 2))
        pixels = torch.from_numpy(patches)
        if not self.augment:
            return pixels
        entropy = np.random.SeedSequence((self.seed, self.epoch, int(chosen[0])))
        draw = torch.from_numpy(np.random.default_rng(entropy).integers(8, size=len(chosen)))
        turned = pixels.clone()
        for way in range(1, 8):  # the symmetries of a square: four turns, each mirrored or not
            own = (draw == way).nonzero().flatten()
            if len(own):
                part = pixels[own].flip(3) if way >= 4 else pixels[own]
                turned[own] = part.rot90(way % 4, (2, 3))
        return turned
