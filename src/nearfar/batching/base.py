"""What all batch samplers share: equal batches on every rank, epochs, exact length, and a state that resumes in
mid-epoch.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Sampler

from nearfar.arguments import whole_number
from nearfar.batching.plan import Layout, Plan
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.ids import Ids, canonical_ids, first_difference, kind_of

__all__ = ["BatchSampler", "as_ids", "check_not_rebuilt", "compare_ids", "digest"]

log = logging.getLogger("nearfar.batching")


def digest(*arrays: object) -> str:
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
        ids: Ids | None = None,
    ) -> None:
        check_not_rebuilt(type(self).__name__, n)
        self.layout = Layout(n, batch_size, world_size, drop_last)
        self.seed = whole_number("seed", seed, 0)
        self.rank = whole_number("rank", rank, 0)
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
        self._options: dict[str, object] = {}  # of the plan that is being drawn
        self._resume: tuple[int, dict[str, object]] | None = None
        self._pass = 0
        self._running: Plan | None = None

    # ---- what a subclass gives

    def _compose(self, epoch: int, options: Mapping[str, object]) -> Plan:
        raise NotImplementedError

    def _identity(self) -> dict[str, object]:
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
        epoch = whole_number("epoch", epoch, 0)
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
        return self._compose(
            self._epoch if epoch is None else whole_number("epoch", epoch, 0), self._current()
        )

    def _current(self) -> dict[str, object]:
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
        if ticket != self._pass:  # made before a later iterator, and drawn from after it
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

    def _fingerprint(self) -> dict[str, object]:
        return {
            "n": self.n,
            "batch_size": self.batch_size,
            "world_size": self.layout.world_size,
            "drop_last": self.layout.drop_last,
            "seed": self.seed,
            "ids": None if self.ids is None else digest(self.ids),
            **_plain(self._identity()),
        }

    def state_dict(self, position: int | None = None) -> Json:
        """Plain data from which `load_state_dict` goes on; the same on every rank.

        ``position`` is the number of batches of the epoch that were really *used*. Pass it when a loader with
        prefetching stands between sampler and training: the sampler itself only knows how many were drawn.
        """
        options = _plain(self._current())
        if self._resume:
            drawn, planned = self._resume
        else:
            drawn, planned = self._drawn, self._options or options
        position = drawn if position is None else whole_number("position", position, 0)
        if position > self.layout.steps:
            raise NearfarError(f"position {position} lies beyond the {self.layout.steps} batches of an epoch")
        return {
            "version": 1,
            "sampler": type(self).__name__,
            "fingerprint": self._fingerprint(),
            "epoch": self._epoch,
            "position": position,
            "planned": _plain(planned) if position else options,
            "options": options,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next pass yields exactly the batches left of its epoch.

        Options that may change between epochs are taken from the state; setting one afterwards acts from the
        next epoch on. A state of a different sampler, of different data or of different fixed options is refused.
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
                f"the state was saved by a {type(self).__name__} over different data or options ({listed}); "
                f"build the "
                "sampler as it was then, or start its epoch afresh with set_epoch"
            )
        position = whole_number("position in the state", state["position"], 0)
        if position > self.layout.steps:
            raise NearfarError(
                f"the state has position {position}, but an epoch has {self.layout.steps} batches"
            )
        epoch = whole_number("epoch in the state", state["epoch"], 0)
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

    def check_ids(self, ids: Ids) -> None:
        """Raise unless the dataset's ids are the sampler's, in the same order."""
        if self.ids is None:
            raise NearfarError(
                f"this {type(self).__name__} has no ids to compare; pass ids= to it or to nearest_neighbors"
            )
        compare_ids(self.ids, canonical_ids(ids), "sampler", "dataset")


def check_not_rebuilt(name: str, items: object) -> None:
    """Say it where Lightning builds a batch sampler anew around a sampler of its own."""
    if isinstance(items, Sampler):
        raise NearfarError(
            f"a {type(items).__name__} was given to {name} in place of its items: Lightning does so to cut batches for "
            f"several processes, and to predict. Train with Trainer(use_distributed_sampler=False) and {name}(…, "
            "rank=trainer.global_rank, world_size=trainer.world_size); predict with DataLoader(dataset, batch_size)"
        )


def _plain(value: object) -> Any:
    """Nested data with scalars and arrays as Python's own, which ``json`` and ``torch.load`` read."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if value is None:
        return None
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise NearfarError(f"a state holds plain data, not a {type(value).__name__}: {value!r}")


def as_ids(ids: Ids, n: int) -> np.ndarray:
    """Ids in their canonical form (`nearfar.ids`), one per item."""
    array = canonical_ids(ids)
    if len(array) != n:
        raise NearfarError(f"there are {n} items, but {len(array)} ids; give one id per item")
    return array


def compare_ids(left: np.ndarray, right: np.ndarray, left_name: str, right_name: str) -> None:
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
        hint = "; the ids are the same in a different order: use neighbors.aligned_to(ids)"
    a, b = left[at : at + 1].tolist()[0], right[at : at + 1].tolist()[0]
    raise NearfarError(
        f"ids of {left_name} and {right_name} differ at {count} of {len(left)} positions, first at {at}: "
        f"{a!r} against {b!r}{hint}"
    )
