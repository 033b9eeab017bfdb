"""Child processes for tests: several ranks that work together, and one that is killed.

They are forked from a server that has imported PyTorch and this project and has done nothing with them. So a child
costs no imports, and none is a copy of a process whose thread pools are at work.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: after so long a child is taken to hang; none needs a tenth of it
SECONDS = 300

_CONTEXT = multiprocessing.get_context("forkserver")
# what costs seconds to import, and what would import it late
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "preloaded",
        "numba",
        "nearfar.cli",
        "nearfar.launch",
        "nearfar.verify",
        "nearfar.systems.molecules.system",
        "toy_system",
    ]
)


def together(work: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What ``work(*arguments)`` gives on each of ``world`` ranks; an exception in place of a result, None if killed."""
    # As under torchrun the store belongs to the parent: the system chooses its port, and it is never free in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(world)]
        processes = []
        for rank, file in enumerate(files):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            processes.append(start(_rank, (file, work, arguments), variables))
        _join(processes)
        assert all(process.exitcode in (0, -signal.SIGKILL) for process in processes)
        return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def run_until_killed(work: Callable[..., Any], *arguments: Any) -> None:
    """Call ``work(*arguments)``, which is to kill its own process, in a child."""
    process = start(work, arguments)
    _join([process])
    assert process.exitcode == -signal.SIGKILL, f"exit code {process.exitcode}"


def command(
    *arguments: str, cwd: Path | None = None, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``nearfar ARGUMENTS`` in a process of its own, as the shell has it, but for the seconds of the imports.

    ``path`` is a folder whose packages, and their entry points, can be imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = started_command(*arguments, stdout=files[0], stderr=files[1], cwd=cwd, path=path)
        _join([process])
        assert process.exitcode is not None
        return subprocess.CompletedProcess(
            ["nearfar", *arguments], process.exitcode, *(file.read_text() for file in files)
        )


def started_command(
    *arguments: str, stdout: Path, stderr: Path, cwd: Path | None = None, path: Path | None = None
) -> BaseProcess:
    """The same, at work: to be joined, or sent a signal."""
    return start(_command, (arguments, cwd or Path.cwd(), path, stdout, stderr))


def write_to(stdout: Path, stderr: Path) -> None:
    """What this process and its children print goes to files; both may be the same."""
    for descriptor, file in enumerate((stdout, stderr), start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115


def _command(arguments: tuple[str, ...], cwd: Path, path: Path | None, stdout: Path, stderr: Path) -> None:
    os.chdir(cwd)
    write_to(stdout, stderr)
    if path is not None:
        sys.path.insert(0, str(path))
        importlib.invalidate_caches()
    sys.argv = ["nearfar", *arguments]
    from nearfar.cli import main

    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def start(
    work: Callable[..., Any], arguments: tuple[Any, ...], variables: dict[str, str] | None = None
) -> BaseProcess:
    """A child that calls ``work(*arguments)``, at work."""
    modules = {part.__module__ for part in (work, *arguments) if callable(part)}
    files = {name: str(sys.modules[name].__file__) for name in modules}
    environment = {**os.environ, **(variables or {})}
    process = _CONTEXT.Process(target=_child, args=(environment, files, pickle.dumps((work, arguments))))
    process.start()
    return process


def _join(processes: list[BaseProcess]) -> None:
    end = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    late = [number for number, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"processes {late} were still at work after {SECONDS} s"


def _child(environment: dict[str, str], files: dict[str, str], content: bytes) -> None:
    os.environ.clear()  # the server has that of its start
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # workers of a DataLoader are children of this process
    for name, file in files.items():
        if name not in sys.modules:  # files of tests are in no folder of the import path
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    work, arguments = pickle.loads(content)
    work(*arguments)


def _rank(file: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from nearfar.training import ranks

    ranks.start()
    try:
        result = work(*arguments)
    except BaseException as error:
        if not isinstance(error, Exception):
            traceback.print_exc()
        result = error
    file.write_bytes(pickle.dumps(result))
    os._exit(0)
