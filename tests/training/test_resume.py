"""n steps equal k steps, a kill, a resume and n − k steps: bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.training.checkpoint import Checkpoint, Resume
from nearfar.training.fit import fit
from nearfar.training.loop import Interrupted
from nearfar.training.run_folder import RunFolder
from processes import run_until_killed
from run_files import records, states_equal
from toy_system import ToySystem, killed_after, toy, toy_config, train

pytestmark = pytest.mark.slow  # real runs


@pytest.mark.parametrize(
    ("workers", "accumulate", "kill_at"),
    [(0, 1, 13), (2, 1, 13), (0, 2, 15), (0, 1, 18), (0, 1, 34)],
    ids=["mid-epoch", "prefetching workers", "accumulation", "at an epoch's end", "last epoch"],
)
def test_kill_and_resume_is_bit_identical(
    tmp_path: Path, workers: int, accumulate: int, kill_at: int
) -> None:
    config = toy_config(
        trainer__workers=workers,
        trainer__accumulate=accumulate,
        trainer__checkpoint_steps=2,
        trainer__threads=1,
    )
    whole = train(tmp_path / "whole", config)
    run_until_killed(killed_after, config, tmp_path / "killed", kill_at)
    killed = RunFolder(tmp_path / "killed")
    assert not killed.finished
    saved = Checkpoint.load(killed.path)
    assert 0 < saved.step < Checkpoint.load(whole.path).step
    train(killed.path, config, Resume.find(str(killed.path), config))
    for name in ("last.ckpt", "best.ckpt"):
        assert states_equal(
            Checkpoint.load(whole.checkpoints / name), Checkpoint.load(killed.checkpoints / name)
        ), name
    assert records(whole) == records(killed)
    assert whole.read_json("metrics.json")["splits"] == killed.read_json("metrics.json")["splits"]
    assert killed.read_json("resumed.json")[0]["changed"] == {}


def test_different_seed_is_not_identical(tmp_path: Path) -> None:
    # Guards the test above: the comparison can fail.
    a = train(tmp_path / "a", toy_config())
    b = train(tmp_path / "b", toy_config(seed=4))
    assert not states_equal(Checkpoint.load(a.path), Checkpoint.load(b.path))


def test_dropout_depends_on_nothing_outside(tmp_path: Path) -> None:
    a = train(tmp_path / "a", toy_config())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    b = train(tmp_path / "b", toy_config())
    assert torch.equal(before, torch.get_rng_state()), "the caller's generator was moved"
    assert states_equal(Checkpoint.load(a.path), Checkpoint.load(b.path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_resumable_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    config = toy_config()
    whole = train(tmp_path / "whole", config)
    step = ToySystem.training_step
    count = 0

    def interrupted(self: ToySystem, model: Any, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 11:
            os.kill(os.getpid(), number)
        return step(self, model, batch)

    monkeypatch.setattr(ToySystem, "training_step", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", config)
    assert signal.getsignal(number) is handler
    monkeypatch.setattr(ToySystem, "training_step", step)
    stopped = tmp_path / "stopped"
    assert Checkpoint.load(stopped).step == 11
    train(stopped, config, Resume.find(str(stopped), config))
    assert states_equal(Checkpoint.load(whole.path), Checkpoint.load(stopped))


def test_resume_under_new_values(tmp_path: Path) -> None:
    first = train(tmp_path / "first", toy_config(epochs=2))
    longer = toy_config(epochs=3, lr=5e-3)
    resume = Resume.find(str(first.path), longer)
    assert resume.changed == {"epochs": [2, 3], "lr": [0.01, 0.005]}
    assert not resume.exact
    second = train(tmp_path / "second", longer, resume)
    state = Checkpoint.load(second.path)
    assert state.epoch == 3
    assert state.step > Checkpoint.load(first.path).step
    assert second.read_json("resumed.json")[0]["changed"]["lr"] == [0.01, 0.005]
    rates = [r["lr"] for r in second.log() if r["kind"] == "step" and r["epoch"] == 3]
    assert max(rates) <= 5e-3
    assert Checkpoint.load(first.path).epoch == 2, "the first run is preserve_state"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_cut_by_max_steps_goes_on_as_if_it_had_not_been(tmp_path: Path, accumulate: int) -> None:
    whole = train(tmp_path / "whole", toy_config(trainer__accumulate=accumulate))
    per_epoch = {1: 9, 2: 5}[accumulate]
    previous = None
    for steps in (per_epoch - 2, per_epoch + 3, 2 * per_epoch, None):  # two cuts in mid-epoch, one at an end
        config = toy_config(trainer__accumulate=accumulate, trainer__max_steps=steps)
        resume = None if previous is None else Resume.find(str(previous.path), config)
        assert resume is None or resume.changed.keys() == {"trainer.max_steps"}
        previous = train(tmp_path / f"until {steps}", config, resume)
        state = Checkpoint.load(previous.path)
        assert state.step == (steps or 4 * per_epoch)
        assert state.epoch == state.step // per_epoch
        assert previous.finished
        epochs = [record["epoch"] for record in previous.log() if record["kind"] == "epoch"]
        assert epochs == list(range(1, state.epoch + 1)), "an epoch that was cut has no record"
    for name in ("last.ckpt", "best.ckpt"):
        assert states_equal(
            Checkpoint.load(whole.checkpoints / name), Checkpoint.load(previous.checkpoints / name)
        ), name
    assert records(whole) == records(previous)
    assert whole.read_json("metrics.json")["splits"] == previous.read_json("metrics.json")["splits"]


def test_all_steps_done_is_said_and_nothing_trained(tmp_path: Path) -> None:
    config = toy_config(trainer__max_steps=11)
    first = train(tmp_path / "first", config)
    said: list[str] = []
    before = Checkpoint.load(first.path)
    fit(toy(config), config, RunFolder(first.path), Resume.find(str(first.path), config), said.append)
    assert any("all 11 steps are done" in line and "trainer.max_steps=" in line for line in said)
    assert states_equal(before, Checkpoint.load(first.path))


def test_start_epoch(tmp_path: Path) -> None:
    config = toy_config()
    first = train(tmp_path / "first", config)
    again = toy_config(start_epoch=3)
    second = train(tmp_path / "second", again, Resume.find(str(first.path), again))
    assert [r["epoch"] for r in second.log() if r["kind"] == "epoch"][-1] == 4
    wrong = toy_config(start_epoch=9)
    with pytest.raises(NearfarError, match="start_epoch=9"):
        train(tmp_path / "third", wrong, Resume.find(str(first.path), wrong))


def test_other_data_or_system_is_an_error(tmp_path: Path) -> None:
    config = toy_config()
    first = train(tmp_path / "first", config)
    with pytest.raises(NearfarError, match="other data"):
        train(tmp_path / "second", config, Resume.find(str(first.path), config), data_seed=1)
    other = toy_config(system="molecules")
    with pytest.raises(NearfarError, match="belongs to system 'toy'"):
        Resume.find(str(first.path), other)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match="no such run"):
        Checkpoint.load(tmp_path / "nothing")
    with pytest.raises(NearfarError, match="no checkpoint in this folder"):
        Checkpoint.load(tmp_path)
    broken = tmp_path / "last.ckpt"
    broken.write_bytes(b"half a file")
    with pytest.raises(NearfarError, match="not a readable checkpoint"):
        Checkpoint.load(broken)
    torch.save({"weights": 1}, broken)
    with pytest.raises(NearfarError, match="not a checkpoint of nearfar"):
        Checkpoint.load(broken)


def test_init_from_takes_weights_only(tmp_path: Path) -> None:
    first = train(tmp_path / "first", toy_config(epochs=1))
    config = toy_config(epochs=1, init_from=str(first.path), lr=0.0)
    second = train(tmp_path / "second", config)
    a, b = Checkpoint.load(first.path), Checkpoint.load(second.path)
    assert all(torch.equal(a.model[k], b.model[k]) for k in a.model)
    assert b.step == a.step, "counted anew, and not from where the first run ended"


def test_early_stopping(tmp_path: Path) -> None:
    config = toy_config(epochs=30, lr=1e-9, patience=2, min_epochs=5)
    folder = train(tmp_path / "run", config)
    epochs = [r for r in folder.log() if r["kind"] == "epoch"]
    assert len(epochs) == 5
    assert folder.read_json("metrics.json")["best_epoch"] <= 5
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    config = toy_config(epochs=30, lr=1e-9, patience=2)
    folder = train(tmp_path / "run", config)
    before = Checkpoint.load(folder.path)
    metrics = folder.read_json("metrics.json")["splits"]
    train(folder.path, config, Resume.find(str(folder.path), config))
    assert states_equal(before, Checkpoint.load(folder.path))
    assert folder.read_json("metrics.json")["splits"] == metrics


def test_new_weight_decay_and_batch_size_are_taken_up(tmp_path: Path) -> None:
    first = train(tmp_path / "first", toy_config(epochs=2))
    config = toy_config(epochs=4, batch_size=16, lr_schedule="linear", warmup=0.0, weight_decay=0.5)
    second = train(tmp_path / "second", config, Resume.find(str(first.path), config))
    rates = [r["lr"] for r in second.log() if r["kind"] == "step" and r["epoch"] == 3]
    # Half of the run is over, in epochs: half of the linear schedule too, although steps became fewer.
    assert 0.35 * config.lr < rates[0] < 0.5 * config.lr
    state = Checkpoint.load(second.path)
    assert state.optimizer is not None
    assert state.optimizer["param_groups"][0]["weight_decay"] == 0.5


def test_start_epoch_writes_a_run_of_its_own_with_every_epoch_once(tmp_path: Path) -> None:
    first = train(tmp_path / "first", toy_config(epochs=3))
    config = toy_config(epochs=3, start_epoch=1)
    resume = Resume.find(str(first.path), config)
    assert not resume.exact
    second = train(tmp_path / "second", config, resume)
    assert [r["epoch"] for r in second.log() if r["kind"] == "epoch"] == [1, 2, 3]
    assert [r["lr"] for r in second.log() if r["kind"] == "step"][-3] > 0


def test_a_replaced_run_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", toy_config(epochs=2))
    (folder.path / "report.html").write_text("old")
    folder.clear()
    assert not folder.finished
    with pytest.raises(NearfarError, match="no checkpoint"):
        Checkpoint.load(folder.path)
    train(folder.path, toy_config(epochs=1))
    assert Checkpoint.load(folder.path).epoch == 1
    assert not (folder.path / "report.html").exists()


def test_resuming_the_best_checkpoint_in_place_forgets_what_came_later(tmp_path: Path) -> None:
    config = toy_config(epochs=4)
    folder = train(tmp_path / "run", config)
    best = folder.checkpoints / "best.ckpt"
    earlier = Checkpoint.load(best)
    earlier.epoch, earlier.step = 2, 18
    earlier.save(best)
    resume = Resume.find(str(best), config)
    resume.carry_over(folder, Checkpoint.load(best))
    assert Checkpoint.load(folder.checkpoints / "last.ckpt").epoch == 2
    assert max(r["epoch"] for r in folder.log() if r["kind"] != "start") == 2
