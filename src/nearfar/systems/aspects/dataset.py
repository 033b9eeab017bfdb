"""Batches of reviews: tokens and codes, made whole by index operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.errors import NearfarError
from nearfar.models.text.tokens import TokenBatch, TokenTable

__all__ = ["AspectBatch", "AspectDataset"]


@dataclass
class AspectBatch:
    """One batch: ``positions`` in the split, tokens, codes (b, A)."""

    positions: Int[Tensor, " b"]
    tokens: TokenBatch
    codes: Int[Tensor, "b a"]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> AspectBatch:
        return AspectBatch(
            self.positions.to(device, non_blocking=non_blocking),
            self.tokens.to(device, non_blocking),
            self.codes.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> AspectBatch:
        return AspectBatch(self.positions.pin_memory(), self.tokens.pin_memory(), self.codes.pin_memory())

    def split(self, rows: int) -> list[AspectBatch]:
        """The batch in parts of ``rows`` rows, the last one perhaps shorter."""
        parts = zip(self.positions.split(rows), self.tokens.split(rows), self.codes.split(rows), strict=True)
        return [AspectBatch(*part) for part in parts]


class AspectDataset(Dataset[AspectBatch]):
    """A split; ``__getitems__`` gives a whole `AspectBatch`. Nothing in it is drawn: every epoch has the same rows."""

    def __init__(self, tokens: TokenTable, codes: Int[Tensor, "n a"]) -> None:
        if len(tokens) != len(codes):
            raise NearfarError(f"{len(tokens)} texts and {len(codes)} rows of codes")
        self.tokens, self.codes = tokens, codes

    def __len__(self) -> int:
        return len(self.codes)

    def set_epoch(self, epoch: int) -> None:
        """Nothing depends on the epoch."""

    def __getitem__(self, position: int) -> AspectBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> AspectBatch:
        chosen = torch.as_tensor(positions, dtype=torch.int64)
        return AspectBatch(chosen, self.tokens.batch(chosen), self.codes[chosen])
