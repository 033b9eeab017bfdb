"""A new system is written, installed, trained and tested by its own test; names that cannot be are refused."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nearfar.cli import app
from nearfar.errors import NearfarError
from nearfar.lab.new_system import check_system_name, write_system
from processes import SECONDS, command, start, write_to

NAME = "crystal_colors"


def install(folder: Path) -> None:
    """What pip leaves of an editable install: the metadata that names the entry points of ``pyproject.toml``."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in those.items())
        for group, those in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("".join(points))


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_system(NAME, tmp_path_factory.mktemp("new") / "system")
    install(place)
    return place


def test_the_files_of_a_system(folder: Path) -> None:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files >= {
        "pyproject.toml",
        "README.md",
        f"{NAME}/__init__.py",
        f"{NAME}/options.py",
        f"{NAME}/system.py",
        f"{NAME}/sample.csv",
        f"{NAME}/configs/experiment/{NAME}.yaml",
        f"tests/test_{NAME}.py",
    }
    texts = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert not any("$" in text or str(folder.parent) in text or str(Path.home()) in text for text in texts)


@pytest.mark.slow
@pytest.mark.usefixtures("module_cache")
def test_it_trains_by_the_real_command(folder: Path, tmp_path: Path) -> None:
    small = [
        "epochs=1",
        "bootstrap=100",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "name=run",
    ]
    done = command(
        "train", f"experiment={NAME}", *small, f"runs_dir={tmp_path / 'runs'}", cwd=folder, path=folder
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["system"], metrics["epochs"]) == (NAME, 1)
    assert "before training" in (run / "report.html").read_text()
    assert "255, " in (run / "report.html").read_text(), "values as the system shows them"


def run_pytest(folder: Path, output: Path) -> None:
    """``pytest`` in a folder, in this process, which ends with it."""
    os.chdir(folder)
    write_to(output, output)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    code = pytest.main(["-p", "no:cacheprovider"])
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.slow
def test_its_own_test_passes(folder: Path, tmp_path: Path) -> None:
    variables = {"NEARFAR_CACHE": str(tmp_path / "cache"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    process = start(run_pytest, (folder, tmp_path / "output"), variables)
    process.join(SECONDS)
    shown = (tmp_path / "output").read_text()
    assert process.exitcode == 0, shown
    assert "3 passed" in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ab", "a_system_with_a_name_that_is_long"])
def test_the_linter_is_content_whatever_the_name(tmp_path: Path, name: str) -> None:
    place = write_system(name, tmp_path / "system")
    chosen = "--select=E,F,W,I,B,UP,SIM,C4,RUF,PT,NPY,PIE"
    for arguments in (["check", chosen, "--no-cache", "."], ["format", "--check", "--no-cache", "."]):
        done = python(place, "ruff", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_types_are_right(folder: Path) -> None:
    # with the options and the cache of this repository, so that what it imports from here is not checked again
    root = Path(__file__).resolve().parents[2]
    done = python(
        root, "mypy", f"--cache-dir={root / '.mypy_cache'}", str(folder / NAME), str(folder / "tests")
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Crystal Colors", r"small letters, digits and single underscores, such as crystal_colors\."),
        ("2d", r"begins with a small letter"),
        ("a__b", r"such as a_b\."),
        ("", r"such as crystals\."),
        ("molecules", r"a system called 'molecules' already; choose a different name, such as my_molecules"),
        ("fine_tune", r"an experiment called 'fine_tune' already"),
        ("json", r"'json' is the name of a Python module"),
        ("torch", r"'torch' is the name of a Python module"),
        ("tests", r"'tests' is the name of a Python module"),
        ("class", r"'class' is a word of Python"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        write_system(name, tmp_path / "system")
    assert not (tmp_path / "system").exists()


def test_every_advised_name_is_a_name(tmp_path: Path) -> None:
    for name in ("my_molecules", "my_class", "my_json", "a_b", "crystals", NAME):
        check_system_name(name)


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert write_system(NAME) == Path(NAME), "an empty folder is filled"
    before = {path: path.read_text() for path in (tmp_path / NAME).rglob("*") if path.is_file()}
    with pytest.raises(NearfarError, match="is not empty, and nothing is overwritten"):
        write_system(NAME)
    assert {path: path.read_text() for path in (tmp_path / NAME).rglob("*") if path.is_file()} == before
    (tmp_path / "file").touch()
    with pytest.raises(NearfarError, match="is a file; name a folder"):
        write_system("other_colors", tmp_path / "file")
    with pytest.raises(NearfarError, match="cannot be written"):
        write_system("other_colors", tmp_path / "file" / "below")


@pytest.mark.slow
def test_the_command_says_what_to_do_next(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, ["new", "other_colors", "--output", str(tmp_path / "system")])
    assert shown.exit_code == 0, shown.exception
    for line in ("pip install -e ", "nearfar train experiment=other_colors", "pytest "):
        assert line in shown.output
