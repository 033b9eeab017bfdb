"""The pairs that ``data`` of the relation system describes, read or composed, and their batches.

Some pairs have a photo; those that have boxes alone get a second view of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from nearfar.batching import BatchSampler
from nearfar.batching.base import digest
from nearfar.batching.plan import Plan
from nearfar.data.batch import Batch, Draw
from nearfar.data.coco_files import given_files
from nearfar.data.files import Json
from nearfar.data.rejections import Rejections
from nearfar.data.scenes.composed import composed_scenes
from nearfar.data.scenes.relation_data import PictureShares, RelationData, read_triples, split_relations
from nearfar.data.scenes.triples import chosen_relations
from nearfar.systems.relations.options import RelationOptions
from nearfar.towers.boxes import BoxTower

__all__ = ["GROUP", "JITTERED", "BatchesBySort", "BoxJitter", "load_data"]


def load_data(config: RelationOptions) -> RelationData:
    """The splits that the configuration describes.

    Raises:
        NearfarError: missing or unreadable files, no usable pair, a split without pairs, a photo in two splits.
    """
    data, relations = config.data, chosen_relations(config.relations)
    rejections, notes = Rejections(), Json()
    composed = data.layout == "composed"
    if composed:
        triples, photos = composed_scenes(
            int(data.size), relations, int(data.split_seed), (data.val_fraction, data.test_fraction)
        )
        source = (
            f"{data.size} composed scenes (drawn, not photos; kinds of things in test are in no other split)"
        )
    else:
        images, folder = (None if value is None else Path(str(value)) for value in (data.images, data.dir))
        triples, photos, source = read_triples(
            data.layout, folder, rejections, notes, given=given_files(data), images=images, photos=data.photos
        )
    shares = PictureShares(
        data.val_fraction, data.test_fraction, int(data.split_seed), data.folds, int(data.fold)
    )
    return split_relations(
        triples,
        photos,
        relations,
        source,
        shares,
        synonyms=data.synonyms,
        use=data.photos,
        composed=composed,
        rejections=rejections,
        notes=notes,
    )


#: the field of a batch with the numbers of jittered boxes, and the name of this view
JITTERED = "jittered"
#: the field of a batch with numbers that are equal for pairs of the same two boxes
GROUP = "group"
_MOST = 0.45  # of a side at each edge, so that the box keeps an area


class BoxJitter:
    """Adds the field ``jittered`` to training batches in which some pair has no second view.

    It holds the numbers of boxes whose edges are moved by up to ``share`` of the box's size, drawn from (seed, epoch,
    first position of the batch) alone.

    Args:
        values: the training rows, as `BoxTower` reads them.
        tower: gives their numbers, standardised by the training rows.
        share: of a box's width and height, at most .45.
        present: the field that says which pairs have a second view; None: none has.
    """

    def __init__(
        self, values: Float[ndarray, "n 10"], tower: BoxTower, share: float, present: str | None
    ) -> None:
        self.values, self.tower, self.share, self.present = values, tower, min(share, _MOST), present

    def __call__(self, batch: Batch, draw: Draw) -> Batch:
        if self.present is not None and bool(batch.tensor(self.present).all()):
            return batch
        rows, generator = self.values[batch.positions.numpy()], draw.numpy()
        moved = []
        for boxes in (rows[:, :4], rows[:, 4:8]):
            sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
            moved.append(boxes + self.share * sides * generator.uniform(-1, 1, boxes.shape))
        jittered: Tensor = torch.from_numpy(
            self.tower.standardized(np.concatenate([*moved, rows[:, 8:]], axis=1))
        )
        return batch.replaced(**{JITTERED: jittered})


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

    def _identity(self) -> dict[str, object]:
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
