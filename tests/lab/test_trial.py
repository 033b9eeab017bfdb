"""Trials: the same options are no difference at all, a bad one is found worse, the run stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.config.compose import compose_config
from nearfar.config.registry import _REGISTERED, Registration
from nearfar.errors import NearfarError
from nearfar.lab.table import describe_trial, trial_table
from nearfar.lab.trial import Trial, try_prescription
from nearfar.launch import run_one
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder
from run_files import hashes
from tiny_molecules import split_files
from what_if_toy import trained

pytestmark = pytest.mark.slow  # real runs


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_REGISTERED, "toy", Registration("what_if_toy:OptionsToy", "what_if_toy:ToyOptions"))
        patch.setenv("NEARFAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two of four epochs done: 18 of 36 steps."""
    return trained(tmp_path_factory.mktemp("runs") / "half", trainer__max_steps=18)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("runs") / "finished", epochs=10, lr=0.02)


def text_of(trial: Trial) -> str:
    return " ".join(describe_trial(trial))


def test_the_same_option_is_no_difference_at_all(half: RunFolder) -> None:
    trial = try_prescription(half.path, 7, overrides=["temperature=0.2"], seeds=2)
    for difference in trial.differences.values():
        assert difference.value == 0.0
        assert difference.per_seed == (0.0, 0.0)
        assert difference.verdict == "not distinguishable"
    assert trial.changed == trial.unchanged
    assert trial.unchanged != trial.before, "and both have moved"


def test_the_unchanged_arm_is_what_the_run_itself_would_have_become(half: RunFolder, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    end = next(r for r in reversed(list(whole.log())) if r["kind"] == "epoch")
    trial = try_prescription(half.path, 18, overrides=["temperature=0.3"])
    assert trial.epoch == 3
    assert not trial.moved_back
    assert trial.unchanged["MRR"] == end["val"]["MRR"]
    assert trial.learning_rates[1] == pytest.approx(0.0, abs=1e-9)
    assert trial.changed != trial.unchanged


def test_a_planted_bad_option_is_found_worse(finished: RunFolder) -> None:
    trial = try_prescription(finished.path, 40, overrides=["lr=2"])
    assert trial.verdict == "worse"
    assert trial.differences["MRR"].high < 0
    assert "is worse than the run as it is" in text_of(trial)


def test_one_seed_says_that_it_is_one_and_several_are_paired(half: RunFolder) -> None:
    one = try_prescription(half.path, 9, overrides=["lr=0.2"])
    three = try_prescription(half.path, 9, overrides=["lr=0.2"], seeds=3)
    assert (one.differences["MRR"].seeds, three.differences["MRR"].seeds) == (1, 3)
    assert one.seeds == (3,)
    assert three.seeds == (3, 4, 5)
    assert three.differences["MRR"].per_seed[0] == one.differences["MRR"].value, (
        "its first draw is the run's own"
    )
    assert len(set(three.differences["MRR"].per_seed)) > 1
    assert "of one seed" in text_of(one)
    assert "3 draws of batches, all from one checkpoint" in text_of(three)


def test_a_finished_run_goes_back_in_its_schedules(finished: RunFolder) -> None:
    trial = try_prescription(finished.path, 9, overrides=["temperature=0.3"])
    assert (trial.epoch, trial.moved_back) == (6, True)
    assert 0.2 < trial.learning_rates[0] / 0.02 < 0.8, "the middle of the cosine"
    assert "moved back" in text_of(trial)
    long = try_prescription(finished.path, 85, overrides=["temperature=0.3"])
    assert long.epoch == 1, "85 steps are ten epochs of nine"
    chosen = try_prescription(finished.path, 9, overrides=["temperature=0.3"], start_epoch=8)
    assert chosen.epoch == 9
    with pytest.raises(NearfarError, match="ask for 90 steps or fewer"):
        try_prescription(finished.path, 91, overrides=["temperature=0.3"])
    with pytest.raises(NearfarError, match="fit from 0 to 9"):
        try_prescription(finished.path, 9, overrides=["temperature=0.3"], start_epoch=10)


def test_a_checkpoint_in_mid_epoch_starts_its_epoch_under_the_new_options(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", trainer__max_steps=14, sampler__name="hard", hard_ratio=0.5)
    trial = try_prescription(run.path, 9, overrides=["hard_ratio=1.0"])
    assert (trial.start_step, trial.epoch, trial.moved_back) == (14, 2, False)
    assert trial.changed != trial.unchanged, "nine steps of the old epoch's batches would have been the same"


def test_the_gravest_prescription_is_tried(half: RunFolder) -> None:
    with pytest.raises(NearfarError, match="no prescription to try"):
        try_prescription(half.path, 3)
    findings = [
        {"id": "slight", "severity": "note", "override": "lr=1"},
        {"id": "mute", "severity": "error", "override": ""},
        {"id": "grave", "severity": "warning", "override": "temperature=0.3 hard_ratio=0.4"},
    ]
    half.write_json("doctor.json", findings)
    try:
        trial = try_prescription(half.path, 3)
    finally:
        (half.path / "doctor.json").unlink()
    assert trial.overrides == ("temperature=0.3", "hard_ratio=0.4")
    assert trial.prescribed_by == "grave"


def test_the_run_stays_as_it_was_and_weights_of_arms_are_gone(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", epochs=2)
    before = hashes(run.path)
    trial = try_prescription(run.path, 3, overrides=["temperature=0.3"])
    again = try_prescription(run.path, 3, overrides=["temperature=0.3"])
    after = hashes(run.path)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("trials/temperature=0.3,steps=3") for name in after.keys() - before.keys())
    assert not any(name.endswith(".ckpt") for name in after.keys() - before.keys())
    assert again.folder == trial.folder + "-2"
    content = json.loads((Path(trial.folder) / "trial.json").read_text())
    assert content["verdict"] == trial.verdict
    assert content["differences"]["MRR"]["n"] == 20
    log = (Path(trial.folder) / "changed,seed=3" / "train_log.jsonl").read_text()
    assert '"temperature"' not in log
    assert '"scale": 3.33' in log


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperatur=1", "did you mean 'temperature'"),
        ("seed=1", "a trial sets this for both arms"),
        ("batchnorm=true", "batchnorm=true cannot be tried on this state: .*do not fit"),
    ],
)
def test_what_cannot_be_tried_leaves_nothing(half: RunFolder, override: str, message: str) -> None:
    before = hashes(half.path)
    with pytest.raises(NearfarError, match=message):
        try_prescription(half.path, 3, overrides=[override])
    assert hashes(half.path) == before
    with pytest.raises(NearfarError, match="at least 1 of each"):
        try_prescription(half.path, 0, overrides=["lr=1"])


def test_another_batch_size_takes_as_many_steps(half: RunFolder) -> None:
    trial = try_prescription(half.path, 5, overrides=["batch_size=16"])
    steps = [
        json.loads(line)["step"]
        for line in (Path(trial.folder) / "changed,seed=3" / "train_log.jsonl").read_text().splitlines()
        if '"step"' in line
    ]
    assert max(steps) == 18 + 5


def test_the_table_fits(half: RunFolder) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trial_table(try_prescription(half.path, 2, overrides=["lr=0.02"])))
    assert "…" not in console.export_text()


def test_molecules_from_the_command_line(tmp_path: Path) -> None:
    overrides = [
        "experiment=molecules",
        *split_files(tmp_path),
        f"runs_dir={tmp_path}",
        "name=run",
        "epochs=2",
        "batch_size=16",
        "embedding_dim=16",
        "fingerprint_hidden=32",
        "fingerprint_bits=128",
        "fingerprints=[morgan]",
        "bootstrap=0",
        "hardness_k=20",
        "text_encoder.dims=32",
        "learn_temperature=true",
        "memory=32",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "report=false",
    ]
    run = run_one(compose_config(overrides), overrides, False, Console(file=open("/dev/null", "w")))  # noqa: SIM115
    temperature = float(np.exp(-Checkpoint.load(run.path).model["log_scale"].item()))
    before = hashes(run.path)
    shown = CliRunner().invoke(
        app, ["doctor", str(run.path), "--what-if", "--batches", "2", "--try", "3", "--override", "lr=1.0"]
    )
    assert shown.exit_code == 0, shown.output
    after = hashes(run.path)
    assert {name: after[name] for name in before} == before
    content = json.loads((run.path / "what_if.json").read_text())
    assert content["temperature"] == pytest.approx(temperature, rel=1e-4)
    reasons = {each["name"]: each["reason"] for each in content["refused"]}
    assert "a different state than the run's (memory." in reasons["false negatives removed"]
    assert "mask_duplicates=true" in reasons["duplicates masked"]
    effects = {effect["counterfactual"]["name"]: effect for effect in content["effects"]}
    assert effects["lr=1.0"]["inert"], "a learning rate does nothing to one batch"
    # Candidates of a batch of 16 and a memory of 32; of a doubled one 16 more, masked pairs aside.
    assert 3.5 < content["baseline"]["uniform_level"]["value"] < np.log(48) + 1e-6
    assert content["baseline"]["uniform_level"]["value"] < effects["batch doubled"]["uniform_level"]["value"]
    for name in ("temperature halved", "temperature doubled"):
        assert not effects[name]["inert"]
        assert effects[name]["counterfactual"]["overrides"][1] == "learn_temperature=false"
    assert "worse" in shown.output
    assert "moved back" in shown.output
