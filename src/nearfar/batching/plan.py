"""The batches of an epoch before they are drawn: how items are cut into equal steps, and who stands in which batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nearfar.arguments import array, flag, whole_number
from nearfar.errors import NearfarError

__all__ = ["Layout", "Plan"]


@dataclass(frozen=True)
class Layout:
    """``n`` items in steps of ``world_size`` batches, equal in number and in size on all ranks.

    ``batch_size`` is the batch of one rank. Every item is used once, with three exceptions that ``remainder``
    counts: the ``n % world_size`` items that cannot be shared equally; with ``drop_last`` all items of the
    incomplete last step; and a single item that is left when it cannot borrow company. ``left_out`` items that a
    sampler never draws are counted as well. Where the last batch
    would hold one item (no negatives, and an error in a batch norm), the batch before it gives it a second
    one.

    >>> Layout(101, 10).sizes.tolist()
    [10, 10, 10, 10, 10, 10, 10, 10, 10, 9, 2]
    >>> Layout(101, 10, drop_last=True).remainder
    1
    >>> two = Layout(101, 10, world_size=2)
    >>> two.steps, two.sizes.tolist(), two.remainder
    (5, [10, 10, 10, 10, 10], 1)
    """

    n: int
    batch_size: int
    world_size: int = 1
    drop_last: bool = False
    left_out: int = 0

    def __post_init__(self) -> None:
        every, left_out = (
            whole_number("the number of items", self.n, 0),
            whole_number("left_out", self.left_out, 0),
        )
        n = every - left_out
        size = whole_number("batch_size", self.batch_size, 1)
        ranks = whole_number("world_size", self.world_size, 1)
        drop_last = flag("drop_last", self.drop_last)
        given = {
            "n": every,
            "batch_size": size,
            "world_size": ranks,
            "drop_last": drop_last,
            "left_out": left_out,
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)  # Python's own numbers: a state is plain whatever came in
        if n < 2 * ranks and not (size == 1 and n >= ranks):
            raise NearfarError(
                f"{n} items on {ranks} rank(s) leave a rank fewer than 2, which has nothing to contrast; "
                "use more items or fewer ranks"
            )
        if n > np.iinfo(np.int32).max:
            raise NearfarError(f"{n} items do not fit the 32-bit positions of a plan")
        if self.drop_last and n < size * ranks:
            raise NearfarError(
                f"drop_last=True leaves no batch: {n} items do not fill one step of {ranks} x {size}; "
                "use a smaller batch_size or drop_last=False"
            )

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """The size of one rank's batch in each step, (steps,)."""
        per_rank, size = (self.n - self.left_out) // self.world_size, self.batch_size
        full, rest = divmod(per_rank, size)
        sizes = [size] * full
        if rest and not self.drop_last:
            if rest >= 2:
                sizes.append(rest)
            elif size >= 3:
                sizes[-1] -= 1
                sizes.append(2)
        return np.array(sizes, np.int64)

    @property
    def steps(self) -> int:
        """Batches per rank and epoch."""
        return len(self.sizes)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each batch begins in a plan, (steps * world_size + 1,): step after step, rank after rank."""
        return np.concatenate([[0], np.cumsum(np.repeat(self.sizes, self.world_size))]).astype(np.int64)

    @property
    def total(self) -> int:
        """Items used in an epoch, on all ranks together."""
        return int(self.starts[-1])

    @property
    def remainder(self) -> int:
        """Items left out of an epoch; which ones changes from epoch to epoch."""
        return self.n - self.total

    def slots(self, group_size: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Cut every batch into the fewest nearly equal groups of at most ``group_size``.

        Returns where each group begins (groups + 1,) and the batch it belongs to (groups,).

        >>> Layout(20, 10).slots(4)[0].tolist()
        [0, 3, 6, 10, 13, 16, 20]
        """
        sizes = np.diff(self.starts)
        groups = -(-sizes // whole_number("group_size", group_size, 1))
        batch = np.repeat(np.arange(len(sizes)), groups)
        turn = np.arange(len(batch)) - np.repeat(np.cumsum(groups) - groups, groups)
        begin = self.starts[:-1][batch] + sizes[batch] * turn // groups[batch]
        return np.append(begin, self.total).astype(np.int64), batch.astype(np.int32)


@dataclass(frozen=True)
class Plan:
    """All batches of one epoch, for all ranks.

    ``order`` (total,) holds positions, cut by ``layout``; ``hard`` (total,) marks the items that a
    hard-negative sampler drew as neighbours, pivots included, and is None where the notion does not apply.
    ``nominal`` is the share of hard items that was asked for.
    """

    layout: Layout
    order: NDArray[np.int32]
    hard: NDArray[np.bool_] | None = None
    nominal: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layout, Layout):
            raise NearfarError(f"layout is a {type(self.layout).__name__}; give a Layout")
        order = array(
            "order", self.order, f"the positions of a plan, ({self.layout.total},) whole numbers", "iu"
        )
        if order.shape != (self.layout.total,):
            raise NearfarError(f"order has shape {order.shape}, but the plan has {self.layout.total} places")
        # Compiled code counts by these positions.
        if order.size and (order.min() < 0 or order.max() >= self.layout.n):
            raise NearfarError(
                f"order holds {order.min()} to {order.max()}; positions go from 0 to {self.layout.n - 1}"
            )
        object.__setattr__(self, "order", np.ascontiguousarray(order, np.int32))
        if self.hard is not None:
            hard = array("hard", self.hard, "a Boolean for every place of the plan, or None", "b")
            if hard.shape != order.shape:
                raise NearfarError(f"hard has shape {hard.shape}, order {order.shape}; one Boolean per place")
            object.__setattr__(self, "hard", hard)

    def batch(self, step: int, rank: int = 0) -> NDArray[np.int32]:
        """The positions of one batch."""
        step, rank = whole_number("step", step, 0), whole_number("rank", rank, 0)
        if step >= self.layout.steps or rank >= self.layout.world_size:
            raise NearfarError(
                f"batch {step} of rank {rank} does not exist: there are {self.layout.steps} steps and "
                f"{self.layout.world_size} rank(s)"
            )
        at = step * self.layout.world_size + rank
        return self.order[self.layout.starts[at] : self.layout.starts[at + 1]]

    def batches(self, rank: int | None = None) -> list[NDArray[np.int32]]:
        """The batches of one rank, or of all ranks in the order of the plan."""
        ranks = range(self.layout.world_size) if rank is None else [rank]
        return [self.batch(step, r) for step in range(self.layout.steps) for r in ranks]

    def labels(self) -> NDArray[np.int32]:
        """The batch of every item, (n,), counted over all ranks; -1 for an item that the epoch leaves out."""
        label = np.full(self.layout.n, -1, np.int32)
        sizes = np.diff(self.layout.starts)
        label[self.order] = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        return label
