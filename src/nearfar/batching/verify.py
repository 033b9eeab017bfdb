"""The self-test of the samplers: known clusters, chance, and a misaligned list that must show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.arguments import whole_number
from nearfar.batching.base import BatchSampler
from nearfar.batching.hard_negative import HardNegativeSampler
from nearfar.batching.hardness import check_harder_than_random
from nearfar.batching.neighbors import Neighbors, nearest_neighbors
from nearfar.batching.partition import PartitionBatchSampler
from nearfar.batching.random import RandomBatchSampler

__all__ = ["SamplerVerdict", "VerdictRow", "verify_sampler"]

ITEMS, CLUSTERS, BATCH, EPOCHS = 100, 5, 10, 10


@dataclass(frozen=True)
class VerdictRow:
    """One sampler under test.

    ``largest`` is the mean share of a batch's most frequent cluster, ``same_pairs`` the share of in-batch
    pairs from one cluster (``chance``: what random batches give); ``clusters`` (batches, clusters) counts the
    first epoch; ``harder`` is the verdict of the A/A check, ``expected`` what it must be, and ``once``
    whether every epoch used every item exactly once.
    """

    name: str
    expected: bool
    harder: bool
    once: bool
    largest: float
    same_pairs: float
    chance: float
    z: float
    clusters: list[list[int]]

    @property
    def passed(self) -> bool:
        """The A/A check says what it must, and every item came once."""
        return self.once and self.harder == self.expected


@dataclass(frozen=True)
class SamplerVerdict:
    """All rows of the self-test; ``passed`` if every one did."""

    rows: list[VerdictRow]

    @property
    def passed(self) -> bool:
        """Whether the samplers can be trusted."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        lines = [
            f"{ITEMS} vectors in {CLUSTERS} clusters, batches of {BATCH}, {EPOCHS} epochs; "
            f"{self.rows[0].chance:.3f} of the pairs of a random batch are from one cluster",
            f"{'sampler':34} {'largest':>8} {'same pairs':>11} {'z':>7}  {'harder':7} {'must be':8} verdict",
        ]
        for row in self.rows:
            seen, must = ("yes" if value else "no" for value in (row.harder, row.expected))
            lines.append(
                f"{row.name:34} {row.largest:8.2f} {row.same_pairs:11.3f} {row.z:7.1f}  {seen:7} {must:8} "
                f"{'ok' if row.passed else 'FAILED'}{'' if row.once else ' (items missing or repeated)'}"
            )
        return "\n".join(lines)


def verify_sampler(seed: int = 0) -> SamplerVerdict:
    """Run the samplers on 100 vectors in 5 clusters and judge their batches against random ones.

    Random batches must look random, hard and partition batches harder, and hard batches from a neighbour list
    in a different order than the vectors must be *detected* as no harder than random.

    >>> verify_sampler().passed
    True
    """
    seed = whole_number("seed", seed, 0)
    rng = np.random.default_rng([seed, 5])
    cluster = rng.permutation(np.arange(ITEMS) % CLUSTERS)
    vectors = rng.standard_normal((CLUSTERS, 32))[cluster] + 0.4 * rng.standard_normal((ITEMS, 32))
    near = nearest_neighbors(vectors, 15)
    other = rng.permutation(ITEMS)
    misaligned = Neighbors(nearest_neighbors(vectors[other], 15).indices)
    options: dict[str, Any] = {"hardness_k": 15, "seed": seed}
    return SamplerVerdict(
        [
            _judge("random", RandomBatchSampler(ITEMS, BATCH, seed=seed), False, vectors, cluster),
            _judge(
                "hard, level, ratio 0.5", HardNegativeSampler(near, BATCH, **options), True, vectors, cluster
            ),
            _judge(
                "hard, greedy, ratio 0.5",
                HardNegativeSampler(near, BATCH, order="greedy", **options),
                True,
                vectors,
                cluster,
            ),
            _judge("partition", PartitionBatchSampler(near, BATCH, seed=seed), True, vectors, cluster),
            _judge(
                "hard, neighbours misaligned",
                HardNegativeSampler(misaligned, BATCH, **options),
                False,
                vectors,
                cluster,
            ),
            _judge(
                "partition, neighbours misaligned",
                PartitionBatchSampler(misaligned, BATCH, seed=seed),
                False,
                vectors,
                cluster,
            ),
        ]
    )


def _judge(
    name: str, sampler: BatchSampler, expected: bool, vectors: NDArray[np.float64], cluster: NDArray[np.int64]
) -> VerdictRow:
    epochs = [list(sampler) for _ in range(EPOCHS)]  # each pass moves on to the next epoch
    batches = [batch for epoch in epochs for batch in epoch]
    check = check_harder_than_random(batches, vectors, raises=False)
    counts = np.array([np.bincount(cluster[batch], minlength=CLUSTERS) for batch in batches])
    sizes = counts.sum(1)
    whole = np.bincount(cluster)
    return VerdictRow(
        name=name,
        expected=expected,
        harder=check.harder,
        once=all(sorted(i for batch in epoch for i in batch) == list(range(ITEMS)) for epoch in epochs),
        largest=float((counts.max(1) / sizes).mean()),
        same_pairs=float((counts * (counts - 1)).sum() / (sizes * (sizes - 1)).sum()),
        chance=float((whole * (whole - 1)).sum() / (ITEMS * (ITEMS - 1))),
        z=check.z,
        clusters=counts[: len(sampler)].tolist(),
    )
