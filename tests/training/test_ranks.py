"""``trainer.devices=N``: several processes train one run as one process does, stop together and go on exactly."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.systems import build_system, check_config
from nearfar.training import ranks
from nearfar.training.checkpoint import Checkpoint, Resume
from nearfar.training.distributed import DistributedLoss
from nearfar.training.fit import fit
from nearfar.training.loop import Interrupted
from nearfar.training.run_folder import RunFolder
from nearfar.training.shared_step import Sharing, check_shared
from nearfar.training.system import System
from processes import SECONDS, started_command, together
from run_files import assert_same_training, records, states_equal
from tiny_molecules import split_files
from toy_system import ToyModel, ToySystem, silent, toy, toy_config

pytestmark = pytest.mark.slow  # real runs

EVERY_STEP = {"epochs": 2, "trainer__log_every": 1, "trainer__probe_rows": 16, "trainer__threads": 1}


def steady(system: Any) -> Any:
    """The system without dropout, which draws something else in each process; with a weight that no step uses."""
    build = system.build_model

    def without_dropout() -> nn.Module:
        model: nn.Module = build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.register_module("spare", nn.Linear(2, 2))
        return model

    system.build_model = without_dropout
    return system


def train_toy(folder: Path, config: Any, resumed: bool = False) -> str:
    told: list[str] = []
    resume = Resume.find(str(folder), config) if resumed else None
    fit(toy(config), config, RunFolder(folder), resume, told.append)
    return "\n".join(told)


def train_steadily(folder: Path, config: Any) -> None:
    fit(steady(toy(config)), config, RunFolder(folder), say=silent)


# -- as one process ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {}),
        (2, {"trainer__accumulate": 2, "trainer__gradient_clip": 0.5}),
        (3, {"batch_size": 17}),  # the last batch has two rows, and one process none
        (3, {"batch_size": 17, "trainer__local_loss": True}),
        (2, {"trainer__cached_chunk": 2}),
        (2, {"trainer__ring": True}),
        (2, {"trainer__precision": "bf16-mixed"}),
    ],
    ids=lambda value: ",".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_losses_and_gradients_of_one_process(tmp_path: Path, world: int, options: dict[str, Any]) -> None:
    config = toy_config(**EVERY_STEP, **options)
    train_steadily(tmp_path / "one", config)
    config.trainer.devices = world
    assert together(train_steadily, tmp_path / "several", config, world=world) == [None] * world
    if options.get("trainer__precision") == "bf16-mixed":  # sums of other lengths: rounded after three digits
        a, b = (
            [row["loss"] for row in RunFolder(tmp_path / name).log() if row["kind"] == "step"]
            for name in ("one", "several")
        )
        assert a[1] == pytest.approx(b[1], rel=2e-2)
        return
    assert_same_training(tmp_path / "one", tmp_path / "several")
    last = [r for r in RunFolder(tmp_path / "several").log() if r["kind"] == "step"][-1]
    rows = {8: 6, 17: 2}[config.batch_size]
    assert last["rows_per_rank"] == -(-rows // world)
    own = config.trainer.local_loss or config.trainer.ring
    assert last["rows"] == (last["rows_per_rank"] if own else rows)
    assert (
        last["world_size"] == RunFolder(tmp_path / "several").read_json("model.json")["world_size"] == world
    )
    metrics = [RunFolder(tmp_path / name).read_json("metrics.json")["splits"] for name in ("one", "several")]
    assert metrics[0]["val"]["MRR"]["value"] == pytest.approx(metrics[1]["val"]["MRR"]["value"], abs=1e-3)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    config = toy_config(**EVERY_STEP)
    train_steadily(tmp_path / "one", config)
    config.trainer.devices = 2
    config.trainer.gather_with_grad = False
    assert together(train_steadily, tmp_path / "several", config) == [None, None]
    assert_same_training(tmp_path / "one", tmp_path / "several", exact=False)


def wrappers_at_the_end(folder: Path, config: Any) -> int:
    """How many wrappers of DDP are alive when the process group goes."""
    destroy, alive = torch.distributed.destroy_process_group, []

    def count() -> None:
        alive.append(sum(type(each).__name__ == "DistributedDataParallel" for each in gc.get_objects()))
        destroy()

    torch.distributed.destroy_process_group = count
    train_toy(folder, config)
    return alive[0]


def test_the_wrapper_goes_before_the_group(tmp_path: Path) -> None:
    """Its reducer, if it is the last to hold the group, waits for gloo's thread with the interpreter's lock held."""
    config = toy_config(epochs=1, trainer__devices=2)
    assert together(wrappers_at_the_end, tmp_path / "run", config) == [0, 0]


def test_early_stopping_and_a_last_step_are_agreed_on(tmp_path: Path) -> None:
    config = toy_config(
        trainer__devices=2, epochs=30, lr=1e-9, patience=2, min_epochs=5, trainer__probe_rows=0
    )
    together(train_toy, tmp_path / "early", config)
    assert len([r for r in RunFolder(tmp_path / "early").log() if r["kind"] == "epoch"]) == 5
    config = toy_config(trainer__devices=2, trainer__max_steps=11, trainer__probe_rows=0)
    together(train_toy, tmp_path / "cut", config)
    assert Checkpoint.load(tmp_path / "cut").step == 11
    assert RunFolder(tmp_path / "cut").finished


def train_molecules(folder: Path, config: Any) -> None:
    system = build_system(config)
    ranks.one_after_the_other(lambda: system.prepare(silent))
    fit(system, config, RunFolder(folder), say=silent)


def test_molecules_with_masks_and_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    quiet = ["dropout=0", "fingerprint_dropout=0", "input_dropout=0", "learn_temperature=true"]
    sized = ["epochs=1", "batch_size=32", "fingerprint_hidden=32", "embedding_dim=16", "memory=48"]
    options = [
        "trainer.log_every=1",
        "trainer.probe_rows=32",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "report=false",
    ]
    overrides = ["experiment=molecules", *split_files(tmp_path), *quiet, *sized, *options]
    overrides += ["molecule_encoder=both", "false_negative_threshold=0.9", "sampler=random"]
    config = check_config(compose_config(overrides))
    train_molecules(tmp_path / "one", config)
    config.trainer.devices = 2
    assert together(train_molecules, tmp_path / "several", config) == [None, None]
    assert_same_training(tmp_path / "one", tmp_path / "several")
    logs = [
        [r for r in RunFolder(tmp_path / name).log() if r["kind"] == "step"] for name in ("one", "several")
    ]
    for name in ("candidates", "duplicate_keys", "false_negative_share", "memory_age", "scale"):
        assert logs[0][-1][name] == pytest.approx(logs[1][-1][name], rel=1e-4), name


# -- stopping and going on ----------------------------------------------------------------------------------------
def killed_at(folder: Path, config: Any, step: int) -> bool:
    """Train until the second process is killed, hard; whether the first may report what that broke."""
    encode = ToySystem.encode
    count = 0

    def dying(self: ToySystem, model: Any, batch: Any) -> Any:
        nonlocal count
        count += torch.is_grad_enabled()
        if count == step and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, model, batch)

    ToySystem.encode = dying  # type: ignore[method-assign]
    with pytest.raises(Exception, match=r"."):
        train_toy(folder, config)
    return ranks.is_first_error()


def test_kill_and_resume_is_bit_identical(tmp_path: Path) -> None:
    config = toy_config(trainer__devices=2, trainer__checkpoint_steps=2, trainer__threads=1)
    together(train_toy, tmp_path / "whole", config)
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    together(killed_at, killed.path, config, 14)
    assert not killed.finished
    saved = Checkpoint.load(killed.path)
    assert (saved.step, saved.batches, saved.processes) == (12, 3, 2)
    assert not torch.equal(saved.generators["cpu"], saved.other_generators[0]["cpu"])
    told = together(train_toy, killed.path, config, True)
    assert "2 processes share every batch of 8 rows, 4 in each" in told[0]
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (Checkpoint.load(folder.checkpoints / name) for folder in (whole, killed))
        assert states_equal(a, b), name
        assert torch.equal(a.other_generators[0]["cpu"], b.other_generators[0]["cpu"])
    assert records(whole) == records(killed)
    assert whole.read_json("metrics.json")["splits"] == killed.read_json("metrics.json")["splits"]
    assert killed.read_json("resumed.json")[0]["changed"] == {}

    alone = toy_config(trainer__checkpoint_steps=2, trainer__threads=1, epochs=5)
    resume = Resume.find(str(whole.path), alone)
    assert resume.changed == {"epochs": [4, 5], "trainer.devices": [2, 1]}
    said: list[str] = []
    fit(toy(alone), alone, RunFolder(tmp_path / "alone"), resume, said.append)
    assert any("had 2 process(es), this one has 1" in line for line in said)
    assert Checkpoint.load(tmp_path / "alone").processes == 1


def interrupted_at(folder: Path, config: Any, step: int, number: int) -> bool:
    encode = ToySystem.encode
    count = 0

    def asked(self: ToySystem, model: Any, batch: Any) -> Any:
        nonlocal count
        count += torch.is_grad_enabled()
        if count == step and ranks.rank() == 1 and torch.is_grad_enabled():
            os.kill(os.getpid(), number)
        return encode(self, model, batch)

    ToySystem.encode = asked  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train_toy(folder, config)
    ranks.any_rank()  # nobody waits for another: this is the next call of both
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all(tmp_path: Path, number: signal.Signals) -> None:
    config = toy_config(trainer__devices=2)
    assert together(interrupted_at, tmp_path / "run", config, 11, number) == [True, True]
    assert Checkpoint.load(tmp_path / "run").step == 11


def failing(folder: Path, config: Any) -> tuple[str, bool]:
    """An error on the second process alone: what each of them sees, and whether it is to show that."""
    loss_of = ToySystem.loss_of

    def broken(self: ToySystem, model: Any, embeddings: Any, batch: Any) -> Any:
        if ranks.rank() == 1 and torch.is_grad_enabled():
            raise NearfarError("the data of rank 1 are broken")
        return loss_of(self, model, embeddings, batch)

    ToySystem.loss_of = broken  # type: ignore[method-assign]
    try:
        train_toy(folder, config)
    except Exception as error:
        return str(error), ranks.is_first_error()
    return "no error", False


def test_an_error_of_one_process_ends_all_and_is_shown_once(tmp_path: Path) -> None:
    first, second = together(failing, tmp_path / "run", toy_config(trainer__devices=2))
    assert second == ("the data of rank 1 are broken", True)
    assert first[0] != "no error"
    assert not first[1]


def test_the_command_starts_its_processes_and_ctrl_c_stops_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized = ["batch_size=32", "epochs=1000", "fingerprint_hidden=16", "embedding_dim=8", "sampler=random"]
    options = ["trainer.devices=2", "trainer.log_every=1", "trainer.accelerator=cpu", "trainer.probe_rows=0"]
    where = ["experiment=molecules", "molecule_encoder=fingerprint", f"runs_dir={tmp_path}", "name=run"]
    overrides = [*where, *sized, *options, *split_files(tmp_path)]
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "output.txt"
    process = started_command("train", *overrides, stdout=output, stderr=output)
    folder = RunFolder(tmp_path / "run")
    try:
        end = time.monotonic() + 2 * SECONDS
        while process.is_alive() and len(list(folder.log())) < 5:
            assert time.monotonic() < end, "no step was logged"
            time.sleep(0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(SECONDS)
    finally:
        process.kill()
    said = output.read_text()
    assert process.exitcode == 130, said
    assert said.count("2 processes share every batch of 32 rows, 16 in each") == 1
    assert said.count("stopped; the run is saved") == 1
    assert "Traceback" not in said
    assert "Warning" not in said
    saved = Checkpoint.load(folder.path)
    assert saved.processes == 2
    assert saved.step >= 4
    assert folder.config().trainer.devices == 2


# -- what is refused ----------------------------------------------------------------------------------------------
def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    system, model = toy(toy_config()), ToyModel()
    check_shared(object(), model, Sharing(ring=True, local_loss=True))  # type: ignore[arg-type]  # alone: nothing to share
    monkeypatch.setattr(ranks, "count", lambda: 2)
    check_shared(system, model, Sharing())
    check_shared(system, model, Sharing(local_loss=True))
    with pytest.raises(NearfarError, match="leave the other options out"):
        check_shared(system, model, Sharing(ring=True, local_loss=True))
    model.norm = nn.BatchNorm1d(4)
    with pytest.raises(NearfarError, match=r"normalise by the statistics of the batch \(norm"):
        check_shared(system, model, Sharing())
    model.norm.eval()
    check_shared(system, model, Sharing())
    loss, system.loss = system.loss, DistributedLoss(system.loss)  # type: ignore[assignment]
    with pytest.raises(NearfarError, match="wraps its loss"):
        check_shared(system, model, Sharing())
    system.loss = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(NearfarError, match="holds no loss that can be taken apart"):
        check_shared(system, model, Sharing(local_loss=True))
    loss.reduction = "none"
    system.loss = loss
    with pytest.raises(NearfarError, match="reduction='none'"):
        check_shared(system, model, Sharing(local_loss=True))

    class Own(ToySystem):
        def training_step(self, model: Any, batch: Any) -> Any:
            raise AssertionError

    with pytest.raises(NearfarError, match="a training_step of its own"):
        check_shared(Own(toy_config()), ToyModel(), Sharing())

    class Plain(ToySystem):
        encode = System.encode

    with pytest.raises(NearfarError, match="defines no encode"):
        check_shared(Plain(toy_config()), model, Sharing())


def test_one_process_says_what_has_no_effect() -> None:
    assert Sharing().describe(8) is None
    assert Sharing(local_loss=True).describe(8) == "one process: local_loss has no effect"
    both = Sharing(local_loss=True, gather_with_grad=False).describe(None)
    assert both == "one process: local_loss and gather_with_grad have no effect"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["-m", "seed=0,1"], "trains each run in one process"),
        (["batch_size=1"], "batch_size=1"),
        (["trainer.ring=true", "trainer.local_loss=true"], "leave the other options out"),
        (["batch_size=64", "trainer.cached_chunk=32"], "and 2 processes: the batch is one chunk"),
    ],
)
def test_options_that_are_refused_before_a_process_starts(overrides: list[str], message: str) -> None:
    command = ["train", "experiment=molecules", "trainer.devices=2", "trainer.accelerator=cpu", *overrides]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, NearfarError), result.output
    assert message in str(result.exception)


def test_torchrun_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ranks.VARIABLES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the job: this is its script, one process
    assert ranks.start() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NearfarError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        ranks.start()
    monkeypatch.delenv("WORLD_SIZE")
    step = {"STEP_NUM_TASKS": 4, "STEP_NUM_NODES": 2, "PROCID": 3, "LOCALID": 1, "NODEID": 1, "JOB_ID": 94321}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[7-8]")
    for name in ranks.VARIABLES:
        monkeypatch.setenv(name, "")  # so that they are put back
        monkeypatch.delenv(name)
    ranks._take_from_slurm()
    found = [os.environ[name] for name in ranks.VARIABLES]
    assert found == ["3", "1", "4", "2", "1", "node7", "19321"]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(NearfarError, match="3 tasks on 2 nodes"):
        ranks._take_from_slurm()


def test_fit_alone_refuses_several_devices(tmp_path: Path) -> None:
    config = toy_config(trainer__devices=2)
    with pytest.raises(NearfarError, match="this process is alone"):
        fit(toy(config), config, RunFolder(tmp_path), say=silent)
