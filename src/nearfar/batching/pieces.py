"""A function of each of many pieces of work: in this process, in several, or on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

import faiss

from nearfar.errors import NearfarError

__all__ = ["Pool", "in_processes", "on_ray"]

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool(Protocol):
    """Gives the number of each task with what the function returned of it, in the order in which they are done."""

    def __call__(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], /
    ) -> Iterator[tuple[int, Result]]: ...


def in_processes(processes: int) -> Pool:
    """A pool of so many processes, which share FAISS's threads; one: this process.

    >>> sorted(in_processes(1)(abs, [-3, 2]))
    [(0, 3), (1, 2)]
    """

    def run(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        if processes == 1 or len(tasks) < 2:
            for at, task in enumerate(tasks):
                yield at, function(task)
            return
        import multiprocessing

        count = min(processes, len(tasks))
        threads = max(1, faiss.omp_get_max_threads() // processes)
        context = multiprocessing.get_context("spawn")  # FAISS's threads do not survive a fork
        running: dict[Future[Result], int] = {}
        left = iter(enumerate(tasks))
        with ProcessPoolExecutor(count, context, faiss.omp_set_num_threads, (threads,)) as pool:
            try:
                while True:
                    # Not all at once: what is returned waits in memory until it is taken.
                    while len(running) < 2 * count and (given := next(left, None)) is not None:
                        running[pool.submit(function, given[1])] = given[0]
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        at = running.pop(future)
                        yield at, future.result()
            except BrokenProcessPool:
                raise NearfarError(
                    f"one of {count} processes was killed: perhaps memory was short, of which each needs as much. Give "
                    "fewer processes="
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    return run


def on_ray(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
    """A pool of one-CPU tasks on the connected cluster (``nearfar.cluster.connect``), whose nodes see the same files.

    A task whose process or node is lost is given out again.
    """
    from nearfar.cluster import each

    return each(function, tasks)
