"""``nearfar train trainer.devices=N``: the same command again, in N processes on this machine.

The engine is torchrun's (``torch.distributed.launcher``), called from Python: it starts the processes, passes signals
on to them, and ends all where one fails. What they have to say they say themselves.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from nearfar.training.ranks import ended_by

__all__ = ["run_processes"]

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
