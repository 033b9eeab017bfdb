"""Ray, where it is asked for: joining a cluster or starting one on this machine, and holding processes on its nodes.

Nothing else in nearfar needs Ray. It is imported when a command asks for it, and a machine without it gets a message
that names what to install.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

__all__ = ["Processes", "connect", "each", "lost", "require_ray", "total"]

Say = Callable[[str], None]
Task = TypeVar("Task")
Result = TypeVar("Result")

#: seconds after which a command that waits for free nodes says so
PATIENCE = 15.0
#: how often a task is given out again whose process or node was lost
RETRIES = 3
#: values of RAY_ADDRESS that name no cluster
NO_ADDRESS = ("", "auto", "local")


def require_ray(what: str) -> ModuleType:
    """The module ``ray``; ``NearfarError`` with the command that installs it where it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise NearfarError(f"{what} needs Ray, which is not installed: pip install 'nearfar[ray]'")
    # No statistics are sent unless the user asks for it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of epochs are alike, and each is news
    import ray

    return ray


@contextmanager
def connect(what: str, cpus: float = 1) -> Iterator[ModuleType]:
    """Ray, connected: to the cluster of ``RAY_ADDRESS``, or that which runs on this machine, or one started for this.

    One that is started here has at least ``cpus`` CPUs, as torchrun starts processes without counting cores. A
    connection that was there before is used and left as it is.

    Raises ``NearfarError`` where Ray is not installed, or where the cluster of ``RAY_ADDRESS`` cannot be joined.
    """
    ray = require_ray(what)
    if ray.is_initialized():
        yield ray
        return
    passed = {name: value for name, value in os.environ.items() if name.startswith("NEARFAR_")}
    # DistributedDataParallel would warn in every process that all weights were used, which is no news.
    passed.setdefault("TORCH_CPP_LOG_LEVEL", os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"))
    common: dict[str, object] = {"logging_level": "ERROR", "runtime_env": {"env_vars": passed}}
    _check_address()
    try:
        ray.init("auto", **common)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        address = os.environ.get("RAY_ADDRESS", "auto")
        if address not in NO_ADDRESS or not isinstance(error, ConnectionError):
            ray.shutdown()
            raise _not_joined(address) from None
        # none is running
        _start_here(ray, int(max(os.cpu_count() or 1, cpus)), common)
    try:
        yield ray
    finally:
        ray.shutdown()


def _start_here(ray: ModuleType, cpus: int, common: Mapping[str, object]) -> None:
    try:
        ray.init("local", num_cpus=cpus, include_dashboard=False, **common)
    except Exception as error:
        if "timed out" not in str(error):
            raise
        ray.shutdown()
        raise NearfarError(
            "Ray did not start on this machine within its 30 seconds, as on a very busy one. Give the command again, "
            "or start Ray by hand first (ray start --head)."
        ) from None


def _check_address() -> None:
    """``NearfarError`` where nothing listens at ``RAY_ADDRESS``; Ray itself would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in NO_ADDRESS or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise NearfarError(
            f"RAY_ADDRESS={address} is no address of a cluster. Set it to HOST:PORT as ray start --head prints it (the "
            "port is 6379 unless chosen), or unset it to use this machine alone."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise NearfarError(
            f"RAY_ADDRESS={address}: no cluster answers there ({error}). Start one (ray start --head), or unset "
            "RAY_ADDRESS to use this machine alone."
        ) from None


def _not_joined(address: str) -> NearfarError:
    """Something listens at the address, and yet: the usual reason is a token, which Ray names among much else."""
    if address in NO_ADDRESS:
        which, alone = "the cluster that runs on this machine", "stop it (ray stop)"
    else:
        which, alone = f"the cluster of RAY_ADDRESS={address}", "unset RAY_ADDRESS"
    return NearfarError(
        f"Ray could not join {which}. If it asks for a token (ray start has said so, or lines above name "
        "InvalidAuthToken), set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what ray get-auth-token prints on its first "
        "node. Else see with ray status whether a cluster of the same version of Ray runs there. To use this machine "
        f"alone, {alone}."
    )


def total(resource: str) -> float:
    """How much of a resource (``CPU``, ``GPU``) all nodes of the connected cluster have together."""
    import ray

    return float(ray.cluster_resources().get(resource, 0))


def lost(error: BaseException) -> bool:
    """Whether the error says that a process or its node is gone, and not that the process raised it."""
    from ray import exceptions

    gone = (
        exceptions.RayActorError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.WorkerCrashedError,
        exceptions.ObjectLostError,
    )
    return isinstance(error, gone)


def each(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
    """The number of each task with what ``function`` returns of it, computed by the nodes of the connected cluster.

    In the order in which they are done, some for each CPU at a time. Ray gives a task out again whose process or node
    is lost. Raises the ``NearfarError`` that a task raises, and one for a task that was lost too often.
    """
    import ray

    remote: Any = ray.remote(function).options(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")
    left = iter(enumerate(tasks))
    running: dict[ObjectRef, int] = {}
    try:
        while True:
            ahead = 2 * max(1, int(total("CPU")))
            while len(running) < ahead and (given := next(left, None)) is not None:
                running[remote.remote(given[1])] = given[0]
            if not running:
                return
            ready, _ = ray.wait([*running])
            for future in ready:
                at = running.pop(future)
                try:
                    result = ray.get(future)
                except Exception as error:
                    raise _own(error, at, len(tasks)) from None
                yield at, result
    finally:
        for future in running:
            ray.cancel(future, force=True)


def _own(error: Exception, at: int, tasks: int) -> Exception:
    """What a task raised, without what Ray wraps around it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, NearfarError):
        return NearfarError(str(cause))
    if lost(error):
        return NearfarError(
            f"piece {at + 1} of {tasks} was lost with its process {RETRIES + 1} times: it may take more memory than a "
            "node has. The same command goes on where it was."
        )
    return error


class Processes:
    """Processes on the nodes of a cluster, reserved together: all of them, or none and a wait for free nodes.

    Args:
        kind: the class whose instances they hold; each is made with its number, from 0, and ``arguments``.
        count: how many.
        cpus, gpus: what each reserves.
        say: is told when there are too few free nodes.

    Leaving the context ends them and frees what was reserved.
    """

    def __init__(
        self, kind: type, count: int, cpus: float, gpus: float, say: Say, arguments: Sequence[object] = ()
    ) -> None:
        self.kind, self.count, self.arguments, self.say = kind, count, tuple(arguments), say
        self.each: Mapping[str, float] = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self.actors: list[ActorHandle] = []
        self._group: PlacementGroup | None = None

    def __enter__(self) -> list[ActorHandle]:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = self._group = placement_group([dict(self.each)] * self.count, strategy="PACK")
        try:
            self._await_nodes(group)
            for number in range(self.count):
                place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
                actor: Any = ray.remote(self.kind).options(
                    num_cpus=self.each["CPU"],
                    num_gpus=self.each.get("GPU", 0),
                    max_restarts=0,
                    scheduling_strategy=place,
                    max_concurrency=2,  # while one call works, a second asks it to stop
                )
                self.actors.append(actor.remote(number, *self.arguments))
        except BaseException:
            self.__exit__()
            raise
        return self.actors

    def _await_nodes(self, group: PlacementGroup) -> None:
        ready, waited, told = group.ready(), time.monotonic(), False
        import ray

        while not ray.wait([ready], timeout=0.5)[0]:
            if not told and time.monotonic() - waited > PATIENCE:
                told = True
                each = ", ".join(f"{amount:g} {name}" for name, amount in self.each.items())
                have = ", ".join(f"{total(name):g} {name}" for name in self.each)
                self.say(
                    f"waiting for nodes: {self.count} processes of {each} are needed, the cluster has {have} in all "
                    "(ray status shows what is free; Ctrl-C ends the wait)"
                )

    def __exit__(self, *_: object) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self.actors:
            with suppress(Exception):  # one that is gone needs no end
                ray.kill(actor)
        if self._group is not None:
            with suppress(Exception):
                remove_placement_group(self._group)
        self.actors, self._group = [], None
