"""Hard batches from a stream: windows of it are read, freed of duplicates, and composed as a set in memory is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import IterableDataset, get_worker_info

from nearfar.arguments import flag, whole_number
from nearfar.batching.base import BatchSampler, _plain
from nearfar.batching.hard_negative import HardNegativeSampler
from nearfar.batching.plan import Layout, Plan
from nearfar.batching.stream_window import key_of, window_neighbors
from nearfar.data.files import Json
from nearfar.data.record_streams import Record, open_stream
from nearfar.errors import NearfarError

__all__ = ["StreamBatches"]

_EPOCH = 1 << 20  # windows of an epoch that have plans of their own
_KEPT = 16  # windows whose place is remembered for states of batches that lie back


@dataclass
class _Window:
    """Consecutive records, where they begin, and how they are cut into batches."""

    number: int
    first: int  # batch of the epoch
    place: object  # of the stream, before its first record
    removed: int  # duplicates in the windows before it
    records: list[Record]
    layout: Layout
    last: bool
    dropped: int  # duplicates in it
    plan: Plan | None = None


class _Mark(TypedDict):
    """Where a window begins, as plain data."""

    number: int
    first: int
    place: object
    removed: int


class StreamBatches(IterableDataset[Any]):
    """Batches of hard negatives from a stream that is not held in memory.

    ``window`` distinct records are read (rounded up to whole steps), their neighbours computed, and their batches
    composed by ``sampler`` with its ``options``; docs/scale.md measures how hard they are. Each record of the stream
    comes once in an epoch; what is left at the end, less than half a window, is joined to the last window. While a
    window is used, the next is read and composed in a thread.

    Args:
        source: Parquet files or WebDataset shards (paths, a folder), an ``IterableDataset`` of Hugging Face, a
            ``webdataset`` pipeline without shuffling, or any iterable of dictionaries that can be iterated again
            (`nearfar.data.record_streams.open_stream`).
        batch_size: records of a batch and rank.
        vectors: the field that holds a record's vector, or a function from a list of records to vectors (n, d).
        window: records that are composed together, on all ranks.
        neighbors: how many neighbours are listed within a window; pivots draw from them. A window that is a share of
            the data has that share of each neighbourhood, so that fewer than in memory are as near.
        sampler: `HardNegativeSampler` or `PartitionBatchSampler`; ``options`` are its own, such as ``hard_ratio``.
        key: records with equal keys are duplicates, of which a window keeps the first: a field, several, or a
            function. A record whose key is None has no duplicate. None: records that are equal in all fields.
            Duplicates are counted in ``duplicates``.
        decode: applied to each record of this rank's batches (pictures, tokens), in ``threads`` threads.
        collate: from a list of records to a batch; None: the list.
        rank, world_size: every rank reads the stream and decodes its own batches alone; all have equally many.

    A pass is an epoch (``set_epoch`` chooses one); there is no ``len``. The state is plain data: ``state_dict()``, or
    ``state_dict(position=n)`` after n batches that were trained on. With files and datasets that have a state, the
    window is found at once, else what lies before is read again.

    In a loop of PyTorch it is an iterable of batches as it is. ``DataLoader(stream, batch_size=None)`` works with
    ``num_workers`` 0 or 1; with 1, call ``set_epoch`` before each pass, and ``state_dict(position=n)``. More workers
    would each read the whole stream: give ``threads``.

    >>> rng = np.random.default_rng(0)
    >>> centres = rng.standard_normal((10, 8))
    >>> rows = [{"id": i, "vector": centres[i % 10] + 0.1 * rng.standard_normal(8)} for i in range(1000)]
    >>> stream = StreamBatches(rows, 20, "vector", window=200, neighbors=15, hard_ratio=1.0)
    >>> batches = [[record["id"] for record in batch] for batch in stream]
    >>> len(batches), sorted(i for batch in batches for i in batch) == list(range(1000))
    (50, True)
    >>> sum(len({i % 10 for i in batch}) for batch in batches) / 50 < 4  # centres in a batch, of 10
    True
    """

    def __init__(
        self,
        source: object,
        batch_size: int,
        vectors: str | Callable[[list[Record]], ArrayLike],
        *,
        window: int = 8192,
        neighbors: int = 32,
        sampler: Callable[..., BatchSampler] = HardNegativeSampler,
        key: str | Sequence[str] | Callable[[Record], object] | None = None,
        decode: Callable[[Record], object] | None = None,
        collate: Callable[[list[Any]], object] | None = None,
        threads: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        **options: object,
    ) -> None:
        self.stream = open_stream(source)
        self.batch_size, self.seed = whole_number("batch_size", batch_size, 1), whole_number("seed", seed, 0)
        self.rank, self.world_size = whole_number("rank", rank, 0), whole_number("world_size", world_size, 1)
        if self.rank >= self.world_size:
            raise NearfarError(
                f"rank {rank} does not exist: world_size={world_size} has ranks 0 to {world_size - 1}"
            )
        self.drop_last, self.threads = flag("drop_last", drop_last), whole_number("threads", threads, 1)
        self.neighbors = whole_number("neighbors", neighbors, 1)
        step = self.batch_size * self.world_size
        self.window = -(-max(whole_number("window", window, 2), 2 * step) // step) * step
        if not (isinstance(vectors, str) or callable(vectors)):
            raise NearfarError(
                "vectors is neither the name of a field nor a function from records to vectors (n, d)"
            )
        if not callable(sampler) or not getattr(sampler, "composes_hard_batches", False):
            raise NearfarError("sampler is not one of HardNegativeSampler and PartitionBatchSampler")
        if "curriculum_epoch" in options:
            raise NearfarError(
                "curriculum_epoch counts epochs of a set, and a stream has windows; hard_ratio=0 makes random batches"
            )
        self.vectors, self.sampler, self.options = vectors, sampler, options
        self.key = key_of(key)
        self.decode, self.collate = decode, collate
        self._names = _plain({"key": key if isinstance(key, (str, list, tuple)) else str(key is not None)})
        self._epoch, self._begun, self._drawn, self._duplicates = 0, False, 0, 0
        self._marks: list[_Mark] = []
        self._resume: tuple[int, _Mark | None] | None = None
        self._pass = 0
        self._reading: Future[_Window | None] | None = None

    # ---- epochs

    @property
    def epoch(self) -> int:
        """The epoch that is being drawn, or comes next."""
        return self._epoch

    @property
    def duplicates(self) -> int:
        """Records of this epoch that were left out so far because their window has an equal one."""
        return self._duplicates

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; a position that was loaded for a different epoch is given up."""
        epoch = whole_number("epoch", epoch, 0)
        if self._resume is None or epoch != self._epoch:
            self._forget()
        self._epoch, self._begun = epoch, False

    def _forget(self) -> None:
        self._drawn, self._duplicates, self._marks, self._resume = 0, 0, [], None

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise NearfarError(
                f"num_workers={worker.num_workers}: each worker would read the whole stream and repeat its records. "
                "Use num_workers=1, and threads= for decoding"
            )
        if self._begun:
            self._epoch, self._begun = self._epoch + 1, False
            self._forget()
        self._pass += 1
        return self._draw(self._pass)

    def _draw(self, ticket: int) -> Iterator[Any]:
        if self._reading is not None:  # of a pass that was left: the stream has one place at a time
            wait([self._reading])
        position, mark = self._resume or (0, None)
        self._resume, self._marks = None, [] if mark is None else [mark]
        windows = self._composed(position, mark)
        decoders = ThreadPoolExecutor(self.threads, "decode") if self.decode and self.threads > 1 else None
        reader = ThreadPoolExecutor(1, "window")
        try:
            waiting = self._reading = reader.submit(next, windows, None)
            while (window := waiting.result()) is not None:
                self._check_newest(ticket)
                waiting = self._reading = reader.submit(next, windows, None)
                self._duplicates = window.removed + window.dropped
                self._marks = [*self._marks, _mark(window)][-_KEPT:]
                for at in range(max(0, position - window.first), window.layout.steps):
                    assert window.plan is not None
                    chosen = [window.records[i] for i in window.plan.batch(at, self.rank).tolist()]
                    if self.decode is not None:
                        chosen = list((decoders.map if decoders else map)(self.decode, chosen))
                    self._check_newest(ticket)
                    self._begun, self._drawn = True, window.first + at + 1
                    yield chosen if self.collate is None else self.collate(chosen)
            self._check_newest(ticket)
            self._begun = True  # also where a state at the end of an epoch left no batch of it
        finally:  # the thread must be out of the stream before a next pass starts it anew
            reader.shutdown(wait=True, cancel_futures=True)
            if decoders is not None:
                decoders.shutdown(wait=False, cancel_futures=True)

    def _check_newest(self, ticket: int) -> None:
        if ticket != self._pass:
            raise NearfarError(
                "this pass ended when a newer one began, or a state was loaded: a stream is read at one place at a "
                "time. Build a second StreamBatches to read it twice"
            )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_reading": None}

    # ---- windows

    def _composed(self, position: int, mark: _Mark | None) -> Iterator[_Window]:
        """Windows with plans; those that end before the position are passed over without one."""
        for window in self._windows(mark or {"number": 0, "first": 0, "place": None, "removed": 0}):
            if window.first + window.layout.steps > position:
                window.plan = self._plan(window)
                yield window

    def _plan(self, window: _Window) -> Plan:
        given = self.vectors
        rows = given(window.records) if callable(given) else [record.get(given) for record in window.records]
        try:
            rows = np.asarray(rows, np.float32)
        except (TypeError, ValueError):
            rows = np.zeros(0, np.float32)
        if rows.ndim != 2 or len(rows) != len(window.records):
            raise NearfarError(
                f"vectors of a window of {len(window.records)} records are {rows.shape}; one vector of one length for "
                "each is needed: a field of every record, or a function of the list of records"
            )
        near = window_neighbors(rows, min(self.neighbors, len(rows) - 1), self.seed)
        sampler = self.sampler(
            near, self.batch_size, seed=self.seed, drop_last=self.drop_last, rank=self.rank, world_size=self.world_size,
            **self.options,
        )  # fmt: skip
        plan: Plan = sampler.plan(self._epoch * _EPOCH + window.number)
        return plan

    def _windows(self, mark: _Mark) -> Iterator[_Window]:
        records = self.stream.start(self._epoch, mark["place"])
        number, first, place, removed = mark["number"], mark["first"], mark["place"], mark["removed"]
        ahead: dict[object, Record] = {}  # read to see whether the stream ends
        read_ahead = 0
        ended = False
        while not ended:
            content, read = ahead, read_ahead
            ahead, read_ahead = {}, 0
            while len(content) < self.window and not ended:
                taken = next(records, None)
                if taken is None:
                    ended = True
                else:
                    content.setdefault(self._key(taken), taken)
                    read += 1
            after = None if ended else self.stream.place()
            # Distinct ones: the next window must have enough of them for its batches.
            while len(ahead) < self.window // 2 and not ended:
                taken = next(records, None)
                if taken is None:
                    ended = True
                else:
                    ahead.setdefault(self._key(taken), taken)
                    read_ahead += 1
            if ended:
                content = {**content, **{key: taken for key, taken in ahead.items() if key not in content}}
                read += read_ahead
            layout = Layout(len(content), self.batch_size, self.world_size, self.drop_last)
            dropped = read - len(content)
            yield _Window(number, first, place, removed, list(content.values()), layout, ended, dropped)
            number, first, place, removed = number + 1, first + layout.steps, after, removed + dropped

    def _key(self, record: Record) -> object:
        """What a record is compared by; where that is None, it equals no other."""
        key = self.key(record)
        return object() if key is None else key

    # ---- state

    def _fingerprint(self) -> dict[str, object]:
        return {
            "source": self.stream.identity(), "batch_size": self.batch_size, "window": self.window,
            "neighbors": self.neighbors, "sampler": getattr(self.sampler, "__name__", "sampler"), "seed": self.seed,
            "world_size": self.world_size, "drop_last": self.drop_last, **self._names, "options": _plain(self.options),
        }  # fmt: skip

    def state_dict(self, position: int | None = None) -> Json:
        """Plain data from which `load_state_dict` goes on; the same on every rank.

        ``position`` is the number of batches of the epoch that were *used*, by default those that were drawn.
        """
        if self._resume is not None:
            drawn, known = self._resume[0], [self._resume[1]] if self._resume[1] else []
        else:
            drawn, known = self._drawn, self._marks
        position = drawn if position is None else whole_number("position", position, 0)
        before = [mark for mark in known if mark["first"] <= position]
        return {
            "version": 1, "fingerprint": self._fingerprint(), "epoch": self._epoch, "position": position,
            "window": before[-1] if before else None,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where a state was taken: the next pass yields exactly the batches that are left of its epoch."""
        names = ("version", "fingerprint", "epoch", "position", "window")
        if (
            not isinstance(state, Mapping)
            or {*names} - {*state}
            or not isinstance(state["fingerprint"], Mapping)
        ):
            raise NearfarError(f"this is not the state of StreamBatches: it needs {', '.join(names)}")
        if state["version"] != 1:
            raise NearfarError(f"the state has version {state['version']!r}; this nearfar reads version 1")
        mine, saved = self._fingerprint(), state["fingerprint"]
        differ = [name for name in sorted({*mine, *saved}) if mine.get(name) != saved.get(name)]
        if differ:
            listed = "; ".join(
                f"{name}: saved {saved.get(name)!r}, here {mine.get(name)!r}" for name in differ
            )
            raise NearfarError(
                f"the state was saved by a stream with different options ({listed}); build it as it was then"
            )
        mark = state["window"]
        if mark is not None and (
            not isinstance(mark, Mapping) or {"number", "first", "place", "removed"} - {*mark}
        ):
            raise NearfarError(
                "'window' in the state does not say where a window begins; the state is damaged"
            )
        self._forget()
        self._pass += 1
        self._epoch, self._begun = whole_number("epoch in the state", state["epoch"], 0), False
        position = whole_number("position in the state", state["position"], 0)
        self._drawn = position
        self._resume = (position, None)
        if mark is not None:
            begins = _Mark(
                number=mark["number"], first=mark["first"], place=mark["place"], removed=mark["removed"]
            )
            self._resume = (position, begins)


def _mark(window: _Window) -> _Mark:
    return {"number": window.number, "first": window.first, "place": window.place, "removed": window.removed}
