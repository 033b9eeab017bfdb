"""Batches of reviews, taken by index operations, and how often a review with rare labels is repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.errors import NearfarError
from nearfar.models.text.words import TokenBatch, TokenTable

__all__ = ["AspectBatch", "AspectDataset", "repeats"]


def repeats(
    codes: Int[ndarray, "n a"], pairs: Int[ndarray, "k 2"], frequency: float, most: int, seed: int = 0
) -> Int[ndarray, " n"]:
    """Copies of each review: at least 1, at most ``most``; labels of less than the share ``frequency`` are rare.

    >>> codes = np.array([[3]] * 99 + [[2]])
    >>> repeats(codes, np.array([[0, 3], [0, 2]]), frequency=0.16, most=10)[-2:].tolist()
    [1, 4]
    """
    wanted = np.ones(len(codes))
    for aspect, polarity in pairs:
        has_label = codes[:, aspect] == polarity
        share = has_label.mean()
        if share > 0:
            wanted[has_label] = np.maximum(wanted[has_label], np.sqrt(frequency / share))
    rounded = np.floor(wanted + np.random.default_rng(seed).random(len(codes))).astype(np.int64)
    return np.clip(rounded, 1, most)


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
    """A split; ``__getitems__`` gives a whole `AspectBatch`. Nothing in it is random: every epoch has the same rows."""

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
