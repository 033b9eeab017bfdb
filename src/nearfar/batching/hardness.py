"""How hard batches really are: counted from the plan, and checked against the embeddings themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nearfar.arguments import array, number, whole_number
from nearfar.batching.mapped_neighbors import UnitVectors
from nearfar.batching.neighbors import Neighbors, _as_rows, as_neighbors
from nearfar.batching.plan import Plan
from nearfar.errors import NearfarError
from nearfar.ids import Ids

if TYPE_CHECKING:
    from nearfar.batching.base import BatchSampler

__all__ = [
    "HardnessReport",
    "SimilarityCheck",
    "check_harder_than_random",
    "in_batch_similarity",
    "measure_hardness",
]


@dataclass(frozen=True)
class HardnessReport:
    """Hardness of one epoch of batches, whole and per quarter.

    - ``neighbors``: mean number of an item's ``k`` nearest neighbours in its batch; ``random`` is what chance
      gives.
    - ``nominal``: share of hard items asked for (None where a sampler has no such option); ``hard_share``:
      share of items that were really drawn as a neighbour, or as a pivot with at least one.
    - ``with_neighbor``: share of items, random ones included, that have one of their ``k`` neighbours in the
      batch.
    - ``false_negatives``: share of in-batch (anchor, negative) pairs at least as similar as ``threshold``,
      and ``anchors_hit``, the share of anchors that have one; None without a threshold. Only pairs in the
      neighbour list are seen, so an item with more than ``stored`` such duplicates is counted low.
    - ``last_to_first``: hardness of the last tenth of the batches over that of the first.
    """

    k: int
    items: int
    neighbors: float
    random: float
    nominal: float | None
    hard_share: float | None
    with_neighbor: float
    threshold: float | None
    false_negatives: float | None
    anchors_hit: float | None
    last_to_first: float
    neighbors_by_quarter: list[float]
    hard_share_by_quarter: list[float] | None
    false_negatives_by_quarter: list[float] | None
    stored: int

    def as_dict(self) -> dict[str, object]:
        """Plain data, for a log line or a file."""
        return asdict(self)

    def __str__(self) -> str:
        def row(values: Iterable[float], digits: int) -> str:
            return " ".join(f"{v:.{digits}f}" for v in values)

        text = (
            f"of an item's {self.k} nearest neighbours {self.neighbors:.2f} are in its batch (random "
            f"{self.random:.2f}), "
            f"by quarter {row(self.neighbors_by_quarter, 2)}"
        )
        if self.hard_share_by_quarter is not None:
            text += f"; hard share {self.nominal:.2f} asked, by quarter {row(self.hard_share_by_quarter, 2)}"
        if self.false_negatives is not None:
            text += (
                f"; likely false negatives (similarity >= {self.threshold:g}): {self.false_negatives:.3%} "
                f"of pairs, "
                f"{self.anchors_hit:.1%} of anchors"
            )
        return text


def measure_hardness(
    plan: Plan,
    neighbors: Neighbors | NDArray[np.integer],
    *,
    k: int | None = None,
    threshold: float | None = None,
    sample: int | None = None,
) -> HardnessReport:
    """Count neighbours and likely false negatives in the batches of a plan, over all ranks.

    ``k`` defaults to all neighbours listed. ``sample`` evenly spaced items stand for all where there are
    more.

    >>> from nearfar.batching import RandomBatchSampler
    >>> ring = np.array([[(i + 1) % 8, (i - 1) % 8] for i in range(8)])
    >>> report = measure_hardness(RandomBatchSampler(8, 8).plan(), ring)
    >>> report.neighbors, report.random
    (2.0, 2.0)
    """
    _check_plan(plan)
    near = as_neighbors(neighbors)
    if near.n != plan.layout.n:
        raise NearfarError(f"the plan is over {plan.layout.n} items, the neighbour list over {near.n}")
    k = near.k if k is None else whole_number("k", k, 1)
    threshold = None if threshold is None else number("threshold", threshold, infinite=True)
    sample = None if sample is None else whole_number("sample", sample, 1)
    if k > near.k:
        raise NearfarError(f"k={k}, but {near.k} neighbours per item are stored")

    total = plan.layout.total
    at = np.arange(total)
    if sample is not None and sample < total:
        at = (np.arange(sample) * (total / sample)).astype(np.int64)
    close = near.too_close(threshold)
    inside, false = near.count_inside(plan.order[at], k, close, plan.labels())

    sizes = np.diff(plan.layout.starts)
    batch = np.searchsorted(plan.layout.starts, at, side="right") - 1
    others = np.maximum(sizes[batch] - 1, 0)  # the negatives of each anchor
    step = batch // plan.layout.world_size
    quarter = np.minimum(4 * step // plan.layout.steps, 3)
    tenth = np.minimum(10 * step // plan.layout.steps, 9)
    first, last = inside[tenth == tenth.min()].mean(), inside[tenth == tenth.max()].mean()

    def quarters(top: NDArray[np.generic], bottom: NDArray[np.generic] | None = None) -> list[float]:
        below = np.ones(len(at)) if bottom is None else bottom
        pairs = [(top[quarter == q].sum(), below[quarter == q].sum()) for q in range(4)]
        return [float(a / b) for a, b in pairs if b > 0]

    hard = None if plan.hard is None else plan.hard[at]
    return HardnessReport(
        k=k,
        items=len(at),
        neighbors=float(inside.mean()),
        random=float(k * others.mean() / (near.n - 1)),
        nominal=plan.nominal,
        hard_share=None if plan.hard is None else float(plan.hard.mean()),
        with_neighbor=float((inside > 0).mean()),
        threshold=threshold,
        false_negatives=None if threshold is None else float(false.sum() / max(others.sum(), 1)),
        anchors_hit=None if threshold is None else float((false > 0).mean()),
        last_to_first=float(last / first) if first > 0 else float("nan"),
        neighbors_by_quarter=quarters(inside),
        hard_share_by_quarter=None if hard is None else quarters(hard),
        false_negatives_by_quarter=None if threshold is None else quarters(false, others),
        stored=near.k,
    )


def _check_plan(plan: object) -> None:
    if not isinstance(plan, Plan):
        raise NearfarError(f"plan is a {type(plan).__name__}; give the plan of a sampler: sampler.plan()")


#: epochs are planned until there are so many batches, but no more epochs than that
ENOUGH_BATCHES, MOST_EPOCHS = 64, 16


def in_batch_similarity(
    embeddings: Tensor | NDArray[np.floating], batches: Iterable[Sequence[int] | NDArray[np.integer]]
) -> NDArray[np.float64]:
    """Mean cosine between different items of each batch, (batches with at least two items,).

    From the length of the sum of unit vectors, so no matrix of pairs: (|Σz|² − b) / (b (b − 1)).

    >>> in_batch_similarity(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), [[0, 1], [0, 2]]).tolist()
    [1.0, 0.0]
    """
    rows = _as_rows(embeddings, "cosine")
    return _similarity(rows, _as_batches("batches", batches, len(rows)))


def _as_batches(name: str, batches: object, n: int) -> list[NDArray[np.integer]]:
    """Checked batches of positions; any iterable of sequences of whole numbers."""
    needs = "batches of positions: an iterable of lists of whole numbers"
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise NearfarError(f"{name} is a {type(batches).__name__}; give {needs}")
    checked = []
    for at, batch in enumerate(batches):
        members = array(f"batch {at} of {name}", batch, needs, "iu")
        if members.ndim != 1:
            raise NearfarError(f"batch {at} of {name} has shape {members.shape}; give {needs}")
        if members.size and (members.min() < 0 or members.max() >= n):
            raise NearfarError(
                f"batch {at} of {name} holds positions {members.min()} to {members.max()}, but there are {n} "
                "embeddings"
            )
        checked.append(members)
    return checked


def _similarity(rows: NDArray[np.float32] | UnitVectors, batches: Iterable[object]) -> NDArray[np.float64]:
    values = []
    for batch in batches:
        members = rows[np.asarray(batch, dtype=np.int64)].astype(np.float64)
        if len(members) >= 2:
            total = members.sum(0)
            squares = (members * members).sum()
            values.append((total @ total - squares) / (len(members) * (len(members) - 1)))
    return np.array(values)


@dataclass(frozen=True)
class SimilarityCheck:
    """Mean cosine inside the batches of a sampler against random batches of the same sizes.

    ``difference`` comes with an interval (``low``, ``high``) of ``z`` = difference / standard error;
    ``harder`` says whether the whole interval lies above 0. ``aligned`` says whether the sampler's listed neighbours
    are near in these embeddings at all (None where it has no list): if they are, batches that are no harder than random
    ones are so for a different reason than a list in the wrong order.
    """

    similarity: float
    random: float
    difference: float
    low: float
    high: float
    z: float
    batches: int
    harder: bool
    aligned: bool | None = None

    @property
    def advice(self) -> str:
        """What to do where batches are not harder."""
        if self.aligned:
            return (
                "the neighbours are in the right order, so that random batches of this size hold as near ones already: "
                "take smaller batches, a lower hardness_k or a higher hard_ratio"
            )
        return (
            "most likely the neighbours were computed in a different order than the dataset's. Compare ids "
            "(sampler.check_ids), realign with neighbors.aligned_to(ids), or raise a hard_ratio that is very small"
        )

    def __str__(self) -> str:
        return (
            f"mean cosine in a batch {self.similarity:.4f}, in random batches {self.random:.4f}: difference "
            f"{self.difference:+.4f} ({self.low:+.4f} to {self.high:+.4f}), over {self.batches} batches"
        )


def check_harder_than_random(
    sampler: BatchSampler | Iterable[Sequence[int]],
    embeddings: Tensor | NDArray[np.floating] | UnitVectors,
    *,
    ids: Ids | None = None,
    epoch: int | None = None,
    max_batches: int = 256,
    errors: float = 3.0,
    seed: int = 0,
    raises: bool = True,
) -> SimilarityCheck:
    """The A/A check: are the items of a batch more alike than chance, in the order the *dataset* gives?

    Pass the embeddings in the loader's order (row i belongs to position i). Neighbour indices that were
    computed in a different order make batches random without any error; here that shows as a difference that is
    not above 0 by ``errors`` standard errors, and raises `NearfarError` (``raises=False`` returns the verdict
    instead). Of lists on disk, ``near.directions`` are such embeddings. ``ids`` of the rows are compared first if
    given. ``epoch`` chooses the epoch, by default the first one after the curriculum; where an epoch has few batches,
    those of the next ones count as well. An iterable of batches does instead of a sampler.
    """
    from nearfar.batching.base import BatchSampler

    rows = embeddings if isinstance(embeddings, UnitVectors) else _as_rows(embeddings, "cosine")
    max_batches, seed = whole_number("max_batches", max_batches, 2), whole_number("seed", seed, 0)
    errors = number("errors", errors, 0, infinite=True)
    epoch = None if epoch is None else whole_number("epoch", epoch, 0)
    if isinstance(sampler, BatchSampler):
        if ids is not None:
            sampler.check_ids(ids)
        if len(rows) != sampler.n:
            raise NearfarError(f"there are {len(rows)} embeddings, but the sampler is over {sampler.n} items")
        start = getattr(sampler, "curriculum_epoch", 0)
        first = max(sampler.epoch, start) if epoch is None else epoch
        batches: list[np.ndarray] = []
        for at in range(first, first + MOST_EPOCHS):
            found_batches = sampler.plan(at).batches()
            batches += found_batches
            if len(batches) >= ENOUGH_BATCHES or len(found_batches) < 2:
                break
    else:
        batches = _as_batches("sampler", sampler, len(rows))
        if ids is not None:
            raise NearfarError(
                "ids are compared with those of a sampler, and plain batches were given; leave out ids"
            )
    batches = [batch for batch in batches if len(batch) >= 2]
    if len(batches) < 2:
        raise NearfarError(
            f"{len(batches)} batch(es) of two or more items are too few to tell hard from random; "
            "use smaller batches or more items"
        )
    if len(batches) > max_batches:
        batches = [batches[at] for at in np.linspace(0, len(batches) - 1, max_batches).astype(int)]
    rng = np.random.default_rng(seed)
    chance = [rng.choice(len(rows), len(batch), replace=False) for _ in range(4) for batch in batches]
    realised, expected = _similarity(rows, batches), _similarity(rows, chance)
    difference = float(realised.mean() - expected.mean())
    error = float(np.sqrt(realised.var(ddof=1) / len(realised) + expected.var(ddof=1) / len(expected)))
    error = max(error, 1e-9)
    check = SimilarityCheck(
        similarity=float(realised.mean()),
        random=float(expected.mean()),
        difference=difference,
        low=difference - errors * error,
        high=difference + errors * error,
        z=difference / error,
        batches=len(batches),
        harder=difference > errors * error,
        aligned=_aligned(rows, getattr(sampler, "neighbors", None), errors, seed),
    )
    if raises and not check.harder:
        raise NearfarError(f"these batches are not harder than random ones ({check}): {check.advice}")
    return check


def _aligned(
    rows: NDArray[np.float32] | UnitVectors, neighbors: Neighbors | None, errors: float, seed: int
) -> bool | None:
    """Are listed neighbours nearer than random rows, by ``errors`` standard errors?"""
    if neighbors is None or neighbors.n != len(rows):
        return None
    rng = np.random.default_rng(seed)
    at = rng.choice(len(rows), min(len(rows), 2000), replace=False)
    listed = neighbors.indices[at, 0]
    present = listed >= 0
    at, listed = at[present], listed[present]
    if len(at) < 2:
        return None
    gain = (rows[at] * (rows[listed] - rows[rng.permutation(len(rows))[: len(at)]])).sum(1, dtype=np.float64)
    return bool(gain.mean() > errors * max(gain.std(ddof=1) / np.sqrt(len(gain)), 1e-9))
