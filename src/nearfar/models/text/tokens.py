"""Texts as rows of tokens, kept without padding, and batches of them with it.

What a token is (a word with its pieces, a subword id) is the tokenizer's affair: a token has one or more features, each
an array whose first axis runs over the tokens of all texts, one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from numpy import ndarray
from torch import Tensor

from nearfar.errors import NearfarError

__all__ = ["TokenBatch", "TokenTable"]


@dataclass
class TokenBatch:
    """Padded tokens: every feature is (b, t, …), 0 where ``mask`` (b, t) is false."""

    features: dict[str, Shaped[Tensor, "b t ..."]]
    mask: Bool[Tensor, "b t"]

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, name: str) -> Tensor:
        return self.features[name]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        moved = {name: x.to(device, non_blocking=non_blocking) for name, x in self.features.items()}
        return TokenBatch(moved, self.mask.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        pinned = {name: x.pin_memory() for name, x in self.features.items()}
        return TokenBatch(pinned, self.mask.pin_memory())

    def split(self, rows: int) -> list[TokenBatch]:
        """Parts of at most ``rows`` texts, padded as far as each part needs."""
        parts = []
        for start in range(0, len(self), rows):
            mask = self.mask[start : start + rows]
            longest = max(1, int(mask.sum(1).max()))
            chosen = {name: x[start : start + rows, :longest] for name, x in self.features.items()}
            parts.append(TokenBatch(chosen, mask[:, :longest]))
        return parts


class TokenTable:
    """The tokens of all texts of a split.

    ``features``: arrays (tokens, …) by name; ``lengths``: tokens of each text (a text has at least one).

    >>> table = TokenTable({"id": np.array([5, 6, 7])}, [2, 1])
    >>> batch = table.batch([1, 0])
    >>> batch["id"].tolist(), batch.mask.tolist()
    ([[7, 0], [5, 6]], [[True, False], [True, True]])
    """

    def __init__(
        self,
        features: Mapping[str, Shaped[ndarray, "tokens ..."]],
        lengths: Sequence[int] | Int[ndarray, " n"],
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self.lengths) or self.lengths.min() < 1:
            raise NearfarError("every text has at least one token; give an empty one a token of its own")
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.features = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in features.items()}
        for name, x in self.features.items():
            if len(x) != self.starts[-1]:
                raise NearfarError(f"feature {name} has {len(x)} rows for {self.starts[-1]} tokens")

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, positions: Sequence[int] | Int[Tensor, " b"]) -> TokenBatch:
        """The texts at these positions, padded to the longest of them."""
        chosen = np.asarray(positions, dtype=np.int64)
        lengths = self.lengths[chosen]
        place = np.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        index = torch.from_numpy(np.where(mask, self.starts[chosen][:, None] + place, 0))
        there = torch.from_numpy(mask)
        features = {}
        for name, x in self.features.items():
            padded = x[index]
            padded[~there] = 0
            features[name] = padded
        return TokenBatch(features, there)
