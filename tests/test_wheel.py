"""What is installed from a wheel: every file that commands read, and an import that loads nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nearfar"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="needs the extra dev")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_every_file_and_no_other(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    about = f"nearfar-{PROJECT['version']}.dist-info/"
    assert {name for name in held if not name.startswith(about)} == ours
    kinds = {Path(name).suffix for name in ours}
    assert {".py", ".yaml", ".html", ".js", ".css", ".txt", ".csv", ".typed"} <= kinds
    assert about + "licenses/LICENSE" in held


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    about = f"nearfar-{PROJECT['version']}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(about + "METADATA").decode())
        entries = archive.read(about + "entry_points.txt").decode()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "nearfar = nearfar.cli:main" in entries
    # by the names of pyproject.toml: pip before 23.3 takes an extra that is written differently for none
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_importing_from_the_wheel_loads_nothing_heavy(wheel: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import nearfar, nearfar.cli\n"
        "print(nearfar.__file__.startswith(sys.argv[1]))\n"
        "print(sorted({'torch', 'numpy', 'hydra', 'numba', 'faiss', 'rich'} & {*sys.modules}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(wheel)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["True", "[]"], done.stdout + done.stderr


def test_the_smoke_test_tries_every_extra_and_the_release_runs_it() -> None:
    import runpy

    smoke = runpy.run_path(str(ROOT / "tools" / "smoke.py"))
    assert set(smoke["EXTRAS"]) == {*PROJECT["optional-dependencies"]} - {*smoke["FOR_DEVELOPMENT"]}
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == "smoke"
    assert "secrets." not in text
    tried = " ".join(jobs["smoke"]["strategy"]["matrix"]["extras"]).split()
    assert {word for word in tried if not word.startswith("--")} <= set(smoke["EXTRAS"])
