"""Processes that train together on the nodes of a Ray cluster, and start again when one of them is lost.

Ray chooses the nodes, starts the processes and notices when one is gone. Everything else is as under torchrun: each
process gets torchrun's variables, joins by ``ranks.start`` and runs the same loop.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch.distributed as dist

from nearfar.cluster import Processes, connect, lost, total
from nearfar.config.training import TrainerOptions
from nearfar.errors import NearfarError
from nearfar.training import ranks
from nearfar.training.loop import Interrupted, stop_signals

if TYPE_CHECKING:
    from ray.actor import ActorHandle

__all__ = ["processes_on_cluster", "run_on_cluster"]

T = TypeVar("T")
Say = Callable[[str], None]

#: seconds for the others to fail as well, or for Ray to notice that a node is gone, after the first error
GRACE = 60.0


class _Process:
    """One of the processes, on whatever node."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __repr__(self) -> str:  # what Ray puts before its lines
        return f"process {self.rank}"

    def open_store(self) -> tuple[str, int]:
        """The address of a store in which all of them meet; the system chooses its port."""
        from ray.util import get_node_ip_address

        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return get_node_ip_address(), self._store.port

    def run(
        self, variables: dict[str, str], work: Callable[[], T]
    ) -> tuple[Literal["done"], T, bool] | tuple[Literal["failed"], Exception, bool]:
        """``("done", what work gives, True)``, or ``("failed", the error, whether it is the first of all)``."""
        os.environ.update(variables | {"RANK": str(self.rank), "GROUP_RANK": str(self.rank)})
        try:
            ranks.start()
            return "done", work(), True
        except BaseException as error:
            first = ranks.is_first_error()
            if dist.is_initialized():
                with suppress(Exception):
                    dist.destroy_process_group()  # the others, which may wait for this one, fail as well
            return "failed", _portable(error, self.rank), first

    def stop(self) -> None:
        """End after the step at hand, with a checkpoint."""
        ranks.ask_to_stop()


def _portable(error: BaseException, rank: int) -> Exception:
    """The error as it can travel: one that is for the user as it is, any other with its traceback as text."""
    if isinstance(error, (NearfarError, Interrupted)):
        return type(error)(str(error))
    return RuntimeError(f"in process {rank}:\n{''.join(traceback.format_exception(error))}")


def processes_on_cluster(trainer: TrainerOptions) -> int:
    """How many processes ``trainer.devices`` stands for: as it says, or one for each GPU of the cluster (auto)."""
    return int(trainer.devices) if trainer.devices != "auto" else max(1, int(total("GPU")))


def run_on_cluster(work: Callable[[], T], trainer: TrainerOptions, say: Say = print) -> T:
    """What ``work`` gives on the first of the processes that ``trainer`` asks for.

    Each reserves ``trainer.threads`` CPUs (1 where that is null), one for each of ``trainer.workers``, and a GPU where
    the cluster has one and ``trainer.accelerator`` does not refuse it. When one is lost, all start again, at most
    ``trainer.restarts`` times: ``work`` has to go on from what it left, as a run does from its checkpoint. An error
    that ``work`` raises is raised here and starts nothing again.

    Ctrl-C and SIGTERM ask all processes to stop after the step at hand; a second Ctrl-C ends them at once.
    """
    cpus = (trainer.threads or 1) + trainer.workers
    wanted = trainer.devices if isinstance(trainer.devices, int) else 1
    with connect("trainer.engine=ray", cpus=cpus * wanted):
        count = processes_on_cluster(trainer)
        gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and total("GPU") > 0)
        for attempt in range(trainer.restarts + 1):
            with Processes(_Process, count, cpus, int(gpu), say) as actors:
                gone, result = _run(actors, work)
            if gone is None:
                return result
            if attempt < trainer.restarts:
                say(
                    f"{gone} was lost: all {count} start again from the last checkpoint "
                    f"(restart {attempt + 1} of {trainer.restarts})"
                )
        raise NearfarError(
            f"{gone} was lost, after {trainer.restarts} restarts (trainer.restarts). The same command with exists=skip "
            "goes on from the last checkpoint. If it is always the same step, look for memory: fewer rows "
            "(batch_size=), or rows encoded in parts (trainer.cached_chunk=)."
        )


def _run(actors: list[ActorHandle], work: Callable[[], T]) -> tuple[str | None, Any]:
    """Which process was lost, if one was; and what the first gave."""
    import ray

    count = len(actors)
    try:
        host, port = cast("tuple[str, int]", ray.get(actors[0].open_store.remote()))
    except Exception as error:
        if lost(error):
            return f"process 0 of {count}", None
        raise
    # Ray shows a process its own GPU alone, so that each is like a machine of its own.
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    running = {actor.run.remote(shared, work): rank for rank, actor in enumerate(actors)}
    first: Any = None
    failed: list[Exception] = []
    asked = False
    with stop_signals() as request:
        while running:
            done, _ = ray.wait(list(running), timeout=GRACE if failed else 0.5)
            if request.stop and not asked:
                asked = True
                for actor in actors:
                    actor.stop.remote()
            if not done and failed:
                break
            for future in done:
                rank = running.pop(future)
                try:
                    outcome, value, is_first = ray.get(future)
                except Exception as error:
                    if lost(error):
                        return f"process {rank} of {count}", None
                    raise
                if outcome == "failed":
                    # An error in the others comes of this one, or all come of a process that is gone: Ray will say.
                    failed.insert(0 if is_first else len(failed), value)
                    if is_first and isinstance(value, NearfarError):
                        raise value
                elif rank == 0:
                    first = value
        if any(isinstance(error, Interrupted) for error in failed) and not request.stop:
            # Nobody here asked: a process saw its node go, and all of them stopped before Ray noticed.
            return "a node", None
    if failed:
        raise failed[0]
    return None, first
