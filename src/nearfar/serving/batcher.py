"""Values of requests that arrive together go through the model together, and each answer to its own request."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Batcher", "Busy"]


class Busy(Exception):
    """So much is waiting that nothing more is taken; ``retry_after`` seconds later there should be room."""

    def __init__(self, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(reason)
        self.retry_after = max(1, math.ceil(retry_after))


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Request(Generic[Result]):
    """The values of one request, and the results that are there by now."""

    results: list[Result | Exception | None]
    left: int
    done: asyncio.Future[list[Result | Exception | None]]


@dataclass(eq=False)
class _Waiting(Generic[Value, Result]):
    """One value that waits for its pass."""

    value: Value
    request: _Request[Result]
    position: int
    arrived: float


class Batcher(Generic[Key, Value, Result]):
    """Puts values that arrive within some milliseconds into one call of ``work``, which runs in one thread.

    ``work(key, values)`` gives a result for each value, in order; an exception among them is the result of that value
    alone. Where it raises, the values are tried again in halves, so that those which cannot be done fail alone and the
    others have their results. Values share a call only where their keys are equal: which model, which view.

    Args:
        work: what is done with many values at once, such as embedding them.
        wait: seconds that a value waits for others at most while nothing runs. What arrives during a call makes up the
            next one.
        most: values in one call.
        waiting: values that may wait in all; beyond that ``submit`` raises `Busy`.

    Everything but ``work`` runs in the event loop that ``submit`` is called in.

    >>> async def three_at_once() -> tuple[list[list[int]], list[list[int]]]:
    ...     calls: list[list[int]] = []
    ...     def squares(key: str, values: list[int]) -> list[int]:
    ...         calls.append(values)
    ...         return [value**2 for value in values]
    ...     batcher = Batcher(squares)
    ...     answers = await asyncio.gather(*(batcher.submit("squares", [n, -n]) for n in (1, 2, 3)))
    ...     await batcher.close()
    ...     return answers, calls
    >>> asyncio.run(three_at_once())
    ([[1, 1], [4, 4], [9, 9]], [[1, -1, 2, -2, 3, -3]])
    """

    def __init__(
        self,
        work: Callable[[Key, list[Value]], Sequence[Result]],
        wait: float = 0.004,
        most: int = 64,
        waiting: int = 2048,
    ) -> None:
        self.work, self.wait, self.most, self.limit = work, wait, most, waiting
        self._queues: OrderedDict[Key, deque[_Waiting[Value, Result]]] = OrderedDict()
        self._running: list[_Waiting[Value, Result]] = []
        self._size = 0
        self._seconds = 0.0  # that a value took of late, from which the time until there is room is estimated
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._closing = False

    def __len__(self) -> int:
        """Values that wait; those in the call that runs are not counted."""
        return self._size

    async def submit(self, key: Key, values: Sequence[Value]) -> list[Result | Exception | None]:
        """The results of the values, in order; a value that could not be done has its exception there.

        Whoever gives up waiting, by a cancelled task, takes the values that have not begun out of the queue.

        Raises:
            Busy: too many values wait, or the batcher is being closed.
        """
        if self._closing:
            raise Busy("the server is being stopped")
        if not values:
            return []
        if self._size + len(values) > self.limit:
            raise Busy(
                f"{self._size} values are waiting, and {self.limit} may; try again later",
                self._seconds * self._size,
            )
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        loop = asyncio.get_running_loop()
        request = _Request([None] * len(values), len(values), loop.create_future())
        queue = self._queues.setdefault(key, deque())
        now = time.monotonic()
        queue.extend(_Waiting(value, request, i, now) for i, value in enumerate(values))
        self._size += len(values)
        self._changed.set()
        try:
            return await request.done
        except asyncio.CancelledError:
            self._forget(key, request)
            raise

    async def close(self, grace: float = 10.0) -> None:
        """Take nothing more, finish what waits within ``grace`` seconds, and end the thread."""
        self._closing = True
        self._changed.set()
        if self._task is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._task), grace)
            except TimeoutError:
                self._task.cancel()
        for each in [*self._running, *(each for queue in self._queues.values() for each in queue)]:
            if not each.request.done.done():
                each.request.done.set_exception(Busy("the server is being stopped"))
        self._queues.clear()
        self._size = 0
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- the loop --------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._size:
                if self._closing:
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._company()
            taken = self._take()
            if taken is None:
                continue
            key, batch = taken
            self._running = batch
            began = time.monotonic()
            values = [each.value for each in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._call, key, values)
            except Exception as error:  # _call gives exceptions back; this one is of the thread itself
                results = [error] * len(batch)
            pace = (time.monotonic() - began) / len(batch)
            self._seconds = pace if not self._seconds else 0.8 * self._seconds + 0.2 * pace
            self._running = []
            for each, result in zip(batch, results, strict=True):
                _deliver(each, result)

    async def _company(self) -> None:
        """Wait until the oldest value has waited long enough, or enough are there for a full call."""
        while self._size and not self._closing:
            key = self._oldest()
            left = self._queues[key][0].arrived + self.wait - time.monotonic()
            if left <= 0 or len(self._queues[key]) >= self.most:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return

    def _oldest(self) -> Key:
        return min(self._queues, key=lambda key: self._queues[key][0].arrived)

    def _take(self) -> tuple[Key, list[_Waiting[Value, Result]]] | None:
        """The values of the next call: of one key, the one that has waited longest first."""
        if not self._size:
            return None
        key = self._oldest()
        queue = self._queues[key]
        batch = [queue.popleft() for _ in range(min(self.most, len(queue)))]
        if not queue:
            del self._queues[key]
        self._size -= len(batch)
        return key, batch

    def _forget(self, key: Key, request: _Request[Result]) -> None:
        queue = self._queues.get(key)
        if queue is None:
            return
        kept = deque(each for each in queue if each.request is not request)
        self._size -= len(queue) - len(kept)
        if kept:
            self._queues[key] = kept
        else:
            del self._queues[key]

    def _call(self, key: Key, values: list[Value]) -> list[Result | Exception]:
        """Results, or exceptions, of the values; halves of what could not be done as a whole."""
        try:
            results: list[Result | Exception] = list(self.work(key, values))
            if len(results) != len(values):
                raise RuntimeError(f"{len(results)} results for {len(values)} values")
            return results
        except Exception as error:
            if len(values) == 1:
                return [error]
            middle = len(values) // 2
            return self._call(key, values[:middle]) + self._call(key, values[middle:])


def _deliver(waiting: _Waiting[Value, Result], result: Result | Exception) -> None:
    request = waiting.request
    request.results[waiting.position] = result
    request.left -= 1
    if not request.left and not request.done.done():
        request.done.set_result(request.results)
