"""Several processes for tests: forked, so that nothing is imported again, and ended where they wait for each other."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 60


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(work: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What ``work(*arguments)`` gives on each of ``world`` ranks; an exception in place of a result, None if killed."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_rank, args=(rank, world, port, Path(folder), work, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + SECONDS
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        assert not late, f"ranks {late} were still waiting after {SECONDS} s"
        for process in processes:
            assert process.exitcode in (0, -signal.SIGKILL)
        files = [Path(folder) / str(rank) for rank in range(world)]
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _rank(rank: int, world: int, port: int, folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from nearfar.training import ranks

    ranks.start()
    try:
        result = work(*arguments)
    except BaseException as error:
        if not isinstance(error, Exception):
            traceback.print_exc()
        result = error
    (folder / str(rank)).write_bytes(pickle.dumps(result))
    os._exit(0)
