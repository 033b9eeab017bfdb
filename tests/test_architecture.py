"""Imports only ever point down the floors of docs/architecture.md; light things stay light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import nearfar

SOURCE = Path(nearfar.__file__).parent
#: the rings of docs/architecture.md, each from its top floor to its ground
VERBS = [
    {
        "cli",
        "doctor_cli",
        "compare_cli",
        "data_cli",
        "use_cli",
        "mine_cli",
        "launch",
        "tune",
    }
]
WORKBENCH_ABOVE = [{"pytest_plugin", "board"}, {"lab", "serving", "integrations", "verify"}]
APPLICATIONS = [{"systems"}]
WORKBENCH = [{"training"}, {"config"}]
CORE = [
    {"doctor"},
    {"towers"},
    {"mining"},
    {"batching", "metrics", "data", "models"},
    {"functional"},
    {"losses"},
    {"contrast"},
    {"schedules", "labels", "configs", "terminal", "ids", "directions", "cluster"},
    {"arguments"},
    {"errors", "lazy"},
]
FLOORS = [*VERBS, *WORKBENCH_ABOVE, *APPLICATIONS, *WORKBENCH, *CORE]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nearfar."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "nearfar":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("nearfar.")}
    return found & LEVEL.keys()


def modules() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(SOURCE).parts
    own = parts[0].removesuffix(".py")
    for other in imports(path):
        if other == own:
            continue
        assert LEVEL[other] >= LEVEL[own], (
            f"{path.relative_to(SOURCE)} imports {other}, which stands above it"
        )


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if p.is_relative_to(SOURCE / "data")],
    ids=lambda p: str(p.relative_to(SOURCE)),
)
def test_data_knows_formats_alone(path: Path) -> None:
    """Files are read without networks and samplers, which stand on the same floor."""
    assert not imports(path) & {"models", "batching"}


def test_systems_read_no_formats() -> None:
    """What a system adds is options, training and judging: 10,000 lines are enough for all of them."""
    lines = sum(len(path.read_text().splitlines()) for path in (SOURCE / "systems").rglob("*.py"))
    assert lines <= 10_000


def test_every_module_has_a_floor() -> None:
    names = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()}
    assert names == LEVEL.keys()


@pytest.mark.slow
def test_no_system_knows_another() -> None:
    """But for fair detection, which is about a detector; a file beside the folders is for every system."""
    shared = {path.stem for path in (SOURCE / "systems").glob("*.py")}
    for path in (SOURCE / "systems").rglob("*.py"):
        own = path.relative_to(SOURCE / "systems").parts[0].removesuffix(".py")
        foreign = {
            node.module.split(".")[2]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nearfar.systems.")
        } - {own}
        assert foreign - shared <= ({"detector"} if own == "fair_detection" else set()), path


def loaded(code: str) -> set[str]:
    probe = f"{code}\nimport sys; print('\\n'.join(m.split('.')[0] for m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {
    "lightning",
    "torch_geometric",
    "transformers",
    "rdkit",
    "faiss",
    "numba",
    "sklearn",
    "pandas",
    "hydra",
    "matplotlib",
    "ray",
}


def test_import_nearfar_loads_nothing_heavy() -> None:
    assert not loaded("import nearfar") & (HEAVY | {"torch", "numpy", "rich"})


@pytest.mark.slow
def test_losses_and_samplers_load_no_frameworks() -> None:
    assert not loaded("import nearfar.losses, nearfar.functional, nearfar.schedules") & HEAVY
    assert not loaded("import nearfar.batching, nearfar.metrics") & (HEAVY - {"numba", "faiss"})


@pytest.mark.slow
def test_a_store_opens_without_torch() -> None:
    assert not loaded("import nearfar.serving.stores.faiss_file") & (HEAVY | {"torch"})


@pytest.mark.slow
def test_runs_are_read_compared_and_shown_without_torch() -> None:
    """Reading, comparing, reporting and the board work on numbers of finished runs; PyTorch takes seconds to load."""
    read = "import nearfar.doctor.run, nearfar.lab.compare, nearfar.lab.report, nearfar.board.server"
    assert "torch" not in loaded(read)


@pytest.mark.slow
def test_a_wrong_option_is_refused_without_torch() -> None:
    code = "import sys; sys.argv = ['nearfar', 'train', 'experiment=pairs', 'exists=overwrite']\n"
    code += (
        "from nearfar.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2"
    )
    assert "torch" not in loaded(code)


@pytest.mark.slow
def test_help_and_list_load_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['nearfar', '--help']\nfrom nearfar.cli import app\n"
    code += "try:\n    app()\nexcept SystemExit: pass"
    assert not loaded(code) & (HEAVY | {"torch", "numpy"})
    listing = code.replace("'--help'", "'train', '--list'")
    assert not loaded(listing) & (HEAVY | {"torch", "numpy"})


@pytest.mark.parametrize("package", ["batching", "metrics", "mining", "serving"])
def test_no_module_takes_the_place_of_a_lazy_name(package: str) -> None:
    """Once a module of a package is imported, it is an attribute of the package, before any ``__getattr__``."""
    names = set(importlib.import_module(f"nearfar.{package}")._HOME)
    assert not names & {path.stem for path in (SOURCE / package).iterdir()}


def test_unknown_attribute_names_what_there_is() -> None:
    with pytest.raises(AttributeError, match="losses"):
        nearfar.loses  # noqa: B018
