"""Encoders in processes on the nodes of a Ray cluster: chunks of items go out, their tables come back in order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.cluster import PATIENCE, lost, total
from nearfar.data.items import Items
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import pyarrow
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from nearfar.serving.trained import Trained

__all__ = ["RayPool"]

Say = Callable[[str], None]
#: what is computed of a chunk, by a run
Work = Callable[["Trained", Items], "pyarrow.Table"]

#: chunks that an encoder has at a time: one that it computes, and one that it need not wait for
AHEAD = 2
#: how often a chunk is given out that was lost with its process each time
TRIES = 3


class _Encoder:
    """A run, loaded in a process of its own."""

    def __init__(self, run: Path, device: str, work: Work) -> None:
        self.run, self.device, self.work = run, device, work

    def load(self) -> str:
        """Load the run; the key of its weights."""
        from nearfar.serving.trained import load

        self.trained = load(self.run, self.device)
        return self.trained.weights_key

    def table(self, items: Items) -> pyarrow.Table:
        return self.work(self.trained, items)


class RayPool:
    """A pool of encoders on the connected cluster (``nearfar.cluster.connect``).

    Args:
        trained: the run; every node must see its folder.
        device: ``auto`` gives each encoder a GPU where the cluster has any; ``cpu``, ``cuda``.
        workers: how many encoders; None: as many as the cluster has GPUs, or else CPUs.
        say: is told of an encoder that was lost.

    Encoders that cannot start yet, because a node is missing, join when they can. One that is lost is replaced, and its
    chunks are given to the others.
    """

    def __init__(
        self, trained: Trained, device: str = "auto", workers: int | None = None, say: Say = print
    ) -> None:
        if workers is not None and workers < 1:
            raise NearfarError(f"--workers {workers}: at least one is needed.")
        gpus = int(total("GPU")) if device in ("auto", "cuda") else 0
        self.trained, self.device, self.say = trained, device, say
        self.gpu = 1 if gpus else 0
        self.workers = workers or gpus or max(1, int(total("CPU")))
        self._actors: list[ActorHandle] = []
        self._starting: dict[ObjectRef, ActorHandle] = {}  # its first answer → an encoder that is not ready
        self._free: deque[ActorHandle] = deque()  # encoders, once for every chunk that each may still take
        self._tries: Counter[int] = (
            Counter()
        )  # chunks that were lost; -1: encoders that were lost while they started

    def map(self, work: Work, chunks: Iterable[Items]) -> Iterator[tuple[Items, pyarrow.Table | None]]:
        """Every chunk with its table, in order; None for a chunk without items. A bounded number is read ahead.

        Raises the ``NearfarError`` that an encoder raises, and one for a chunk that was lost too often.
        """
        import ray

        source = enumerate(chunks)
        waiting: deque[tuple[int, Items]] = deque()
        running: dict[ObjectRef, tuple[int, Items, ActorHandle]] = {}
        done: dict[int, tuple[Items, pyarrow.Table | None]] = {}
        given, read, ended, told = 0, 0, False, False
        try:
            while True:
                while given in done:
                    yield done.pop(given)
                    given += 1
                # Some for each encoder are at work; as many again may be done, and wait for an earlier one.
                while not ended and read - given < 2 * AHEAD * self.workers:
                    number, items = next(source, (-1, None))
                    if items is None:
                        ended = True
                    elif len(items):
                        waiting.append((number, items))
                    else:
                        done[number] = items, None
                    read += items is not None
                if not self._actors:
                    for _ in range(min(self.workers, len(waiting))):
                        self._start(work)
                while waiting and self._free:
                    number, items = waiting.popleft()
                    actor = self._free.popleft()
                    running[actor.table.remote(items)] = number, items, actor
                if given in done:
                    continue
                if ended and given == read:
                    return
                ready, _ = ray.wait([*running, *self._starting], timeout=PATIENCE)
                if not ready and not running and not told:
                    told = True
                    self.say(
                        "no encoder has started yet: the cluster may have no free node (ray status shows them)"
                    )
                for future in ready:
                    if future in self._starting:
                        self._joined(future, work)
                        continue
                    number, items, actor = running.pop(future)
                    try:
                        done[number] = items, ray.get(future)
                        self._free.append(actor)
                    except Exception as error:
                        if not lost(error):
                            raise _own(error) from None
                        others = [each for each, (_, _, of) in running.items() if of is actor]
                        taken = sorted(
                            [(number, items), *(running.pop(each)[:2] for each in others)], key=_number
                        )
                        waiting.extendleft(reversed(taken))
                        self._replace(actor, work, taken)
        finally:
            for actor in self._actors:
                ray.kill(actor)
            self._actors, self._starting, self._free = [], {}, deque()

    def _start(self, work: Work) -> None:
        import ray

        place = {"num_cpus": 1, "num_gpus": self.gpu, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        kind = ray.remote(_Encoder).options(**place)
        actor: Any = kind.remote(self.trained.path.absolute(), self.device, work)
        self._actors.append(actor)
        self._starting[actor.load.remote()] = actor

    def _joined(self, future: ObjectRef, work: Work) -> None:
        """An encoder has loaded its run, or was lost before it had."""
        import ray

        actor = self._starting.pop(future)
        try:
            key = ray.get(future)
        except Exception as error:
            if not lost(error):
                raise _own(error) from None
            self._replace(actor, work, [])
            return
        if key != self.trained.weights_key:
            raise NearfarError(
                f"{self.trained.path}: a node of the cluster has a different run of that name. The folder must be the "
                "same on all nodes, as on a shared disk."
            )
        self._tries.pop(-1, None)
        self._free.extend([actor] * AHEAD)

    def _replace(self, actor: ActorHandle, work: Work, taken: list[tuple[int, Items]]) -> None:
        """A new encoder for one that is gone, with the chunks that it had ``taken``."""
        self._actors.remove(actor)
        self._free = deque(each for each in self._free if each is not actor)
        for number in [number for number, _ in taken] or [-1]:
            self._tries[number] += 1
            if self._tries[number] == TRIES:
                what = "an encoder was lost before it had loaded its run"
                if number >= 0:
                    what = f"chunk {number + 1} was lost with its process"
                raise NearfarError(
                    f"{what}, {TRIES} times: it may take more memory than a node has. Compute fewer rows at once "
                    "(--batch-size), or take nodes with more memory."
                )
        self.say(
            f"an encoder was lost: {len(taken)} chunks are given out again, and a new one starts where there is room"
        )
        self._start(work)


def _number(chunk: tuple[int, Items]) -> int:
    return chunk[0]


def _own(error: Exception) -> Exception:
    """The error that an encoder raised, without what Ray wraps around it."""
    cause = getattr(error, "cause", None)
    return NearfarError(str(cause)) if isinstance(cause, NearfarError) else error
