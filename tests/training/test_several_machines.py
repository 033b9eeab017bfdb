"""torchrun on two "machines" (two agents on loopback, rendezvous c10d): one is killed and joins again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from nearfar.cli import main
from nearfar.config.compose import compose_config
from nearfar.launch import run_one
from nearfar.systems import check_config
from nearfar.terminal import console
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from processes import SECONDS, start, together, write_to
from run_files import records, states_equal
from tiny_molecules import split_files

pytestmark = pytest.mark.slow  # real runs

EPOCHS = 10


def options(folder: Path, name: str) -> list[str]:
    sized = [
        "batch_size=32",
        f"epochs={EPOCHS}",
        "fingerprint_hidden=16",
        "embedding_dim=8",
        "sampler=random",
        "report=false",
    ]
    trainer = {"log_every": 1, "accelerator": "cpu", "probe_rows": 0, "threads": 1, "checkpoint_steps": 5}
    where = ["experiment=molecules", "molecule_encoder=fingerprint", f"runs_dir={folder}", f"name={name}"]
    trained = [f"trainer.{key}={value}" for key, value in trainer.items()]
    return [*where, *sized, *trained, "trainer.evaluate_start=false", "exists=skip", *split_files(folder)]


def train(overrides: list[str]) -> None:
    run_one(check_config(compose_config(overrides)), overrides, False, console())


def agent(arguments: list[str], log: Path, overrides: list[str]) -> None:
    """What torchrun does with these arguments, but that its processes come without the seconds of the imports."""
    os.setsid()
    write_to(log, log)
    config, _, _ = config_from_args(parse_args([*arguments, "nearfar"]))
    config.start_method = "fork"
    elastic_launch(config, nearfar_train)(*overrides)


def nearfar_train(*overrides: str) -> None:
    sys.argv = ["nearfar", "train", *overrides]
    try:
        main()
    except SystemExit as end:  # the agent waits for a result
        if end.code:
            raise


def machine(folder: Path, port: int, host: bool) -> BaseProcess:
    """An agent of torchrun with one process of the two, as the command on one machine."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"]
    # A machine that is gone is noticed after three beats; where names are resolved, it is known who holds the store.
    conf = f"--rdzv-conf=is_host={int(host)},keep_alive_interval=1"
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=5", "--monitor-interval=0.1"]
    variables = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "NEARFAR_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    log = folder / f"machine{time.monotonic_ns()}.log"
    return start(agent, ([*nodes, *rendezvous, conf], log, options(folder, "run")), variables)


def wait(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_machine_that_is_killed_joins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step once, and bit for bit the run that two processes of one machine train."""
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    together(train, options(tmp_path, "undisturbed"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = RunFolder(tmp_path / "run")
    machines = [machine(tmp_path, port, host=True), machine(tmp_path, port, host=False)]
    try:
        wait(lambda: sum(record["kind"] == "step" for record in run.log()) > 15)
        of_agent = subprocess.run(
            ["pgrep", "-P", str(machines[1].pid)], capture_output=True, text=True, check=True
        )
        for process in map(int, of_agent.stdout.split()):  # nothing of it is left to say goodbye
            os.kill(process, signal.SIGKILL)
        machines[1].kill()
        machines.append(machine(tmp_path, port, host=False))
        for at in (0, 2):
            machines[at].join(SECONDS)
        codes = [machines[at].exitcode for at in (0, 2)]
    finally:
        for each in machines:
            each.kill()
    assert codes == [0, 0], [path.read_text()[-3000:] for path in tmp_path.glob("machine*.log")]
    a, b = (Checkpoint.load(tmp_path / name) for name in ("undisturbed", "run"))
    assert states_equal(a, b)
    assert torch.equal(a.other_generators[0]["cpu"], b.other_generators[0]["cpu"])
    assert records(RunFolder(tmp_path / "undisturbed")) == records(run)
    assert len(run.read_json("resumed.json")) >= 1
