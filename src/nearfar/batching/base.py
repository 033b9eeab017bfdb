"""What all batch samplers share: equal batches on every rank, epochs, exact length, and a state that resumes in
mid-epoch.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from nearfar.batching.arguments import array, flag, plain, whole
from nearfar.errors import NearfarError
from nearfar.ids import canonical_ids, first_difference, kind_of

__all__ = ["BatchSampler", "Layout", "Plan", "as_ids", "check_not_rebuilt", "compare_ids", "digest", "whole"]


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
        every, left_out = whole("the number of items", self.n, 0), whole("left_out", self.left_out, 0)
        n = every - left_out
        size = whole("batch_size", self.batch_size, 1)
        ranks = whole("world_size", self.world_size, 1)
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
        groups = -(-sizes // whole("group_size", group_size, 1))
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
        step, rank = whole("step", step, 0), whole("rank", rank, 0)
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


log = logging.getLogger("nearfar.batching")


def digest(*arrays: Any) -> str:
    """A short hash of arrays, of at most about 20,000 evenly spaced rows of each.

    It depends on the kind and width of the numbers: give arrays in one form, as `as_ids` makes them.
    """
    h = hashlib.blake2b(digest_size=12)
    for each in arrays:
        a = np.asarray(each)
        rows = np.ascontiguousarray(a[:: max(1, len(a) // 20_000)]) if a.ndim else a
        h.update(f"{a.shape}{a.dtype.kind}".encode())
        h.update("\x1f".join(map(repr, rows)).encode() if a.dtype == object else rows.tobytes())
    return h.hexdigest()


class BatchSampler:
    """Base of the samplers: an epoch is a pure function of (seed, epoch, options), cut by a `Layout`.

    Iterating yields lists of positions, ready for ``DataLoader(dataset, batch_sampler=sampler)``. Every pass is a new
    epoch, as with ``DataLoader(shuffle=True)``: a pass whose predecessor yielded a batch, to its end or not, moves on
    to the next epoch. ``set_epoch`` chooses one, up to the first batch of the pass; ``load_state_dict`` goes on in
    the middle of one. An iterator of which no batch was asked uses up nothing.

    A subclass writes ``_compose(epoch, options)`` and names in ``_changeable`` the options that may be set
    between epochs; a plan is made with the values they have when its first batch is drawn.
    ``composes_hard_batches`` says whether it puts items together because they are hard to tell apart; whoever needs to
    know asks for it, and not for the name of a sampler.

    ``batch_size`` counts the items of one rank. A global batch is ``world_size`` consecutive batches of the
    plan; rank r takes the r-th of them whole, so that items put together stay together on a rank. All ranks
    must use the same seed and options.
    """

    composes_hard_batches: ClassVar[bool] = False
    _changeable: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        ids: Sequence[Any] | NDArray[Any] | None = None,
    ) -> None:
        check_not_rebuilt(type(self).__name__, n)
        self.layout = Layout(n, batch_size, world_size, drop_last)
        self.seed = whole("seed", seed, 0)
        self.rank = whole("rank", rank, 0)
        if self.rank >= self.layout.world_size:
            raise NearfarError(
                f"rank {rank} does not exist: world_size={world_size} has ranks 0 to {world_size - 1}"
            )
        self.ids = None if ids is None else as_ids(ids, self.n)
        self._epoch = 0
        self._begun = (
            False  # whether a pass has yielded a batch of this epoch, so that the next pass moves on
        )
        self._drawn = 0
        self._options: dict[str, Any] = {}  # of the plan that is being drawn
        self._resume: tuple[int, dict[str, Any]] | None = None
        self._pass = 0
        self._running: Plan | None = None

    # ---- what a subclass gives

    def _compose(self, epoch: int, options: Mapping[str, Any]) -> Plan:
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """What must agree between the sampler that saved a state and the one that loads it."""
        return {}

    def _announce(self, epoch: int, plan: Plan) -> None:
        """Log what is worth knowing when an epoch begins."""

    # ---- epochs

    @property
    def n(self) -> int:
        """Number of items."""
        return self.layout.n

    @property
    def batch_size(self) -> int:
        """Items per batch and rank."""
        return self.layout.batch_size

    @property
    def remainder(self) -> int:
        """Items that an epoch leaves out (see `Layout`)."""
        return self.layout.remainder

    @property
    def epoch(self) -> int:
        """The epoch that is being drawn, or comes next."""
        return self._epoch

    @property
    def remaining(self) -> int:
        """Batches the next pass yields: ``len(self)``, or fewer after a state of mid-epoch was loaded."""
        return self.layout.steps - (self._resume[0] if self._resume else 0)

    @property
    def sampler(self) -> BatchSampler:
        """The sampler itself: Lightning and accelerate call ``set_epoch`` of a batch sampler's ``sampler``."""
        return self

    @property
    def drop_last(self) -> bool:
        """True if the incomplete last step is left out. Read by a framework that cuts batches for several processes.

        accelerate hands every process each P-th batch. An uneven end it fills with items that come twice, or leaves
        ranks with different numbers of batches; a batch that lent an item (`Layout`) makes it lose whole batches. So
        reading this raises ``NearfarError`` unless all batches are full. ``layout.drop_last`` is the plain option.
        """
        name = type(self).__name__
        own = (
            "build it in each process with rank= and world_size= (accelerator.process_index and .num_processes, or "
            "trainer.global_rank and .world_size), and let nothing cut its batches again: do not pass its loader to "
            "accelerator.prepare, give Lightning Trainer(use_distributed_sampler=False)"
        )
        if self.layout.world_size > 1:
            raise NearfarError(
                f"a framework (accelerate, Lightning) wants to cut the batches of this {name} for several processes, "
                f"but they are those of rank {self.rank} of {self.layout.world_size} already: the second cut would "
                f"leave items out. Instead, {own}"
            )
        if not self.layout.drop_last:
            raise NearfarError(
                f"a framework (accelerate, Lightning) wants to cut the batches of this {name} for several processes. "
                "With drop_last=False their end may be uneven: items would be lost or come twice, or ranks have "
                f"different numbers of batches. Build the sampler with drop_last=True, or {own}. To predict, use a "
                "plain DataLoader(dataset, batch_size)"
            )
        return True

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self.layout.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, or of one that has yielded no batch yet; the same epoch starts again.

        A loaded position is kept if it belongs to that epoch, and given up with a warning otherwise.
        """
        epoch = whole("epoch", epoch, 0)
        if epoch != self._epoch and self._resume:
            position, steps = self._resume[0], self.layout.steps
            self._resume = None
            if position < steps:
                warnings.warn(
                    f"set_epoch({epoch}): the loaded position, batch {position} of {steps} of epoch {self._epoch}, is "
                    f"given up, and epoch {epoch} starts at its beginning; to go on there, let the training loop "
                    f"begin at epoch {self._epoch} (accelerate: loader.set_epoch(sampler.epoch))",
                    stacklevel=2,
                )
        if self._resume is None:
            self._drawn, self._options, self._running = 0, {}, None
        self._epoch, self._begun = epoch, False

    def plan(self, epoch: int | None = None) -> Plan:
        """The batches of an epoch (by default the current one) under the current options; changes nothing."""
        return self._compose(self._epoch if epoch is None else whole("epoch", epoch, 0), self._current())

    def _current(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._changeable}

    def __iter__(self) -> Iterator[list[int]]:
        self._next_epoch()
        self._pass += 1  # an older iterator must not move the state of a newer one
        return self._draw(self._pass)

    def _next_epoch(self) -> None:
        if self._begun:
            self._epoch, self._begun = self._epoch + 1, False
            self._drawn, self._options, self._running = 0, {}, None

    def _draw(self, ticket: int) -> Iterator[list[int]]:
        # What a pass is, is settled at its first batch: Lightning makes the iterator first and sets the epoch then.
        self._next_epoch()
        if ticket != self._pass:  # made before another iterator, and drawn from after it
            self._pass += 1
            ticket = self._pass
        epoch = self._epoch
        start, options = self._resume or (0, self._current())
        self._resume = None
        self._begun, self._drawn, self._options = True, start, options
        plan = self._running = self._compose(epoch, options)
        self._announce(epoch, plan)
        for step in range(start, self.layout.steps):
            batch = plan.batch(step, self.rank).tolist()
            if ticket == self._pass:
                if epoch == self._epoch:
                    self._begun, self._drawn, self._options, self._running = True, step + 1, options, plan
                else:
                    self._pass += 1
                    warnings.warn(
                        f"set_epoch({self._epoch}) came after the first batch of a pass: this pass goes on with epoch "
                        f"{epoch}, the next one is epoch {self._epoch}. Call it before the loader is iterated; a "
                        "loader with workers draws batches at once",
                        stacklevel=2,
                    )
            yield batch

    # ---- state

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "batch_size": self.batch_size,
            "world_size": self.layout.world_size,
            "drop_last": self.layout.drop_last,
            "seed": self.seed,
            "ids": None if self.ids is None else digest(self.ids),
            **plain(self._identity()),
        }

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Plain data from which `load_state_dict` goes on; the same on every rank.

        ``position`` is the number of batches of the epoch that were really *used*. Pass it when a loader with
        prefetching stands between sampler and training: the sampler itself only knows how many were drawn.
        """
        options = plain(self._current())
        if self._resume:
            drawn, planned = self._resume
        else:
            drawn, planned = self._drawn, self._options or options
        position = drawn if position is None else whole("position", position, 0)
        if position > self.layout.steps:
            raise NearfarError(f"position {position} lies beyond the {self.layout.steps} batches of an epoch")
        return {
            "version": 1,
            "sampler": type(self).__name__,
            "fingerprint": self._fingerprint(),
            "epoch": self._epoch,
            "position": position,
            "planned": plain(planned) if position else options,
            "options": options,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next pass yields exactly the batches left of its epoch.

        Options that may change between epochs are taken from the state; setting one afterwards acts from the
        next epoch on. A state of another sampler, of other data or of other fixed options is refused.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("fingerprint"), Mapping):
            raise NearfarError("this is not the state of a batch sampler (no 'fingerprint' in it)")
        missing = [key for key in ("sampler", "epoch", "position", "planned", "options") if key not in state]
        if missing:
            raise NearfarError(f"the state of the sampler lacks {', '.join(missing)}; it is damaged")
        if state.get("version", 1) != 1:
            raise NearfarError(f"the state has version {state['version']!r}; this nearfar reads version 1")
        if state["sampler"] != type(self).__name__:
            raise NearfarError(f"the state belongs to a {state['sampler']}, this is a {type(self).__name__}")
        mine, saved = self._fingerprint(), state["fingerprint"]
        differ = [key for key in sorted({*mine, *saved}) if mine.get(key) != saved.get(key)]
        if differ:
            listed = "; ".join(f"{key}: saved {saved.get(key)!r}, here {mine.get(key)!r}" for key in differ)
            raise NearfarError(
                f"the state was saved by a {type(self).__name__} over other data or options ({listed}); "
                f"build the "
                "sampler as it was then, or start its epoch afresh with set_epoch"
            )
        position = whole("position in the state", state["position"], 0)
        if position > self.layout.steps:
            raise NearfarError(
                f"the state has position {position}, but an epoch has {self.layout.steps} batches"
            )
        epoch = whole("epoch in the state", state["epoch"], 0)
        for part in ("options", "planned"):
            if not isinstance(state[part], Mapping) or {*self._changeable} - {*state[part]}:
                raise NearfarError(f"'{part}' in the state does not name {', '.join(self._changeable)}")
        for name in self._changeable:  # set for a moment: so they are checked as any option is
            setattr(self, name, state["planned"][name])
        planned = self._current()
        for name in self._changeable:
            setattr(self, name, state["options"][name])
        self._epoch, self._begun = epoch, False
        self._pass += 1  # iterators from before the load no longer count
        self._drawn, self._options, self._running = position, planned, None
        self._resume = (position, dict(planned)) if position else None

    # ---- ids

    def check_ids(self, ids: Sequence[Any] | NDArray[Any]) -> None:
        """Raise unless the dataset's ids are the sampler's, in the same order."""
        if self.ids is None:
            raise NearfarError(
                f"this {type(self).__name__} has no ids to compare; pass ids= to it or to nearest_neighbors"
            )
        compare_ids(self.ids, canonical_ids(ids), "sampler", "dataset")


def check_not_rebuilt(name: str, items: Any) -> None:
    """Say it where Lightning builds a batch sampler anew around a sampler of its own."""
    if isinstance(items, Sampler):
        raise NearfarError(
            f"a {type(items).__name__} was given to {name} in place of its items: Lightning does so to cut batches for "
            f"several processes, and to predict. Train with Trainer(use_distributed_sampler=False) and {name}(…, "
            "rank=trainer.global_rank, world_size=trainer.world_size); predict with DataLoader(dataset, batch_size)"
        )


def as_ids(ids: Sequence[Any] | NDArray[Any], n: int) -> NDArray[Any]:
    """Ids in their canonical form (`nearfar.ids`), one per item."""
    array = canonical_ids(ids)
    if len(array) != n:
        raise NearfarError(f"there are {n} items, but {len(array)} ids; give one id per item")
    return array


def compare_ids(left: NDArray[Any], right: NDArray[Any], left_name: str, right_name: str) -> None:
    """Raise, naming the first difference, unless two arrays of canonical ids are equal in order."""
    if len(left) != len(right):
        raise NearfarError(f"the {left_name} has {len(left)} items, the {right_name} {len(right)}")
    count, at = first_difference(left, right)
    if not count:
        return
    hint = ""
    if kind_of(left) != kind_of(right):
        hint = (
            f"; the ids of the {left_name} are {kind_of(left)}, those of the {right_name} {kind_of(right)}: 1 and '1' "
            "are different ids, so convert one side, for example with [str(i) for i in ids]"
        )
    elif sorted(map(repr, left.tolist())) == sorted(map(repr, right.tolist())):
        hint = "; the ids are the same in another order: use neighbors.aligned_to(ids)"
    a, b = left[at : at + 1].tolist()[0], right[at : at + 1].tolist()[0]
    raise NearfarError(
        f"ids of {left_name} and {right_name} differ at {count} of {len(left)} positions, first at {at}: "
        f"{a!r} against {b!r}{hint}"
    )
