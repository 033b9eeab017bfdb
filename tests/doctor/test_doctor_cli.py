"""``nearfar doctor``, and the diagnosis at the end of a run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from doctor_runs import at_chance, curriculum, diverging, random_infonce, write_run
from nearfar.cli import app
from nearfar.doctor import RULES
from nearfar.lab.doctor_command import command
from nearfar.training.fit import fit
from nearfar.training.run_folder import RunFolder
from toy_system import toy, toy_config

pytestmark = pytest.mark.slow  # real runs

RNG = np.random.default_rng(0)


def doctor(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", *arguments])
    return done.exit_code, done.output


def test_a_fault_is_told_with_evidence_cause_and_a_command(tmp_path: Path) -> None:
    folder = write_run(diverging(RNG), tmp_path / "run")
    code, shown = doctor(str(folder.path))
    assert code == 0
    lines = shown.splitlines()
    assert "1 warning" in lines[0]
    assert "curriculum-diverging" in lines[0]
    assert "nearfar train experiment=NAME hard_ratio=0.4" in shown
    assert "then   hardness_k=100, then lr=0.00033, then curriculum_epoch=10" in shown
    assert "lacks rows_with_neighbors" in shown
    written = folder.read_json("doctor.json")
    assert written["findings"][0]["override"] == "hard_ratio=0.4"
    assert not written["healthy"]
    assert len(written["unjudged"]) + written["judged"] == len(RULES)


def test_json_is_nothing_but_json(tmp_path: Path) -> None:
    folder = write_run(at_chance(RNG), tmp_path / "run")
    code, shown = doctor(str(folder.path), "--json")
    assert code == 0
    assert json.loads(shown) == folder.read_json("doctor.json")


@pytest.mark.parametrize(("run", "code"), [(random_infonce, 0), (curriculum, 0), (at_chance, 1)])
def test_strict_says_by_its_exit_code(run: object, code: int, tmp_path: Path) -> None:
    folder = write_run(run(RNG), tmp_path / "run", finished=False)  # type: ignore[operator]
    assert doctor(str(folder.path), "--strict")[0] == code
    assert doctor(str(folder.path))[0] == 0


def test_the_command_is_the_runs_own_with_the_override_in_place(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_json(
        "config.yaml", {"overrides": ["experiment=molecules", "hard_ratio=0.6", "name=a", "data.dir=my data"]}
    )
    found = command(["hard_ratio=0.4 lr=1e-4"], tmp_path)
    assert found == "nearfar train experiment=molecules 'data.dir=my data' hard_ratio=0.4 lr=1e-4"


def test_quotes_that_nothing_needs_are_left_out_of_the_command(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_json(
        "config.yaml", {"overrides": ["data.train='/data/a.tsv'", "hard_ratio='0.3 -> 0.6'"]}
    )
    assert command([], tmp_path) == (
        "nearfar train data.train=/data/a.tsv " + shlex.quote("hard_ratio='0.3 -> 0.6'")
    )


def test_a_run_ends_with_its_diagnosis(tmp_path: Path) -> None:
    said: list[str] = []
    config = toy_config(epochs=3)
    folder = fit(toy(config), config, RunFolder(tmp_path / "run"), say=said.append)
    written = folder.read_json("doctor.json")
    assert written["healthy"], written["findings"]
    assert f"doctor: {written['verdict']}" in said
    broken = toy_config(epochs=3, lr=1e-12)
    said.clear()
    folder = fit(toy(broken), broken, RunFolder(tmp_path / "broken"), say=said.append)
    assert not folder.read_json("doctor.json")["healthy"]
    assert any("loss-" in line and "chance" in line for line in said)
