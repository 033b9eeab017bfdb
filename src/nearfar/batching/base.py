"""What all batch samplers share: epochs, ranks, exact length, and a state that resumes in mid-epoch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nearfar.batching.layout import Layout, Plan, whole
from nearfar.errors import NearfarError

__all__ = ["BatchSampler", "as_ids", "compare_ids", "digest"]

log = logging.getLogger("nearfar.batching")


def digest(*arrays: Any) -> str:
    """A short hash of arrays, of at most about 20,000 evenly spaced rows of each."""
    h = hashlib.blake2b(digest_size=12)
    for array in arrays:
        a = np.asarray(array)
        rows = np.ascontiguousarray(a[:: max(1, len(a) // 20_000)]) if a.ndim else a
        h.update(f"{a.shape}{a.dtype.kind}".encode())
        h.update("\x1f".join(map(str, rows)).encode() if a.dtype == object else rows.tobytes())
    return h.hexdigest()


class BatchSampler:
    """Base of the samplers: an epoch is a pure function of (seed, epoch, options), cut by a `Layout`.

    Iterating yields lists of positions, ready for ``DataLoader(dataset, batch_sampler=sampler)``. Each pass
    through to its end moves on to the next epoch by itself; ``set_epoch`` chooses one. A pass that was broken
    off starts the same epoch again.

    A subclass writes ``_compose(epoch, options)`` and names in ``_changeable`` the options that may be set
    between epochs; a plan is made with the values they have when the iteration starts.

    ``batch_size`` counts the items of one rank. A global batch is ``world_size`` consecutive batches of the
    plan; rank r takes the r-th of them whole, so that items put together stay together on a rank. All ranks
    must use the same seed and options.
    """

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
        self.layout = Layout(n, batch_size, world_size, drop_last)
        self.seed = whole("seed", seed, 0)
        self.rank = whole("rank", rank, 0)
        if self.rank >= self.layout.world_size:
            raise NearfarError(
                f"rank {rank} does not exist: world_size={world_size} has ranks 0 to {world_size - 1}"
            )
        self.ids = None if ids is None else as_ids(ids, n)
        self._epoch = 0
        self._drawn = 0
        self._finished = False
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

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        return self.layout.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. A loaded position is kept if it belongs to that epoch."""
        epoch = whole("epoch", epoch, 0)
        if epoch != self._epoch:
            self._resume = None
        if self._resume is None:
            self._drawn, self._options, self._running = 0, {}, None
        self._epoch, self._finished = epoch, False

    def plan(self, epoch: int | None = None) -> Plan:
        """The batches of an epoch (by default the current one) under the current options; changes nothing."""
        return self._compose(self._epoch if epoch is None else whole("epoch", epoch, 0), self._current())

    def _current(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._changeable}

    def __iter__(self) -> Iterator[list[int]]:
        if self._finished:
            self._epoch, self._finished = self._epoch + 1, False
        start, options = self._resume or (0, self._current())
        self._resume = None
        self._drawn, self._options = start, options
        self._pass += 1
        self._running = self._compose(self._epoch, options)
        self._announce(self._epoch, self._running)
        return self._draw(self._running, start, self._pass)

    def _draw(self, plan: Plan, start: int, ticket: int) -> Iterator[list[int]]:
        for step in range(start, self.layout.steps):
            batch = plan.batch(step, self.rank).tolist()
            if ticket == self._pass:  # an older iterator must not move the state of a newer one
                self._drawn = step + 1
            yield batch
        if ticket == self._pass:
            self._finished = True

    # ---- state

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "batch_size": self.batch_size,
            "world_size": self.layout.world_size,
            "drop_last": self.layout.drop_last,
            "seed": self.seed,
            "ids": None if self.ids is None else digest(self.ids),
            **self._identity(),
        }

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Plain data from which `load_state_dict` goes on; the same on every rank.

        ``position`` is the number of batches of the epoch that were really *used*. Pass it when a loader with
        prefetching stands between sampler and training: the sampler itself only knows how many were drawn.
        """
        options = self._current()
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
            "planned": planned if position else options,
            "options": options,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next pass yields exactly the batches left of its epoch.

        Options that may change between epochs are taken from the state; setting one afterwards acts from the
        next epoch on. A state of another sampler, of other data or of other fixed options is refused.
        """
        if not isinstance(state, Mapping) or "fingerprint" not in state:
            raise NearfarError("this is not the state of a batch sampler (no 'fingerprint' in it)")
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
        for name in self._changeable:
            setattr(self, name, state["options"][name])
        self._epoch = whole("epoch in the state", state["epoch"], 0)
        self._finished = False
        self._pass += 1  # iterators from before the load no longer count
        self._drawn, self._options, self._running = position, dict(state["planned"]), None
        self._resume = (position, dict(state["planned"])) if position else None

    # ---- ids

    def check_ids(self, ids: Sequence[Any] | NDArray[Any]) -> None:
        """Raise unless the dataset's ids are the sampler's, in the same order."""
        if self.ids is None:
            raise NearfarError(
                f"this {type(self).__name__} has no ids to compare; pass ids= to it or to nearest_neighbors"
            )
        compare_ids(self.ids, as_ids(ids, len(ids)), "sampler", "dataset")


def as_ids(ids: Sequence[Any] | NDArray[Any], n: int) -> NDArray[Any]:
    """Ids as an array, one per item."""
    array = np.asarray(ids)
    if array.ndim != 1 or len(array) != n:
        raise NearfarError(f"there are {n} items, but ids of shape {array.shape}; give one id per item")
    return array


def compare_ids(left: NDArray[Any], right: NDArray[Any], left_name: str, right_name: str) -> None:
    """Raise, naming the first difference, unless two arrays of ids are equal in order."""
    if len(left) != len(right):
        raise NearfarError(f"the {left_name} has {len(left)} items, the {right_name} {len(right)}")
    bad = np.flatnonzero(np.asarray(left).astype(str) != np.asarray(right).astype(str))
    if len(bad):
        at = int(bad[0])
        hint = ""
        if np.array_equal(np.sort(left.astype(str)), np.sort(right.astype(str))):
            hint = "; the ids are the same in another order: use neighbors.aligned_to(ids)"
        raise NearfarError(
            f"ids of {left_name} and {right_name} differ at {len(bad)} of {len(left)} positions, first at "
            f"{at}: "
            f"{left[at]!r} against {right[at]!r}{hint}"
        )
