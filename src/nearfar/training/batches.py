"""Which batches a run gets: its sampler, the schedules of an epoch, and what the batches really are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import cast

import numpy as np
from jaxtyping import Float

from nearfar.batching import (
    BatchSampler,
    MappedNeighbors,
    Neighbors,
    check_harder_than_random,
    measure_hardness,
    nearest_neighbors,
)
from nearfar.batching.mapped_neighbors import UnitVectors
from nearfar.batching.stretches import STRETCH_BYTES
from nearfar.config.samplers import HardBatchOptions, Items, SamplerOptions
from nearfar.config.training import RunOptions
from nearfar.data.cache import cached_arrays
from nearfar.data.files import Json
from nearfar.data.mapped import IdPlaces
from nearfar.errors import NearfarError
from nearfar.training.system import TrainSampler

__all__ = [
    "build_sampler",
    "cached_neighbors",
    "check_batches",
    "epoch_record",
    "listed_neighbors",
    "neighbors_needed",
    "without_zero_rows",
]

#: an item's nearest neighbours that hardness counts: at most so many, and of a small set its nearest tenth
HARDNESS_NEIGHBORS = 100
#: similarity from which a pair is counted as a likely false negative where no threshold is set
LIKELY_FALSE_NEGATIVE = 0.95
#: items by which the hardness of an epoch is judged; more would cost time in every epoch and change the third digit
SAMPLE = 20_000


def neighbors_needed(config: HardBatchOptions, n: int) -> int:
    """How many neighbours of every item a run needs: for the sampler's largest ``hardness_k``, and to measure hardness.

    ``hardness_k`` larger than the set is an error and not silently cut.
    """
    largest = int(config.largest("hardness_k"))
    if config.sampler.composes_hard_batches and largest > n - 1:
        raise NearfarError(
            f"hardness_k={largest}, but the training set has {n} items, so each has {n - 1} neighbours. "
            f"Set hardness_k={n - 1} or less (10 to 200 is usual)."
        )
    return min(n - 1, max(largest, HARDNESS_NEIGHBORS))


def build_sampler(config: RunOptions, items: Items) -> BatchSampler:
    """The sampler that the configuration chooses, over ``items``."""
    size = config.batch_size
    if size > items.n:
        raise NearfarError(f"batch_size={size} is larger than the training set of {items.n} items; lower it.")
    sampler: SamplerOptions = config.sampler  # type: ignore[attr-defined]
    return sampler.build(config, items)


def epoch_record(
    config: HardBatchOptions,
    epoch: int,
    sampler: TrainSampler,
    neighbors: Neighbors,
    say: Callable[[str], None],
) -> Json:
    """Apply the schedules of epoch ``epoch`` (from 0) and measure the batches that come out of them."""
    choice = config.sampler
    record: Json = {
        "sampler": choice.name,
        "composes_hard_batches": choice.composes_hard_batches,
    } | choice.begin_epoch(config, sampler, epoch)
    if choice.composes_hard_batches:
        record["random_phase"] = epoch < config.curriculum_epoch
        if config.curriculum_epoch and epoch in (0, config.curriculum_epoch):
            phase = (
                "hard batches from here on"
                if epoch
                else f"random batches up to epoch {config.curriculum_epoch}"
            )
            say(f"curriculum: {phase} (epoch {epoch + 1})")
    elif epoch == 0 and config.curriculum_epoch:
        say(f"curriculum_epoch has no effect: sampler={choice.name} has no hard batches to switch to")
    sampler.set_epoch(epoch)
    threshold = config.false_negative_threshold
    if threshold is None:
        threshold = LIKELY_FALSE_NEGATIVE
    k = max(1, min(neighbors.k, HARDNESS_NEIGHBORS, neighbors.n // 10))
    report = measure_hardness(
        cast(BatchSampler, sampler).plan(), neighbors, k=k, threshold=threshold, sample=SAMPLE
    )
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


def check_batches(
    config: HardBatchOptions,
    sampler: TrainSampler,
    embeddings: np.ndarray | UnitVectors,
    say: Callable[[str], None],
) -> None:
    """The A/A check: batches called hard must hold items more alike than random batches do.

    Raises ``NearfarError`` otherwise: the usual reason is a neighbour list in a different order from the data.
    """
    if not config.sampler.composes_hard_batches:
        return
    if not hasattr(sampler, "hard_ratio"):
        _say_how_hard(sampler, embeddings, say)
        return
    # A schedule may begin with random batches (hard_ratio 0): what is checked is the hardest it will come to.
    first, hardest = sampler.hard_ratio, config.largest("hard_ratio")
    if hardest == 0:
        say("A/A check: none, every batch is random (hard_ratio=0)")
        return
    sampler.hard_ratio = hardest
    try:
        _say_how_hard(sampler, embeddings, say)
    finally:
        sampler.hard_ratio = first


def _say_how_hard(
    sampler: TrainSampler, embeddings: np.ndarray | UnitVectors, say: Callable[[str], None]
) -> None:
    check = check_harder_than_random(sampler, embeddings, raises=False)
    say(f"A/A check: {check}")
    if check.harder:
        return
    if not check.aligned:
        raise NearfarError(f"these batches are not harder than random ones ({check}): {check.advice}")
    say(f"warning: these batches are not harder than random ones; {check.advice}")


def cached_neighbors(directions: Float[np.ndarray, "n d"], k: int, ids: list[str]) -> Neighbors:
    """``nearest_neighbors``, cached by content.

    The cache saves time, and a resumed run needs exactly the same list: with a different number of threads rounding
    may swap two neighbours of nearly equal similarity.
    """

    def search() -> dict[str, np.ndarray]:
        neighbors = nearest_neighbors(directions, k)
        assert neighbors.similarities is not None
        how = {
            "exact": neighbors.exact,
            "index": neighbors.index,
            "recall": neighbors.recall,
            "queries": neighbors.queries,
        }
        return {
            "indices": neighbors.indices,
            "similarities": neighbors.similarities,
            "how": np.array(json.dumps(how)),
        }

    kept = cached_arrays("neighbors", [1, directions, k], search)
    how = json.loads(str(kept["how"]))
    return Neighbors(kept["indices"], kept["similarities"], np.asarray(ids), **how)


def listed_neighbors(
    config: HardBatchOptions, ids: list[str], say: Callable[[str], None]
) -> tuple[Neighbors, UnitVectors]:
    """The lists in the folder ``sampler.neighbors``, in the order of the training items, whose ``ids`` these are, and
    the vectors that they are of.

    Lists of at most 256 MB are read into memory; of longer ones samplers read a stretch at a time. Raises
    ``NearfarError`` where they are of other rows, or shorter than ``hardness_k``.
    """
    name = config.sampler.lists
    assert name is not None
    near = MappedNeighbors(name)
    remedy = (
        "List the neighbours of the training rows alone, in a file of their own: nearfar embed RUN TRAIN -o v.parquet, "
        "nearfar neighbors v.parquet --view VIEW -o FOLDER."
    )
    if near.n != len(ids):
        raise NearfarError(
            f"sampler.neighbors={name} has lists of {near.n} rows, and the training set has {len(ids)}. {remedy}"
        )
    if near.ids is not None:
        place = IdPlaces(near.ids).of(ids)
        unknown = np.flatnonzero(place < 0)
        if len(unknown):
            raise NearfarError(
                f"sampler.neighbors={name} has lists of other rows: {len(unknown)} of {len(ids)} training rows are not "
                f"among them (first: {ids[unknown[0]]!r}). {remedy}"
            )
        if (place != np.arange(len(ids))).any():
            near = near.aligned_to(near.ids[place])
    largest = int(config.largest("hardness_k"))
    if largest > near.k:
        raise NearfarError(
            f"hardness_k={largest}, and sampler.neighbors={name} lists {near.k} of each row: set hardness_k={near.k} "
            f"or less, or list more with nearfar neighbors --k {largest}."
        )
    order = "in the order of the training set, as no ids say otherwise" if near.ids is None else "by id"
    say(
        f"neighbours: {near.k} of each of {near.n} rows from {name}, {order} ({near.index}; recall {near.recall:.4f})"
    )
    return near.held() if near.n * near.k * 4 <= STRETCH_BYTES else near, near.directions


def without_zero_rows(
    vectors: Float[np.ndarray, "n d"], say: Callable[[str], None]
) -> Float[np.ndarray, "n d"]:
    """Vectors in which a row of zeros (a text without a known term) has a random direction.

    In many dimensions a random direction is near to no other. If more than half of the rows are zero, the encoder does
    not suit these values: an error.
    """
    unknown = ~vectors.any(axis=1)
    count = int(unknown.sum())
    if not count:
        return vectors
    if count > len(vectors) / 2:
        raise NearfarError(
            f"{count} of {len(vectors)} training texts hold no term that the text encoder kept. Terms in nearly all "
            "texts or in one alone are left out: try text_encoder.max_df=1.0, text_encoder.min_df=1, or a different "
            "text_encoder."
        )
    known = f"{count} of {len(vectors)} training texts hold no term that the text encoder kept"
    say(f"{known}; they have no real neighbours")
    directions = vectors.copy()
    directions[unknown] = (
        np.random.default_rng(0).standard_normal((count, vectors.shape[1])).astype(vectors.dtype)
    )
    return directions
