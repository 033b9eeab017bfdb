"""What runs on Ray, on a simulated cluster of two nodes: one is lost in the middle, and nothing is lost or repeated."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

import nearfar
from nearfar.batching import disk_neighbors, nearest_neighbors_on_disk
from nearfar.cluster import connect, each, require_ray
from nearfar.config.compose import compose_config
from nearfar.data.chunks import NewData
from nearfar.errors import NearfarError
from nearfar.launch import objective, run_on_ray, run_one
from nearfar.serving.ray_pool import RayPool
from nearfar.serving.stream import embed_file
from nearfar.systems import check_config
from nearfar.terminal import console
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.loop import Interrupted
from nearfar.training.ray_workers import run_on_cluster
from nearfar.training.run_folder import RunFolder
from nearfar.tune import tune
from processes import SECONDS, together
from run_files import records, states_equal
from tiny_molecules import pairs, split_files, write

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # starts a cluster

SUPPORT = Path(__file__).parent / "support"


class Nodes:
    """A cluster of a node for the driver, which runs nothing, and two nodes of one CPU."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(2)]

    def add(self) -> Any:
        """A node; on busy cores one may not be up within the 30 seconds that Ray gives it."""
        for _ in range(3):
            with suppress(Exception):
                return self.cluster.add_node(num_cpus=1)
        return self.cluster.add_node(num_cpus=1)

    def replace(self, *numbers: int) -> None:
        """Nodes are gone, with all their processes, from one moment to the next; as many new ones join."""
        for number in numbers:
            self.cluster.remove_node(self.nodes[number], allow_graceful=False)
        self.cluster._shutdown_at_exit = (
            False  # its handlers belong to the main thread; the fixture ends the node
        )
        for number in numbers:
            self.nodes[number] = self.add()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        path = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))  # of all processes on the nodes
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token is written into the home of whoever runs this
        patch.setenv("OMP_NUM_THREADS", "1")
        # Ray's processes give way to all others, such as tests beside these, and would take ten times as long.
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("NEARFAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Nodes()
        patch.setenv("RAY_ADDRESS", made.cluster.address)
        try:
            yield made
        finally:
            ray.shutdown()
            made.cluster.shutdown()


def when(ready: Any, then: Any) -> threading.Thread:
    """Do something as soon as a condition holds, while the test waits for its command."""

    def work() -> None:
        end = time.monotonic() + SECONDS
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# -- connecting ----------------------------------------------------------------------------------------------
def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NearfarError, match=r"--engine ray needs Ray.*pip install 'nearfar\[ray\]'"):
        require_ray("--engine ray")


def test_an_address_where_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(NearfarError, match="no cluster answers there"), connect("a test"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1", "first:", ":6379"])
def test_an_address_without_host_or_port(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(NearfarError, match=f"RAY_ADDRESS={address} is no address.*HOST:PORT"),
        connect("a test"),
    ):
        pass


@pytest.mark.parametrize("error", [ConnectionError, ray.exceptions.AuthenticationError])
def test_a_cluster_that_cannot_be_joined_is_an_error(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """And not a reason to work on this machine alone, as where no cluster was named."""

    def refuse(address: str, **options: object) -> None:
        assert address == "auto", "a cluster of its own is started"
        raise error("InvalidAuthToken")

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        with (
            pytest.raises(NearfarError, match=r"RAY_ADDRESS=127.*RAY_AUTH_TOKEN.*unset RAY_ADDRESS"),
            connect("a test"),
        ):
            pass


def test_a_cluster_of_this_machine_that_cannot_be_joined_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody set an address: the advice is not to unset it."""

    def refuse(address: str, **options: object) -> None:
        raise ray.exceptions.AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(NearfarError, match=r"cluster that runs on this machine.*RAY_AUTH_TOKEN.*ray stop"),
        connect("a test"),
    ):
        pass


# -- tasks ---------------------------------------------------------------------------------------------------
def test_a_task_that_fails_says_its_own_error(nodes: Nodes) -> None:
    """An error that is no lost node is not tried again, and reads as if the task had run here."""

    def refuse(number: int) -> int:
        if number == 2:
            raise NearfarError("the second piece is damaged")
        return 10 * number

    def fail(number: int) -> int:
        return 1 // number

    with connect("a test"):
        assert sorted(each(refuse, [1, 3])) == [(0, 10), (1, 30)]
        with pytest.raises(NearfarError, match=r"^the second piece is damaged$"):
            list(each(refuse, [1, 2, 3]))
        with pytest.raises(ZeroDivisionError):
            list(each(fail, [1, 0]))


# -- training ------------------------------------------------------------------------------------------------
def options(folder: Path, name: str, *more: str) -> list[str]:
    sized = [
        "batch_size=32",
        "epochs=20",
        "fingerprint_hidden=16",
        "embedding_dim=8",
        "sampler=random",
        "report=false",
        "seed=4",
    ]
    trainer = {"devices": 2, "log_every": 1, "accelerator": "cpu", "probe_rows": 0, "threads": 1}
    trainer |= {"checkpoint_steps": 5, "evaluate_start": "false"}
    where = ["experiment=molecules", "molecule_encoder=fingerprint", f"runs_dir={folder}", f"name={name}"]
    trained = [f"trainer.{key}={value}" for key, value in trainer.items()]
    return [*where, *sized, *trained, *split_files(folder), *more]


def train(overrides: list[str]) -> None:
    run_one(check_config(compose_config(overrides)), overrides, False, console())


def test_a_lost_node_changes_nothing_in_a_run(
    nodes: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parameters and log of torchrun's two processes, bit for bit, though a node was lost on the way."""
    assert together(train, options(tmp_path, "torchrun"))[0] is None
    run = RunFolder(tmp_path / "ray")
    steps = lambda: sum(record["kind"] == "step" for record in run.log())  # noqa: E731
    breaking = when(lambda: steps() > 20, lambda: nodes.replace(0))
    overrides = options(tmp_path, "ray", "trainer.engine=ray")
    run_on_ray(check_config(compose_config(overrides)), overrides, False, console())
    breaking.join()
    said = capsys.readouterr().out
    assert "was lost: all 2 start again from the last checkpoint (restart 1 of 3)" in said
    assert sum(line.startswith("┃ metric") for line in said.splitlines()) == 1, "told by this process"
    by_torchrun = RunFolder(tmp_path / "torchrun")
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (Checkpoint.load(each.checkpoints / name) for each in (by_torchrun, run))
        assert states_equal(a, b), name
        assert torch.equal(a.other_generators[0]["cpu"], b.other_generators[0]["cpu"])
    assert records(by_torchrun) == records(run)
    assert by_torchrun.read_json("metrics.json")["splits"] == run.read_json("metrics.json")["splits"]
    (resumed,) = run.read_json("resumed.json")
    assert 0 < resumed["step"] < max(record["step"] for record in run.log())
    assert resumed["changed"] == {}


def test_processes_that_stop_unasked_start_again(nodes: Nodes, tmp_path: Path) -> None:
    """A process that sees its node go asks all others to stop, which may all be done before Ray notices."""
    trainer = check_config(compose_config(options(tmp_path, "unused", "trainer.engine=ray"))).trainer

    def work() -> str:
        stopped = tmp_path / f"stopped-{os.environ['RANK']}"
        if not stopped.exists():
            stopped.touch()
            raise Interrupted("the run's folder")
        return os.environ["RANK"]

    said: list[str] = []
    assert run_on_cluster(work, trainer, said.append) == "0"
    assert any(
        "a node was lost: all 2 start again from the last checkpoint (restart 1 of 3)" in line
        for line in said
    )


# -- embedding -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    train(options(folder, "run", "epochs=1", "trainer.devices=1"))
    return folder / "run"


def test_a_lost_node_changes_no_vector(nodes: Nodes, run: Path, tmp_path: Path) -> None:
    """Begun here, cut off, gone on with by two encoders, one of which is lost: each row once, in order, bit for bit."""
    source = NewData(write(tmp_path / "new.tsv", pairs() * 8), {"text": "description"}, rows=25)
    trained = nearfar.load(run, "cpu")
    alone = embed_file(trained, source, tmp_path / "alone.parquet")
    output, chunks = tmp_path / "vectors.parquet", 0

    def cut(rows: int) -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_file(trained, source, output, advance=cut)
    parts = tmp_path / "vectors.parquet.parts"
    breaking = when(lambda: len(list(parts.glob("*.json"))) > 20, lambda: nodes.replace(1))
    said: list[str] = []
    with connect("a test"):
        written = embed_file(trained, source, output, pool=RayPool(trained, "cpu", say=said.append))
    breaking.join()
    assert any("an encoder was lost" in line for line in said)
    assert written.resumed == 7
    assert written.rows == alone.rows == len(pairs()) * 8
    assert pyarrow.parquet.read_table(output).equals(pyarrow.parquet.read_table(alone.path))
    assert not parts.exists()


def test_a_view_that_the_run_lacks_is_refused_before_an_encoder_starts(
    nodes: Nodes, run: Path, tmp_path: Path
) -> None:
    source = NewData(write(tmp_path / "new.tsv", pairs()[:3]), {"text": "description"})
    trained = nearfar.load(run, "cpu")
    with connect("a test"), pytest.raises(NearfarError, match="has no view 'picture'"):
        embed_file(trained, source, tmp_path / "v.parquet", towers=["picture"], pool=RayPool(trained, "cpu"))


# -- search --------------------------------------------------------------------------------------------------
def test_lost_nodes_take_no_trial_with_them(
    nodes: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial of a lost node goes on from its checkpoint: every epoch of each is trained once."""
    epochs = 24
    fixed = options(tmp_path, "search", "trainer.devices=1", f"epochs={epochs}")
    home = tmp_path / "search" / "search"

    def at_work() -> bool:
        logs = [log.read_text().count('"kind": "epoch"') for log in home.glob("*/train_log.jsonl")]
        return any(2 <= done < epochs - 10 for done in logs)

    # both nodes: which of them has that trial is not known here, and on busy cores trials seldom overlap
    breaking = when(at_work, lambda: nodes.replace(0, 1))
    drawn = ["lr=tag(log,interval(1e-4,1e-1))", "embedding_dim=4,8"]
    assert tune([*fixed, *drawn], trials=3, judge=0, console=console()) is None
    breaking.join()
    assert "its process was lost; it goes on from its checkpoint" in capsys.readouterr().out
    search = json.loads((tmp_path / "search" / "search.json").read_text())
    assert len(search["trials"]) == 3
    assert all(each["error"] is None and each["epochs"] == epochs for each in search["trials"])
    assert search["best"] == max(search["trials"], key=lambda each: each["objective"])["run"]
    assert any((run / "resumed.json").exists() for run in home.iterdir())
    for one in search["trials"]:
        trained = [record["epoch"] for record in RunFolder(one["run"]).log() if record["kind"] == "epoch"]
        assert trained == list(range(1, epochs + 1))
        assert objective(RunFolder(one["run"])) == one["objective"]


# -- neighbours ----------------------------------------------------------------------------------------------
def test_a_lost_node_changes_no_neighbour(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are added and searched on two nodes, one of which is lost: the index and the lists made here alone."""
    vectors = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    monkeypatch.setattr(disk_neighbors, "_PIECE_BYTES", 50 * 4 * 16)
    monkeypatch.setattr(disk_neighbors, "_STRETCH", 500)
    here, there = tmp_path / "here", tmp_path / "there"
    alone = nearest_neighbors_on_disk(tmp_path / "vectors.npy", 8, here)
    added = lambda: len([*there.glob("unfinished/part-*.faiss")]) > 5  # noqa: E731
    breaking = when(added, lambda: nodes.replace(0))
    near = nearest_neighbors_on_disk(tmp_path / "vectors.npy", 8, there, engine="ray")
    breaking.join()
    assert np.array_equal(near.positions, alone.positions)
    assert np.array_equal(near.stored, alone.stored)
    assert np.array_equal(near.stored_similarities, alone.stored_similarities)
