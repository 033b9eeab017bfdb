"""What the samplers over a neighbour list share: its ids, the curriculum, the filter and the measurement."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.batching.arguments import number, whole
from nearfar.batching.base import BatchSampler, check_not_rebuilt, compare_ids, log
from nearfar.batching.hardness import HardnessReport, measure_hardness
from nearfar.batching.layout import Plan
from nearfar.batching.neighbors import Neighbors, as_neighbors
from nearfar.errors import NearfarError

__all__ = ["NeighborSampler", "checked_group_size"]


class NeighborSampler(BatchSampler):
    """Base of `HardNegativeSampler` and `PartitionBatchSampler`."""

    def __init__(
        self,
        neighbors: Neighbors | NDArray[np.integer] | Tensor,
        batch_size: int,
        *,
        false_negative_threshold: float | None,
        curriculum_epoch: int,
        ids: Sequence[Any] | NDArray[Any] | None,
        **options: Any,
    ) -> None:
        check_not_rebuilt(type(self).__name__, neighbors)
        self.neighbors = as_neighbors(neighbors)
        if ids is None:
            ids = self.neighbors.ids
        super().__init__(self.neighbors.n, batch_size, ids=ids, **options)
        if self.neighbors.ids is not None and self.ids is not None:
            compare_ids(self.neighbors.ids, self.ids, "neighbour list", "sampler")
        self.false_negative_threshold = false_negative_threshold
        self.curriculum_epoch = curriculum_epoch

    @property
    def false_negative_threshold(self) -> float | None:
        """Similarity from which a neighbour is a likely false negative, to be kept out of the batch."""
        return self._threshold

    @false_negative_threshold.setter
    def false_negative_threshold(self, value: float | None) -> None:
        if value is not None:
            value = number(
                "false_negative_threshold", value, -1.0, advice="a similarity such as 0.95, or None"
            )
        self._close = self.neighbors.too_close(value)
        self._threshold = value

    @property
    def curriculum_epoch(self) -> int:
        """So many epochs of random batches come first."""
        return self._curriculum

    @curriculum_epoch.setter
    def curriculum_epoch(self, value: int) -> None:
        self._curriculum = whole("curriculum_epoch", value, 0)

    def _identity(self) -> dict[str, Any]:
        return {"neighbors": self.neighbors.fingerprint()}

    def realised_hardness(
        self, epoch: int | None = None, *, threshold: float | None = None, sample: int | None = 20_000
    ) -> HardnessReport:
        """How hard the batches of an epoch are, per quarter, by default of the one that is being drawn.

        ``threshold`` for likely false negatives defaults to the filter's own; ``sample`` evenly spaced items
        stand for all.
        """
        running = self._running if epoch is None else None
        if sample is not None:
            sample = whole("sample", sample, 1)
        return self._measure(running or self.plan(epoch), threshold, sample)

    def _measure(
        self, plan: Plan, threshold: float | None = None, sample: int | None = 20_000
    ) -> HardnessReport:
        return measure_hardness(
            plan,
            self.neighbors,
            k=getattr(self, "hardness_k", None),
            threshold=self.false_negative_threshold if threshold is None else threshold,
            sample=sample,
        )

    def _announce(self, epoch: int, plan: Plan) -> None:
        if not log.isEnabledFor(logging.INFO):  # measuring costs more than planning
            return
        if epoch == self.curriculum_epoch > 0:
            log.info(
                "epoch %d: %d epochs of random batches are over, this is the first hard one", epoch, epoch
            )
        log.info("epoch %d: %s", epoch, self._measure(plan))


def checked_group_size(value: int, batch_size: int) -> int:
    """A group size that fits a batch."""
    value = whole("group_size", value, 1)
    if value > batch_size:
        raise NearfarError(f"group_size={value} is larger than a batch of {batch_size}")
    return value
