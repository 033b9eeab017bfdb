"""Batch samplers for sentence-transformers: what its trainer takes as ``batch_sampler``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor

from nearfar.batching import (
    BatchSampler,
    HardNegativeSampler,
    HardnessReport,
    Neighbors,
    PartitionBatchSampler,
    RandomBatchSampler,
    nearest_neighbors,
)
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["HardBatches", "PartitionBatches", "UniqueBatches"]


class _Batches(DefaultBatchSampler):
    """A sampler of nearfar as one of sentence-transformers: a pass is a function of seed and epoch alone.

    So a run that is resumed in the middle of an epoch, of which the trainer skips the batches that were used, goes on
    with exactly those that were left.
    """

    def __init__(self, dataset: Dataset, batches: BatchSampler, **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        self.batches.set_epoch(self.epoch)
        yield from self.batches

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(eq=False)
class _EmbeddingBatches:
    """Batches made from embeddings of the training rows."""

    embeddings: np.ndarray | Tensor | Neighbors
    k: int = 100
    false_negative_threshold: float | None = None
    curriculum_epoch: int = 0
    group_size: int | None = None
    sampler: HardNegativeSampler | PartitionBatchSampler | None = field(default=None, init=False, repr=False)

    def _neighbors(self) -> Neighbors:
        if isinstance(self.embeddings, Neighbors):
            return self.embeddings
        if self.embeddings is None:
            raise NearfarError(
                f"{type(self).__name__} was read from a file, which holds no embeddings: make it again with those of "
                "the training rows."
            )
        n = len(self.embeddings)
        self.embeddings = nearest_neighbors(self.embeddings, min(self.k, n - 1))
        return self.embeddings

    def _make(
        self, neighbors: Neighbors, batch_size: int, drop_last: bool, seed: int
    ) -> HardNegativeSampler | PartitionBatchSampler:
        raise NotImplementedError

    def __call__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> DefaultBatchSampler:
        neighbors = self._neighbors()
        arguments = {
            "batch_size": batch_size, "drop_last": drop_last, "valid_label_columns": valid_label_columns,
            "generator": generator, "seed": seed,
        }  # fmt: skip
        if len(dataset) != neighbors.n:
            if self.sampler is None:
                raise NearfarError(
                    f"the embeddings have {neighbors.n} rows and the data set {len(dataset)}: they must be those of "
                    "the training rows, in their order. (To evaluate on different rows before training, call "
                    "trainer.get_train_dataloader() first.)"
                )
            # The rows of evaluation: whoever is in a batch with whom changes nothing but the evaluation loss.
            return _Batches(
                dataset, RandomBatchSampler(len(dataset), batch_size, drop_last=drop_last), **arguments
            )
        made = self._make(neighbors, batch_size, drop_last, seed or 0)
        if self.sampler is None:
            self.sampler = made
        return _Batches(dataset, made, **arguments)

    def hardness(self, epoch: int | None = None, threshold: float | None = None) -> HardnessReport:
        """How hard the batches of an epoch really are, beside random ones; by default of the one that is drawn.

        ``threshold``: similarity of likely false negatives; None: ``false_negative_threshold``.
        """
        if self.sampler is None:
            raise NearfarError("no batches were made yet: the trainer makes them when training begins.")
        return self.sampler.realised_hardness(epoch, threshold=threshold)

    def __getstate__(self) -> dict[str, object]:
        # The trainer writes its arguments beside each checkpoint; embeddings of all rows do not belong there.
        return {**self.__dict__, "embeddings": None, "sampler": None}


@dataclass(eq=False)
class HardBatches(_EmbeddingBatches):
    """``batch_sampler`` of the trainer: batches with a share of rows that are hard to tell apart.

    Args:
        embeddings: of the training rows in their order, (n, d), such as ``model.encode(anchors)``; or `Neighbors`.
        k: nearest neighbours that are drawn from.
        false_negative_threshold: rows of this cosine or more are kept out of each other's batches.
        curriculum_epoch: epochs of random batches at the start.
        group_size: rows around one pivot; see `nearfar.batching.HardNegativeSampler`.
        hard_ratio: share of a batch that is hard, 0 to 1.

    ``hardness()`` says how hard the batches are. Rows of a different number (those of evaluation) come at random.

    >>> points = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    >>> batches = HardBatches(points, k=20, hard_ratio=0.5)
    >>> sampler = batches(range(200), batch_size=10, drop_last=False, seed=1)
    >>> len(sampler), batches.hardness().hard_share
    (20, 0.5)
    """

    hard_ratio: float = 0.5

    def _make(
        self, neighbors: Neighbors, batch_size: int, drop_last: bool, seed: int
    ) -> HardNegativeSampler | PartitionBatchSampler:
        return HardNegativeSampler(
            neighbors,
            batch_size,
            self.hard_ratio,
            min(self.k, neighbors.k),
            self.curriculum_epoch,
            self.group_size,
            false_negative_threshold=self.false_negative_threshold,
            seed=seed,
            drop_last=drop_last,
        )


@dataclass(eq=False)
class PartitionBatches(_EmbeddingBatches):
    """``batch_sampler`` of the trainer: every batch a neighbourhood (`nearfar.batching.PartitionBatchSampler`).

    Arguments as in `HardBatches`; ``group_size`` is that of a block, None: the whole batch.

    >>> points = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    >>> batches = PartitionBatches(points, k=20)
    >>> sampler = batches(range(200), batch_size=10, drop_last=False)
    >>> report = batches.hardness()
    >>> report.neighbors > 3 * report.random
    True
    """

    def _make(
        self, neighbors: Neighbors, batch_size: int, drop_last: bool, seed: int
    ) -> HardNegativeSampler | PartitionBatchSampler:
        return PartitionBatchSampler(
            neighbors,
            batch_size,
            self.group_size,
            self.curriculum_epoch,
            false_negative_threshold=self.false_negative_threshold,
            seed=seed,
            drop_last=drop_last,
        )


@dataclass(eq=False)
class UniqueBatches:
    """``batch_sampler`` of the trainer: random batches in which no text comes twice.

    Every row is used once an epoch: rows of a batch that has their text already change places with rows of other
    batches. ``left`` counts those for which there was no place (a text that more rows have than there are batches);
    a warning tells of them.

    Args:
        columns: whose texts are compared; None: all columns of texts.
        tries: places that are tried for a row.

    >>> rows = {"anchor": ["a", "a", "b", "c"], "positive": ["x", "y", "z", "x"]}
    >>> batches = UniqueBatches()
    >>> sampler = batches(rows, batch_size=2, drop_last=False)
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 2], [1, 3]]
    """

    columns: Sequence[str] | None = None
    tries: int = 200
    left: int = field(default=0, init=False)

    def __call__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> DefaultBatchSampler:
        arguments = {
            "batch_size": batch_size, "drop_last": drop_last, "valid_label_columns": valid_label_columns,
            "generator": generator, "seed": seed,
        }  # fmt: skip
        keys = _keys(dataset, self.columns, valid_label_columns or [])
        batches = RandomBatchSampler(len(keys), batch_size, seed=seed or 0, drop_last=drop_last)
        return _UniqueSampler(dataset, batches, keys, self, **arguments)


class _UniqueSampler(_Batches):
    def __init__(
        self,
        dataset: Dataset,
        batches: BatchSampler,
        keys: list[set[int]],
        owner: UniqueBatches,
        **arguments: Any,
    ) -> None:
        super().__init__(dataset, batches, **arguments)
        self.keys, self.owner = keys, owner

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.batches.plan(self.epoch)
        drawn = [plan.batch(step, 0).tolist() for step in range(len(self.batches))]
        rng = np.random.default_rng([self.batches.seed, self.epoch])
        left = _exchange(drawn, self.keys, rng, self.owner.tries)
        self.owner.left = left
        if left:
            warnings.warn(
                f"epoch {self.epoch}: {left} rows are in a batch that has one of their texts already, since no other "
                "batch had room; a smaller batch, or the loss with mask_duplicates=True, helps.",
                stacklevel=2,
            )
        yield from drawn


def _keys(dataset: Dataset, columns: Sequence[str] | None, labels: Sequence[str]) -> list[set[int]]:
    """What each row must not have in common with others of its batch: numbers of its texts."""
    names = list(dataset.column_names if hasattr(dataset, "column_names") else dataset)
    if columns is None:
        columns = [name for name in names if name not in (*labels, "dataset_name")]
    missing = [name for name in columns if name not in names]
    if missing or not columns:
        raise NearfarError(f"the data set has no column {', '.join(missing) or 'of texts'}; it has {names}.")
    known: dict[str, int] = {}
    rows = zip(*(dataset[name] for name in columns), strict=True)
    return [{known.setdefault(str(text), len(known)) for text in row} for row in rows]


def _exchange(batches: list[list[int]], keys: list[set[int]], rng: np.random.Generator, tries: int) -> int:
    """Let rows change places until no text comes twice in a batch; returns how many rows still do."""
    counts: list[dict[int, int]] = []
    for batch in batches:
        counts.append({})
        for row in batch:
            for key in keys[row]:
                counts[-1][key] = counts[-1].get(key, 0) + 1

    def fits(row: int, batch: int, without: int) -> bool:
        own = keys[without]
        return all(counts[batch].get(key, 0) - (key in own) == 0 for key in keys[row])

    def move(row: int, batch: int, by: int) -> None:
        for key in keys[row]:
            counts[batch][key] = counts[batch].get(key, 0) + by

    left = 0
    for b, batch in enumerate(batches):
        for place, row in enumerate(batch):
            if all(counts[b][key] == 1 for key in keys[row]):
                continue
            for _ in range(tries):
                other = int(rng.integers(len(batches)))
                at = int(rng.integers(len(batches[other])))
                theirs = batches[other][at]
                if other != b and fits(row, other, theirs) and fits(theirs, b, row):
                    batch[place], batches[other][at] = theirs, row
                    move(row, b, -1)
                    move(theirs, other, -1)
                    move(theirs, b, 1)
                    move(row, other, 1)
                    break
            else:
                left += 1
    return left
