"""Several processes as one: who is first, what all must agree on, and starting N processes on this machine."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = [
    "any_rank",
    "ask_to_stop",
    "count",
    "ended_by",
    "from_first",
    "gathered",
    "is_first",
    "is_first_error",
    "launcher_died",
    "leave",
    "on_this_machine",
    "one_after_the_other",
    "rank",
    "run_processes",
    "start",
    "stop_asked",
]


T = TypeVar("T")

#: The others wait so long while one of them reads data or evaluates. A process that ends is noticed at once, by those
#: that wait for it and by what started it, so that this need not be short.
WAIT = timedelta(days=2)
#: what torchrun sets for a process, and what Slurm's variables are translated into
VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)

_store: dist.Store | None = None
_parent: int | None = None
_asked = False


def start() -> int:
    """Join the processes that torchrun or Slurm has started; the number of them, 1 where there is no other.

    CPU tensors travel by gloo, those of a GPU by NCCL.
    """
    global _store, _parent
    if _joined():
        return count()
    _take_from_slurm()
    promised = os.environ.get("WORLD_SIZE", "1")
    if not promised.isdigit() or int(promised) <= 1:
        return 1
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise NearfarError(
            f"WORLD_SIZE={promised} promises several processes, but {', '.join(missing)} is not set. Start them with "
            f"trainer.devices={promised}, with torchrun or with srun; or unset WORLD_SIZE."
        )
    import torch
    import torch.distributed as dist

    here = int(os.environ.get("LOCAL_WORLD_SIZE", promised))
    by_gpu = torch.cuda.is_available() and here <= torch.cuda.device_count()
    if by_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own, world = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if by_gpu else "gloo",
        store=dist.PrefixStore("nearfar", store),
        rank=own,
        world_size=world,
        timeout=WAIT,
    )
    _store, _parent = store, os.getppid()
    if own:
        warnings.simplefilter("ignore")  # the first process says it
    return int(world)


def leave() -> None:
    """Wait for the others and part from them; each goes on as a process of its own.

    The module that ``DistributedDataParallel`` wraps must be gone by now. Its reducer holds the process group; were it
    the last to do so, it would keep the interpreter's lock while it waits for gloo's thread, which may wait for that
    lock, and the process would never end (pytorch issue 56297).
    """
    global _store, _parent
    if not _joined():
        return
    import torch.distributed as dist

    any_rank()
    gc.collect()
    dist.destroy_process_group()
    _store = _parent = None
    for name in list(os.environ):
        if name in VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def _take_from_slurm() -> None:
    """Under ``srun`` with several tasks: torchrun's variables for this task.

    The variables of the step, not of the job: a batch script that starts nothing by ``srun`` is one process, however
    many tasks its job may have.
    """
    if "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) <= 1:
        return
    from lightning_fabric.plugins.environments import SLURMEnvironment

    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    if tasks % nodes:
        raise NearfarError(
            f"{tasks} tasks on {nodes} nodes: every node needs as many as the others; use srun --ntasks-per-node."
        )
    listed = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost"))
    job = "".join(filter(str.isdigit, os.environ.get("SLURM_JOB_ID", "0")))
    os.environ |= {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(listed)),
        # the same on all nodes, and not that of a different job on this one
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(15000 + int(job[-4:] or 0))),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ.get("SLURM_NODEID", "0"),
    }


def _joined() -> bool:
    """Whether this process trains with others; False before PyTorch is loaded, as when options are checked."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many processes train together; 1 where this one is alone.

    >>> count(), rank(), is_first()
    (1, 0, True)
    """
    if not _joined():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def on_this_machine() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count())) if count() > 1 else 1


def rank() -> int:
    """The number of this process, from 0."""
    if not _joined():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return rank() == 0


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """For each flag whether it is true on any rank. Collective; with several processes also a point where all meet.

    >>> any_rank(True, False)
    (True, False)
    """
    if count() == 1:
        return flags
    import torch
    import torch.distributed as dist

    joined = torch.tensor([0, *flags], dtype=torch.int32)
    dist.all_reduce(joined, op=dist.ReduceOp.MAX)
    return tuple(bool(value) for value in joined[1:].tolist())


def launcher_died() -> bool:
    """Whether the process that started these is gone, as after ``kill -9``: nothing would stop them any more."""
    return _parent is not None and os.getppid() != _parent


def ask_to_stop() -> None:
    """Let training in this process end after the step at hand, with a checkpoint: for those that no signal reaches."""
    global _asked
    _asked = True


def stop_asked() -> bool:
    """Whether `ask_to_stop` was called."""
    return _asked


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives on the first rank, where alone it is called. Collective.

    >>> from_first(lambda: 3)
    3
    """
    if count() == 1:
        return make()
    import torch
    import torch.distributed as dist

    content: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(content, src=0, device=torch.device("cpu"))
    first: T = content[0]
    return first


def gathered(value: T) -> list[T]:
    """The values of all ranks, in order, on the first; empty on the others. Collective.

    >>> gathered(3)
    [3]
    """
    if count() == 1:
        return [value]
    import torch.distributed as dist

    gathered: list[Any] = [None] * count()
    # Of all to all: gather to one is not offered by every backend.
    dist.all_gather_object(gathered, value)
    return gathered if is_first() else []


def one_after_the_other(work: Callable[[], object]) -> None:
    """``work`` on the first rank, then on the others together: these find in the cache what the first has left there.

    Not only for the time. What is computed once is the same for all.
    """
    if is_first():
        work()
    any_rank()
    if not is_first():
        work()
    any_rank()


def is_first_error() -> bool:
    """Whether an error of this process is the first of all, to be shown; those of the others come of it.

    A process that ends breaks the calls in which the others wait for it, and each of these would report that.
    """
    if count() == 1 or _store is None:
        return True
    try:
        return int(_store.add("nearfar/errors", 1)) == 1
    except RuntimeError:  # the store went down with the process that held it
        return False


def ended_by(code: int) -> str:
    """How a process ended, in words, from its exit code.

    >>> ended_by(-9), ended_by(1)
    ('was killed (SIGKILL; if nobody did, the machine may have run out of memory)', 'ended with exit code 1')
    """
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    guess = "; if nobody did, the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"was killed ({name}{guess})"


#: seconds for the step at hand and its checkpoint, after Ctrl-C; whoever is not done by then is killed
GRACE = 300


def run_processes(processes: int, module: str, arguments: Sequence[str]) -> tuple[int, str | None]:
    """``python -m module arguments`` in so many processes; exit code, and what to say of a process that could not.

    Threads: those of the machine are shared out, unless ``OMP_NUM_THREADS`` says how many each process takes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # In every process DistributedDataParallel would warn that all weights were used, which is no news.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"nearfar-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=GRACE,
    )
    logging.disable(logging.CRITICAL)  # this process has nothing to say: those that it starts have
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException:
        return 130, None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        if code < 0:
            return 1, f"process {rank} of {processes} {ended_by(code)}"
        return code, None
    finally:
        logging.disable(logging.NOTSET)
    return 0, None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
