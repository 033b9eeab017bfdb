"""A system that a package outside nearfar registers: its experiment trains by name, and mistakes in it are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from processes import command

pytestmark = pytest.mark.slow  # real runs

POINTS = "[nearfar.systems]\ntoy = {value}\n"
SYSTEM = """
from dataclasses import dataclass

from nearfar.config import RunOptions
from nearfar.systems import Registration

REGISTRATION = Registration("toy_system:ToySystem", "outside.nearfar:Options", configs="outside.configs")
OTHER = "no registration"


@dataclass
class Options(RunOptions):
    system: str = "toy"
    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.01
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    bootstrap: int = 0
"""
EXPERIMENT = """# @package _global_
# Noisy linear pairs, from outside
defaults:
  - override /system: toy
"""


def install(folder: Path, value: str = "outside.nearfar:REGISTRATION") -> None:
    """What pip leaves of a package: its modules, and the metadata that names its entry points."""
    files = {
        "outside/__init__.py": "",
        "outside/nearfar.py": SYSTEM,
        "outside/configs/__init__.py": "",
        "outside/configs/experiment/toy.yaml": EXPERIMENT,
        "outside-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n",
        "outside-1.0.dist-info/entry_points.txt": POINTS.format(value=value),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_it_trains_by_the_name_of_its_experiment(tmp_path: Path) -> None:
    install(tmp_path)
    listed = command("train", "--list", cwd=tmp_path, path=tmp_path)
    assert "Noisy linear pairs, from outside" in listed.stdout
    run = command(
        "train",
        "experiment=toy",
        "name=run",
        "trainer.accelerator=cpu",
        "epochs=1",
        cwd=tmp_path,
        path=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())
    assert (metrics["system"], metrics["epochs"]) == ("toy", 1)
    wrong = command("train", "experiment=toy", "batch_size=one", cwd=tmp_path, path=tmp_path)
    assert wrong.returncode == 2
    assert "batch_size=one" in wrong.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("outside.nearfar:OTHER", "has to be a nearfar.systems.Registration"),
        ("outside.gone:REGISTRATION", "cannot be imported (No module named 'outside.gone')"),
    ],
)
def test_a_faulty_registration_is_named(tmp_path: Path, value: str, message: str) -> None:
    install(tmp_path, value)
    refused = command("train", "experiment=relations", cwd=tmp_path, path=tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr
