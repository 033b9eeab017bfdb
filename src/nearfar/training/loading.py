"""Loaders over batches of positions that somebody else has chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

__all__ = ["consecutive", "loader"]


def _identity(batch: Any) -> Any:
    return batch


def loader(dataset: Any, batches: list[list[int]], workers: int = 0, pin: bool = False) -> DataLoader[Any]:
    """A loader over exactly these batches of positions.

    The loader gets a generator of its own: without one every new iterator draws a seed from the global
    generator, and dropout would depend on how often an epoch was started.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),
    )


def consecutive(n: int, batch_size: int) -> list[list[int]]:
    """Positions 0 … n − 1 in order, for evaluation.

    >>> consecutive(5, 2)
    [[0, 1], [2, 3], [4]]
    """
    return [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]
