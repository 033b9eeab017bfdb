"""Pairs of earlier batches as further negatives, with what tells which of them are none."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.contrast import DuplicateMask, Mask, SimilarityMask
from nearfar.losses.memory import CrossBatchMemory
from nearfar.systems.molecules.dataset import MoleculeBatch

__all__ = ["PairMemory"]


class PairMemory(nn.Module):
    """The last ``size`` pairs: both embeddings (``dim``), and the frozen text vectors (``text_dim``) they came from.

    The frozen vectors are kept (``text_dim`` not None) where texts too similar to a query's are left out.
    """

    def __init__(self, size: int, dim: int, text_dim: int | None = None) -> None:
        super().__init__()
        self.molecules = CrossBatchMemory(size, dim, ids=True)
        self.texts = CrossBatchMemory(size, dim, ids=True)
        self.vectors = None if text_dim is None else CrossBatchMemory(size, text_dim)

    @property
    def filled(self) -> int:
        """How many pairs there are by now."""
        return self.molecules.filled

    def push(
        self, molecules: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], batch: MoleculeBatch
    ) -> None:
        """Keep the pairs of a batch after its step."""
        self.molecules.push(molecules, batch.structure_group)
        self.texts.push(texts, batch.text_group)
        if self.vectors is not None:
            self.vectors.push(batch.text)

    def left_out(self, batch: MoleculeBatch, duplicates: bool, threshold: float | None) -> Mask:
        """Pairs (row of the batch, pair of the memory) that are no negatives, in either direction.

        Always the row itself, from an earlier epoch; with ``duplicates`` all that share its structure or its text;
        with ``threshold`` all whose frozen text vectors have this cosine or more.
        """
        structures = (batch.structure_group, self.molecules.ids())
        texts = (batch.text_group, self.texts.ids())
        if duplicates:
            mask: Any = DuplicateMask(*structures) | DuplicateMask(*texts)
        else:
            own, kept = ((structure << 32) + text for structure, text in zip(structures, texts, strict=True))
            mask = DuplicateMask(own, kept)
        if threshold is not None:
            assert self.vectors is not None
            mask = mask | _SimilarBeyond(batch.text, self.vectors.rows(), threshold)
        return mask

    def age(self) -> Float[Tensor, ""]:
        """Mean age of the pairs in steps; 0 where there is none."""
        return self.molecules.age().float().mean() if self.filled else torch.zeros(())


class _SimilarBeyond:
    """A ``SimilarityMask`` between the rows of a batch and others."""

    symmetric = False

    def __init__(self, own: Float[Tensor, "n d"], others: Float[Tensor, "m d"], threshold: float) -> None:
        self.shape = (len(own), len(others))
        self._all = SimilarityMask(torch.cat([own, others]), threshold)

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        return self._all.tile(rows, slice(columns.start + self.shape[0], columns.stop + self.shape[0]))
