"""Batches of pairs as arrays, and the order of the batches when only some pairs have a photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from nearfar.batching import BalancedBatchSampler, BatchSampler, RandomBatchSampler
from nearfar.batching.base import digest
from nearfar.batching.plan import Plan
from nearfar.errors import NearfarError, nearest_name
from nearfar.systems.relations.features import spatial_numbers
from nearfar.systems.relations.options import RelationOptions
from nearfar.systems.relations.records import Pairs

__all__ = ["SAMPLERS", "BatchesBySort", "RelationBatch", "RelationDataset", "Scaler", "build_sampler"]


@dataclass
class Scaler:
    """Mean and spread of training numbers; columns that never change are left at 0."""

    mean: Float[ndarray, " d"]
    spread: Float[ndarray, " d"]

    @classmethod
    def of(cls, rows: Float[ndarray, "n d"]) -> Scaler:
        """Of rows without NaN; of none, nothing is moved."""
        kept = rows[~np.isnan(rows).any(axis=1)].astype(np.float64)
        if not len(kept):
            return cls(np.zeros(rows.shape[1]), np.ones(rows.shape[1]))
        spread = kept.std(axis=0)
        return cls(kept.mean(axis=0), np.where(spread > 1e-9, spread, np.inf))

    def __call__(self, rows: Float[ndarray, "n d"]) -> Float[ndarray, "n d"]:
        return ((rows - self.mean) / self.spread).astype(np.float32)


@dataclass
class RelationBatch:
    """One batch. ``visual`` is 0 where ``has_pixels`` is False; ``jittered``: numbers of boxes with moved edges."""

    positions: Int[Tensor, " b"]
    visual: Float[Tensor, "b v"] | None
    has_pixels: Bool[Tensor, " b"]
    numbers: Float[Tensor, "b k"]
    jittered: Float[Tensor, "b k"] | None
    names: Float[Tensor, "b t"] | None
    label: Int[Tensor, " b"]
    group: Int[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RelationBatch:
        moved = {name: part.to(device, non_blocking=non_blocking) for name, part in self._tensors().items()}
        return replace(self, **moved)

    def split(self, rows: int) -> list[RelationBatch]:
        """The batch in parts of ``rows`` rows, the last one perhaps shorter."""
        parts = {name: part.split(rows) for name, part in self._tensors().items()}
        return [
            replace(self, **{name: pieces[i] for name, pieces in parts.items()})
            for i in range(len(parts["positions"]))
        ]

    def _tensors(self) -> dict[str, Tensor]:
        """The parts by name, without those that are None."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


class RelationDataset(Dataset[RelationBatch]):
    """A split with everything a batch needs; ``__getitems__`` gives a whole `RelationBatch`.

    Args:
        pairs: the pairs; all other arguments follow their order.
        label: (n,) classes.
        numbers: (n, k) standardised numbers of the boxes.
        visual: (n, v) standardised features of the crops, NaN where there is no photo; None for no pixels at all.
        names: (n, t) vectors of both categories' names, or None.
        jitter: with a scaler and a variant, boxes are drawn again with every edge moved by up to this share of the
            box's size, for pairs without a second view; 0: none.
        seed: of the jitter, which is drawn from (seed, epoch, first position of the batch) and nothing else.
    """

    def __init__(
        self,
        pairs: Pairs,
        label: Int[ndarray, " n"],
        numbers: Float[ndarray, "n k"],
        visual: Float[ndarray, "n v"] | None,
        names: Float[ndarray, "n t"] | None,
        *,
        jitter: float = 0.0,
        variant: str = "raw",
        scaler: Scaler | None = None,
        seed: int = 0,
    ) -> None:
        self.pairs = pairs
        self.label, self.group = torch.from_numpy(label), torch.from_numpy(pairs.group)
        self.numbers = torch.from_numpy(numbers)
        has_pixels = np.zeros(len(pairs), bool) if visual is None else ~np.isnan(visual).any(axis=1)
        self.has_pixels = torch.from_numpy(has_pixels)
        self.visual = None if visual is None else torch.from_numpy(np.nan_to_num(visual))
        self.names = (
            None if names is None else torch.from_numpy(np.ascontiguousarray(names, dtype=np.float32))
        )
        self.jitter, self.variant, self.scaler, self.seed = jitter, variant, scaler, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's jitter; in shared memory, so that loader processes see it."""
        self._epoch.fill_(epoch)

    def __getitem__(self, position: int) -> RelationBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> RelationBatch:
        at = torch.as_tensor(positions, dtype=torch.int64)

        def rows(part: Tensor) -> Tensor:
            return part.index_select(0, at)  # half the time of part[at]

        has_pixels = rows(self.has_pixels)
        alone = self.names is None and not bool(has_pixels.all())
        return RelationBatch(
            at,
            None if self.visual is None else rows(self.visual),
            has_pixels,
            rows(self.numbers),
            self._jittered(at.numpy()) if alone and self.jitter and len(at) else None,
            None if self.names is None else rows(self.names),
            rows(self.label),
            rows(self.group),
        )

    def _jittered(self, at: Int[ndarray, " b"]) -> Float[Tensor, "b k"]:
        assert self.scaler is not None
        rng = np.random.default_rng([self.seed, int(self._epoch), int(at[0])])
        moved = []
        for boxes in (self.pairs.subject_box[at], self.pairs.object_box[at]):
            sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
            # At most .45 of a side at each edge: the box keeps an area.
            moved.append(boxes + min(self.jitter, 0.45) * sides * rng.uniform(-1, 1, boxes.shape))
        numbers = spatial_numbers(moved[0], moved[1], self.pairs.size[at], self.variant)
        return torch.from_numpy(self.scaler(numbers))


SAMPLERS = ("random", "balanced")


class BatchesBySort(BatchSampler):
    """Random batches in which all rows are marked or none is; at most one batch of an epoch is mixed.

    >>> marked = np.arange(40) < 12
    >>> sorts = [set(marked[batch].tolist()) for batch in BatchesBySort(marked, 4)]
    >>> sum(len(sort) > 1 for sort in sorts), len(sorts)
    (0, 10)
    """

    def __init__(self, marked: Bool[ndarray, " n"], batch_size: int, *, seed: int = 0) -> None:
        super().__init__(len(marked), batch_size, seed=seed)
        self.marked = np.asarray(marked, dtype=bool)

    def _identity(self) -> dict[str, Any]:
        return {"marked": digest(self.marked)}

    def _compose(self, epoch: int, options: Mapping[str, object]) -> Plan:
        rng = np.random.default_rng([self.seed, epoch])
        first, second = (rng.permutation(np.flatnonzero(self.marked == sort)) for sort in (True, False))
        order = np.concatenate([first, second])[: self.layout.total].astype(np.int32)
        # Whole batches are shuffled; a shorter one stays last.
        sizes = self.layout.sizes
        full = int((sizes == self.batch_size).sum())
        head = order[: full * self.batch_size].reshape(full, self.batch_size)
        return Plan(
            self.layout, np.concatenate([rng.permutation(head).reshape(-1), order[full * self.batch_size :]])
        )


def build_sampler(config: RelationOptions, label: ndarray, has_pixels: Bool[ndarray, " n"]) -> BatchSampler:
    """The sampler that ``sampler=`` names: random batches, or equal shares of every relation (small ones repeat)."""
    name, size, seed = config.sampler.name, int(config.batch_size), int(config.seed)
    if size > len(label):
        raise NearfarError(
            f"batch_size={size} is larger than the training set of {len(label)} pairs; lower it."
        )
    if name == "random":
        if has_pixels.all() or not has_pixels.any():
            return RandomBatchSampler(len(label), size, seed=seed)
        return BatchesBySort(has_pixels, size, seed=seed)
    if name == "balanced":
        return BalancedBatchSampler(label, size, repeat=True, seed=seed)
    raise NearfarError(f"sampler={name}: {nearest_name(str(name), SAMPLERS)}")
