"""Which batches a run gets: the sampler its configuration names, its schedules, and what it really delivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nearfar.batching import (
    BalancedBatchSampler,
    HardNegativeSampler,
    Neighbors,
    PartitionBatchSampler,
    RandomBatchSampler,
    SpatialBatchSampler,
    check_harder_than_random,
    measure_hardness,
)
from nearfar.errors import NearfarError, nearest_name
from nearfar.schedules import schedule

__all__ = ["build_sampler", "check_batches", "epoch_record", "neighbors_needed"]

#: samplers of items of any kind, and of those that have a place on a slide
SAMPLERS = ("random", "balanced", "hard", "partition")
SPATIAL_SAMPLERS = ("random", "balanced", "spatial")
ALL_SAMPLERS = (*SAMPLERS, "spatial")

#: an item's nearest neighbours that hardness counts: at most so many, and of a small set its nearest tenth
HARDNESS_NEIGHBORS = 100
#: similarity from which a pair is counted as a likely false negative where no threshold is set
LIKELY_FALSE_NEGATIVE = 0.95
#: items by which the hardness of an epoch is judged; more would cost time in every epoch and change the third digit
SAMPLE = 20_000


def _values(spec: Any, epochs: int, integer: bool = False) -> list[float]:
    rule = schedule(spec, integer=integer)
    return [rule(epoch, epochs) for epoch in range(epochs)]


def neighbors_needed(config: Any, n: int) -> int:
    """How many neighbours of every item a run needs: for the sampler's largest ``hardness_k``, and to measure hardness.

    ``hardness_k`` larger than the set is an error and not silently cut.
    """
    largest = int(max(_values(config.hardness_k, config.epochs, integer=True)))
    if config.sampler.name in ("hard", "partition") and largest > n - 1:
        raise NearfarError(
            f"hardness_k={largest}, but the training set has {n} items, so each has {n - 1} neighbours. "
            f"Set hardness_k={n - 1} or less (10 to 200 is usual)."
        )
    return min(n - 1, max(largest, HARDNESS_NEIGHBORS))


def build_sampler(
    config: Any,
    n: int,
    neighbors: Neighbors | None,
    labels: np.ndarray | None = None,
    places: tuple[np.ndarray, np.ndarray] | None = None,
) -> Any:
    """The sampler that ``config.sampler.name`` names, over items 0 … n − 1.

    ``neighbors`` is what hard batches are made of, ``labels`` what balanced ones are; ``places``, positions (n, 2) and
    slides (n,), what spatial ones are.
    """
    name, size, seed = config.sampler.name, config.batch_size, config.seed
    if size > n:
        raise NearfarError(f"batch_size={size} is larger than the training set of {n} items; lower it.")
    if size < 2:
        raise NearfarError(f"batch_size={size}: a contrastive batch needs at least 2 items.")
    if name == "random":
        return RandomBatchSampler(n, size, seed=seed)
    if name == "balanced":
        if labels is None:
            raise NearfarError(
                "sampler=balanced needs class labels, and this data has none; use sampler=random."
            )
        return BalancedBatchSampler(labels, size, seed=seed)
    if name == "spatial":
        if places is None:
            raise NearfarError("sampler=spatial needs items with a place on a slide, and this data has none.")
        return SpatialBatchSampler(*places, size, config.sampler.get("tile_size"), seed=seed)
    if name == "hard":
        assert neighbors is not None
        return HardNegativeSampler(
            neighbors,
            size,
            hard_ratio=_values(config.hard_ratio, config.epochs)[0],
            hardness_k=int(_values(config.hardness_k, config.epochs, integer=True)[0]),
            curriculum_epoch=config.curriculum_epoch,
            group_size=config.group_size,
            order=config.sampler.get("order", "level"),
            false_negative_threshold=config.false_negative_threshold,
            seed=seed,
        )
    if name == "partition":
        assert neighbors is not None
        return PartitionBatchSampler(
            neighbors,
            size,
            group_size=config.group_size,
            curriculum_epoch=config.curriculum_epoch,
            false_negative_threshold=config.false_negative_threshold,
            seed=seed,
        )
    raise NearfarError(f"sampler={name}: there is no such sampler; {nearest_name(str(name), ALL_SAMPLERS)}")


def epoch_record(
    config: Any, epoch: int, sampler: Any, neighbors: Neighbors, say: Callable[[str], None]
) -> dict[str, Any]:
    """Apply the schedules of epoch ``epoch`` (from 0) and measure the batches that come out of them."""
    record: dict[str, Any] = {"sampler": config.sampler.name}
    if epoch == 0 and config.curriculum_epoch and config.sampler.name not in ("hard", "partition"):
        say(f"curriculum_epoch has no effect: sampler={config.sampler.name} has no hard batches to switch to")
    if config.sampler.name == "hard":
        sampler.hard_ratio = float(schedule(config.hard_ratio)(epoch, config.epochs))
        sampler.hardness_k = int(schedule(config.hardness_k, integer=True)(epoch, config.epochs))
        record |= {"hard_ratio": sampler.hard_ratio, "hardness_k": sampler.hardness_k}
    if config.sampler.name in ("hard", "partition"):
        record["random_phase"] = epoch < config.curriculum_epoch
        if config.curriculum_epoch and epoch in (0, config.curriculum_epoch):
            phase = (
                "hard batches from here on"
                if epoch
                else f"random batches up to epoch {config.curriculum_epoch}"
            )
            say(f"curriculum: {phase} (epoch {epoch + 1})")
    sampler.set_epoch(epoch)
    threshold = config.false_negative_threshold
    if threshold is None:
        threshold = LIKELY_FALSE_NEGATIVE
    k = max(1, min(neighbors.k, HARDNESS_NEIGHBORS, neighbors.n // 10))
    report = measure_hardness(sampler.plan(), neighbors, k=k, threshold=threshold, sample=SAMPLE)
    return record | {
        "hardness": report.neighbors_by_quarter,
        "hardness_random": report.random,
        "hardness_neighbors": k,
        "last_to_first": report.last_to_first,
        "nominal_hard": report.nominal,
        "realised_hard": report.hard_share_by_quarter,
        "false_negatives": report.false_negatives,
        "anchors_with_false_negative": report.anchors_hit,
        "false_negative_threshold": threshold,
    }


def check_batches(config: Any, sampler: Any, embeddings: np.ndarray, say: Callable[[str], None]) -> None:
    """The A/A check: batches called hard must hold items more alike than random batches do.

    Raises ``NearfarError`` otherwise: the usual reason is a neighbour list in another order than the data.
    """
    if config.sampler.name not in ("hard", "partition"):
        return
    if config.sampler.name == "partition":
        _say_how_hard(sampler, embeddings, say)
        return
    # A schedule may begin with random batches (hard_ratio 0): what is checked is the hardest it will come to.
    first, hardest = sampler.hard_ratio, max(_values(config.hard_ratio, config.epochs))
    if hardest == 0:
        say("A/A check: none, every batch is random (hard_ratio=0)")
        return
    sampler.hard_ratio = hardest
    try:
        _say_how_hard(sampler, embeddings, say)
    finally:
        sampler.hard_ratio = first


def _say_how_hard(sampler: Any, embeddings: np.ndarray, say: Callable[[str], None]) -> None:
    found = check_harder_than_random(sampler, embeddings, raises=False)
    say(f"A/A check: {found}")
    if found.harder:
        return
    if not found.aligned:
        raise NearfarError(f"these batches are not harder than random ones ({found}): {found.advice}")
    say(f"warning: these batches are not harder than random ones; {found.advice}")
