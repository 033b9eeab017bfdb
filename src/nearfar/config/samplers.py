"""The group ``sampler``: which batches a run gets. One class for each choice: its options, and how it is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar, cast

from nearfar.config.options import group, group_variants, option, path
from nearfar.config.registry import options_class, systems
from nearfar.config.rules import Scheduled
from nearfar.config.training import RunOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.schedules import schedule

if TYPE_CHECKING:
    import numpy as np

    from nearfar.batching import BatchSampler, HardNegativeSampler, Neighbors

__all__ = [
    "HardBatchOptions",
    "Items",
    "SamplerOptions",
    "balanced",
    "hard",
    "partition",
    "random",
    "spatial",
]


#: the options of the runs that a sampler is for
Options = TypeVar("Options", bound=RunOptions)


@dataclass
class Items:
    """What samplers are built over: items 0 … n − 1, and what is known of them.

    ``neighbors`` is what hard batches are made of, ``labels()`` what balanced ones are; ``places``, positions (n, 2)
    and slides (n,), what spatial ones are.
    """

    n: int
    neighbors: Neighbors | None = None
    labels: Callable[[], np.ndarray] | None = None
    places: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class SamplerOptions(ABC, Generic[Options]):
    """A choice of sampler; ``composes_hard_batches``: whether its batches are meant to be harder than random ones."""

    composes_hard_batches: ClassVar[bool] = False
    name: str = option("", "the sampler")

    @abstractmethod
    def build(self, options: Options, items: Items) -> BatchSampler:
        """The sampler of a run with these ``options``; ``NearfarError`` where the items lack what it needs."""

    def begin_epoch(self, options: Options, sampler: object, epoch: int) -> dict[str, float]:
        """Apply the schedules of an epoch, counted from 0; what was set goes into the log."""
        return {}

    @property
    def lists(self) -> str | None:
        """The folder of neighbours that hard batches are made of; None: they are computed."""
        return None


@dataclass
class NeighborSampler(SamplerOptions["HardBatchOptions"]):
    """Options of samplers whose batches are made of neighbours."""

    composes_hard_batches: ClassVar[bool] = True
    neighbors: str | None = path(
        None,
        "a folder that nearfar neighbors wrote of the training rows: its lists are taken, and none computed",
        role="batches",
    )

    @property
    def lists(self) -> str | None:
        return self.neighbors


@dataclass
class RandomSampler(SamplerOptions[RunOptions]):
    """Every item once an epoch, in random order."""

    name: Literal["random"] = "random"

    def build(self, options: RunOptions, items: Items) -> BatchSampler:
        from nearfar.batching import RandomBatchSampler

        return RandomBatchSampler(items.n, options.batch_size, seed=options.seed)


@dataclass
class BalancedSampler(SamplerOptions[RunOptions]):
    """As many items of each class in a batch."""

    name: Literal["balanced"] = "balanced"

    def build(self, options: RunOptions, items: Items) -> BatchSampler:
        from nearfar.batching import BalancedBatchSampler

        if items.labels is None:
            raise NearfarError(
                "sampler=balanced needs class labels, and this data has none; use sampler=random."
            )
        return BalancedBatchSampler(items.labels(), options.batch_size, seed=options.seed)


@dataclass
class HardSampler(NeighborSampler):
    """Groups of a pivot, unused neighbours of it and random items (``hard_ratio``, ``hardness_k``, ``group_size``)."""

    name: Literal["hard"] = "hard"
    order: Literal["level", "greedy"] = option(
        "level", "level: all groups first, then shuffled into batches; greedy: batch by batch", role="batches"
    )

    def build(self, options: HardBatchOptions, items: Items) -> BatchSampler:
        from nearfar.batching import HardNegativeSampler

        assert items.neighbors is not None
        return HardNegativeSampler(
            items.neighbors,
            options.batch_size,
            hard_ratio=options.scheduled("hard_ratio", 0),
            hardness_k=int(options.scheduled("hardness_k", 0)),
            curriculum_epoch=options.curriculum_epoch,
            group_size=options.group_size,
            order=self.order,
            false_negative_threshold=options.false_negative_threshold,
            seed=options.seed,
        )

    def begin_epoch(self, options: HardBatchOptions, sampler: object, epoch: int) -> dict[str, float]:
        hard = cast("HardNegativeSampler", sampler)
        hard.hard_ratio = options.scheduled("hard_ratio", epoch)
        hard.hardness_k = int(options.scheduled("hardness_k", epoch))
        return {"hard_ratio": hard.hard_ratio, "hardness_k": hard.hardness_k}


@dataclass
class PartitionSampler(NeighborSampler):
    """The neighbour graph cut into groups of the same size: hardness stays level through the epoch."""

    name: Literal["partition"] = "partition"

    def build(self, options: HardBatchOptions, items: Items) -> BatchSampler:
        from nearfar.batching import PartitionBatchSampler

        assert items.neighbors is not None
        return PartitionBatchSampler(
            items.neighbors,
            options.batch_size,
            group_size=options.group_size,
            curriculum_epoch=options.curriculum_epoch,
            false_negative_threshold=options.false_negative_threshold,
            seed=options.seed,
        )


@dataclass
class SpatialSampler(SamplerOptions[RunOptions]):
    """Compact tiles of slides, mixed over slides: neighbours share a batch."""

    name: Literal["spatial"] = "spatial"
    tile_size: int | None = option(
        None,
        "items of a tile; null: a quarter of the batch, at least 8; the batch size: one tile a batch",
        least=1,
        role="batches",
    )

    def build(self, options: RunOptions, items: Items) -> BatchSampler:
        from nearfar.batching import SpatialBatchSampler

        if items.places is None:
            raise NearfarError("sampler=spatial needs items with a place on a slide, and this data has none.")
        return SpatialBatchSampler(*items.places, options.batch_size, self.tile_size, seed=options.seed)


random, balanced, hard = RandomSampler(), BalancedSampler(), HardSampler()
partition, spatial = PartitionSampler(), SpatialSampler()


def sampler_choices(system: str) -> Mapping[str, SamplerOptions]:
    """The samplers that a system may be trained with, by name; those of any items for a system that is not registered.

    >>> [name for name, each in sampler_choices("molecules").items() if each.composes_hard_batches]
    ['hard', 'partition']
    """
    cls = options_class(system) if system in systems() else HardBatchOptions
    return group_variants(cls, "sampler")


@dataclass
class HardBatchOptions(RunOptions):
    """Options of systems whose batches may be hard: what ``sampler=hard`` and ``sampler=partition`` follow."""

    hard_ratio: float | str | Json = option(
        0.5,
        'of sampler=hard: share of a batch that is hard, the pivot counted in; "0.3 -> 0.6" is a schedule',
        rule=Scheduled(0, 1, what="a share of the batch"),
        role="batches",
    )
    hardness_k: int | str | Json = option(
        100,
        "nearest neighbours that hard items are drawn from",
        rule=Scheduled(1, whole=True, what="a whole number of neighbours"),
        role="batches",
    )
    curriculum_epoch: int = option(0, "epochs of random batches before hard ones", least=0, role="batches")
    group_size: int | None = option(
        None, "items of a group that are near each other; null: a part of the batch", least=2, role="batches"
    )
    false_negative_threshold: float | None = option(
        None,
        "cosine from which a negative's text is so similar to the anchor's that it is masked, such as .95",
        role="loss",
    )

    sampler: SamplerOptions = group(
        random=random, balanced=balanced, hard=hard, partition=partition, role="batches"
    )

    def check(self) -> None:
        super().check()
        if self.sampler.composes_hard_batches and self.curriculum_epoch >= self.epochs:
            raise NearfarError(
                f"curriculum_epoch={self.curriculum_epoch} of epochs={self.epochs}: no batch would ever be hard. "
                "Lower curriculum_epoch, or take sampler=random."
            )
        threshold = self.false_negative_threshold
        if threshold is not None and not -1 < threshold <= 1:
            raise NearfarError(
                f"false_negative_threshold={threshold}: a cosine between -1 and 1 is needed (.95 is usual)."
            )

    def scheduled(self, name: str, epoch: int) -> float:
        """The value of ``hard_ratio`` or ``hardness_k`` in an epoch, counted from 0."""
        rule = schedule(getattr(self, name), integer=name == "hardness_k")
        return float(rule(epoch, self.epochs))

    def largest(self, name: str) -> float:
        """The largest value of that schedule in the run."""
        return max(self.scheduled(name, epoch) for epoch in range(self.epochs))
