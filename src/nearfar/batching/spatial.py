"""Batches of compact tiles of slides: neighbours in space share a batch, and a batch holds several slides."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nearfar.arguments import array, whole_number
from nearfar.batching.base import BatchSampler, digest
from nearfar.batching.plan import Plan
from nearfar.errors import NearfarError
from nearfar.ids import Ids, canonical_ids

__all__ = ["SpatialBatchSampler", "positions_in_batch", "weight_in_batch"]

#: tiles in a batch where no size is given, and the least size that still holds most neighbours of its items
_TILES, _LEAST = 4, 8


class SpatialBatchSampler(BatchSampler):
    """Every batch a few compact tiles, from different slides as far as there are several.

    In each epoch every slide is turned by a random angle and cut in half again and again across its longer side,
    until pieces of ``tile_size`` items are left (the leaves of a k-d tree, Bentley 1975). Tiles are then dealt so
    that each slide is spread evenly over the epoch. What a slide leaves over forms the last tiles, from pieces of
    several slides. With random batches a target with mass on neighbours is inert (`weight_in_batch` says by how
    much); with tiles the neighbours are there, and other slides give the negatives that are far away.

    Args:
        positions: (n, 2) place of every item on its slide, in any unit.
        slides: (n,) the slide of every item, whatever names it; None for a single one.
        batch_size: items of a batch (and rank).
        tile_size: items of a tile. By default a quarter of the batch, at least 8. A batch is cut into the fewest
            nearly equal tiles of at most this size; the whole batch as one tile is the most compact there is.

    Raises ``NearfarError`` for positions that are not (n, 2) or not finite, and sizes that do not fit.

    >>> xy = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2)
    >>> sampler = SpatialBatchSampler(np.tile(xy, (2, 1)), np.repeat(["a", "b"], 400), batch_size=32, tile_size=16)
    >>> batch = np.array(next(iter(sampler)))
    >>> len(sampler), len(batch), bool(np.ptp(np.tile(xy, (2, 1))[batch[:16]], axis=0).max() < 10)
    (25, 32, True)
    """

    def __init__(
        self,
        positions: ArrayLike | Tensor,
        slides: Ids | Tensor | None,
        batch_size: int,
        tile_size: int | None = None,
        *,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Ids | None = None,
    ) -> None:
        self.positions = _places(positions)
        n = len(self.positions)
        super().__init__(
            n, batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size, ids=ids
        )
        names = np.zeros(n, np.int64) if slides is None else canonical_ids(slides, "slides")
        if len(names) != n:
            raise NearfarError(
                f"there are {n} positions, but slides of shape {names.shape}; give one slide per item"
            )
        if names.dtype.kind == "O":
            raise NearfarError("slides are named by numbers and by texts; name all of them in one way")
        self.slide_names, slide = np.unique(names, return_inverse=True)
        self.slides = slide.reshape(-1).astype(np.int64)
        default = max(min(_LEAST, self.batch_size), self.batch_size // _TILES)
        self.tile_size = default if tile_size is None else whole_number("tile_size", tile_size, 1)
        if self.tile_size > self.batch_size:
            raise NearfarError(f"tile_size={self.tile_size} is larger than a batch of {self.batch_size}")
        self._digest = digest(self.positions, self.slides)

    def _identity(self) -> dict[str, object]:
        return {"tile_size": self.tile_size, "places": self._digest}

    def _compose(self, epoch: int, options: Mapping[str, object]) -> Plan:
        from nearfar.batching import _kernels

        rng = np.random.default_rng([self.seed, epoch])
        used = _kernels.shuffled(self.n, _kernels.random_state(self.seed, epoch))[: self.layout.total]
        # By slide; within it in random order, so that ties of the coordinates fall differently in each epoch.
        order = used[np.argsort(self.slides[used], kind="stable")]
        start, _ = self.layout.slots(self.tile_size)
        size = np.diff(start)
        pieces = _Pieces(np.bincount(self.slides[order], minlength=len(self.slide_names)), size, rng)
        angle = rng.uniform(0.0, 2 * np.pi, len(self.slide_names))[self.slides]
        (x, y), cos, sin = self.positions.T, np.cos(angle), np.sin(angle)
        _kernels.cut_tiles(order, x * cos - y * sin, x * sin + y * cos, pieces.bounds, pieces.first)
        return Plan(self.layout, pieces.dealt(order, start, size, rng))


class _Pieces:
    """How the items of each slide are cut: into tiles of given sizes and one remainder.

    ``bounds`` are the places of all cuts in an order slide by slide, ``first`` the first piece of each slide.
    """

    def __init__(self, items: NDArray[np.int64], sizes: NDArray[np.int64], rng: np.random.Generator) -> None:
        drawn = rng.permutation(sizes)
        reach = np.concatenate([[0], np.cumsum(drawn)])
        lengths: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(items)
        self.rest = np.full(len(items), -1, np.int64)  # which piece of a slide is its remainder
        taken = 0
        for slide in rng.permutation(len(items)).tolist():
            after = int(np.searchsorted(reach, reach[taken] + items[slide], side="right")) - 1
            own, left = drawn[taken:after], int(items[slide] - (reach[after] - reach[taken]))
            if left:
                self.rest[slide] = place = int(rng.integers(len(own) + 1))
                own = np.insert(own, place, left)
            lengths[slide], taken = own, after
        self.mixed = drawn[taken:]
        counts = np.array([len(own) for own in lengths], np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.bounds = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        self.slide = np.repeat(np.arange(len(items)), counts)

    def dealt(
        self,
        order: NDArray[np.int32],
        start: NDArray[np.int64],
        size: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[np.int32]:
        """The items in the order of a plan: slides evenly spread over it, every tile in a place of its size."""
        tiles = np.delete(np.arange(len(self.slide)), (self.first[:-1] + self.rest)[self.rest >= 0])
        content = [order[self.bounds[tile] : self.bounds[tile + 1]] for tile in tiles.tolist()]
        rests = (self.first[:-1] + self.rest)[self.rest >= 0]
        over = [
            order[self.bounds[piece] : self.bounds[piece + 1]] for piece in rng.permutation(rests).tolist()
        ]
        if over:
            content += np.split(np.concatenate(over), np.cumsum(self.mixed)[:-1])
        slide = np.concatenate([self.slide[tiles], np.full(len(content) - len(tiles), len(self.rest))])
        key = _spread(slide, rng)
        length = np.array([len(tile) for tile in content])
        plan = np.empty(len(order), np.int32)
        for each in np.unique(size):
            places, chosen = np.flatnonzero(size == each), np.flatnonzero(length == each)
            for place, tile in zip(places.tolist(), chosen[np.argsort(key[chosen])].tolist(), strict=True):
                plan[start[place] : start[place + 1]] = content[tile]
        return plan


def _spread(group: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A key in [0, 1) for each member by which every group is spread evenly, its members in random order."""
    draw = rng.random(len(group))
    by_group = np.lexsort((draw, group))
    count = np.bincount(group)
    rank = np.empty(len(group))
    rank[by_group] = np.arange(len(group)) - np.repeat(np.cumsum(count) - count, count)
    return (rank + rng.random(len(group))) / count[group]


def positions_in_batch(neighbors: Int[Tensor, "b k"], batch: Int[Tensor, " b"]) -> Int[Tensor, "b k"]:
    """Where each neighbour stands in the batch: -1 for those that are not in it, and for none (below 0).

    ``neighbors`` names items, -1 for none; ``batch`` the items of the batch, in order. What ``SpatialLoss`` takes.

    >>> positions_in_batch(torch.tensor([[7, -1], [3, 5]]), torch.tensor([5, 7]))
    tensor([[ 1, -1],
            [-1,  0]])
    """
    for name, tensor, dims in (("neighbors", neighbors, 2), ("batch", batch, 1)):
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise NearfarError(f"{name} is {kind}; give a tensor of whole numbers: the numbers of items")
        if tensor.ndim != dims:
            raise NearfarError(f"{name} has shape {tuple(tensor.shape)}; it has {dims} dimension(s)")
    if not len(batch):
        raise NearfarError("batch is empty; give the numbers of its items")
    ordered, place = batch.sort()
    at = torch.searchsorted(ordered, neighbors).clamp(max=len(batch) - 1)
    return torch.where(ordered[at] == neighbors, place[at], -1)


def weight_in_batch(
    plan: Plan, neighbors: Int[np.ndarray, "n k"], weights: Float[np.ndarray, "n k"] | None = None
) -> Float[np.ndarray, " used"]:
    """How much of the weight on an item's neighbours stands in its batch, for every item that the plan uses.

    The sum of the ``weights`` (1 each without them) of those neighbours that are in the batch; the batches of all
    ranks of a step count as one, as ``DistributedLoss`` joins them. Its share above 0 is the share of rows whose
    target has neighbour mass.

    >>> from nearfar.batching import Layout
    >>> plan = Plan(Layout(4, 2), np.array([0, 1, 2, 3], np.int32))
    >>> weight_in_batch(plan, np.array([[1], [2], [-1], [2]]))
    array([1., 0., 0., 1.])
    """
    if not isinstance(plan, Plan):
        raise NearfarError(f"plan is a {type(plan).__name__}; give the plan of a sampler: sampler.plan()")
    near = array("neighbors", neighbors, "the positions of each item's neighbours, (n, k), -1 for none", "iu")
    if near.ndim != 2 or len(near) != plan.layout.n:
        raise NearfarError(
            f"neighbors of shape {near.shape} for {plan.layout.n} items; (n, k) is needed, -1 for none"
        )
    if near.size and (near.min() < -1 or near.max() >= plan.layout.n):
        raise NearfarError(
            f"neighbors holds {near.min()} to {near.max()}; positions go from 0 to {plan.layout.n - 1}, -1 is none"
        )
    if weights is not None:
        weights = array("weights", weights, f"a number for each neighbour, {near.shape}").astype(np.float64)
        if weights.shape != near.shape:
            raise NearfarError(
                f"weights have shape {weights.shape}, neighbors {near.shape}; give one for each"
            )
        if np.isnan(weights[near >= 0]).any():
            raise NearfarError("weights hold NaN; a neighbour without a weight is left out with -1")
    near = near.astype(np.int64)
    label = plan.labels()
    step = np.where(label < 0, -1, label // plan.layout.world_size)
    used = plan.order
    near = near[used]
    inside = (near >= 0) & (step[near] == step[used][:, None])
    weight = np.ones(near.shape) if weights is None else weights[used]
    total: NDArray[np.float64] = np.where(inside, weight, 0.0).sum(axis=1)
    return total


def _places(positions: ArrayLike | Tensor) -> NDArray[np.float64]:
    needs = "numbers of shape (n, 2), the place of every item on its slide"
    places = array("positions", positions, needs).astype(np.float64)
    if places.ndim != 2 or places.shape[1] != 2:
        raise NearfarError(
            f"positions have shape {places.shape}; give (n, 2), the place of every item on its slide"
        )
    bad = np.flatnonzero(~np.isfinite(places).all(axis=1))
    if len(bad):
        raise NearfarError(
            f"{len(bad)} positions are not finite, first that of item {bad[0]}; leave such items out"
        )
    return places
