"""The help of every verb, with an example that exists, and the completion of the shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from nearfar.cli import app


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that lead to it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from verbs(inner, (*path, name))


ROOT = get_command(app)
VERBS = dict(verbs(ROOT))
REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *(REPOSITORY / "skills").rglob("*.md"),
]


@pytest.mark.slow
@pytest.mark.parametrize("path", VERBS, ids=lambda path: " ".join(("nearfar", *path)))
def test_help_ends_with_an_example(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    last = shown.output.strip().splitlines()[-1].strip()
    assert last.startswith("Example: nearfar "), "give the command epilog=terminal.example(…)"
    words = shlex.split(last.removeprefix("Example: nearfar "))
    assert words[: len(path)] == list(path) or path == ("data", "read")  # `nearfar data key=value` reads
    assert unknown(words) == []


def unknown(words: list[str]) -> list[str]:
    """Of the words after ``nearfar``, the verb or the options that do not exist."""
    command, taken = ROOT, 0
    while taken < len(words) and words[taken] in getattr(command, "commands", {}):
        command, taken = command.commands[words[taken]], taken + 1
    options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
    if command.context_settings.get("ignore_unknown_options"):  # the rest is Hydra's
        return []
    given = [word.split("=")[0] for word in words[taken:] if re.match(r"--?[a-zA-Z]", word)]
    reads = command.name == "data" and words[taken : taken + 1] and "=" in words[taken]
    wrong = [] if taken and (reads or not hasattr(command, "commands")) else words[taken : taken + 1]
    wrong = [word for word in wrong if not word.startswith("-")]
    return wrong + [word for word in given if word not in options]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_of_the_documentation_exist(page: Path) -> None:
    blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    wrong = []
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ")
        if not line.startswith("nearfar "):
            continue
        line = re.split(r"\s#\s|\s[|>]\s|\s&&\s", line)[0]
        wrong += [(line, word) for word in unknown(shlex.split(line)[1:])]
    assert wrong == []


@pytest.mark.slow
def test_bash_completes_offline(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash on this machine")
    script = tmp_path / "complete.sh"
    script.write_text(
        'eval "$(nearfar --show-completion)"\n'
        "COMP_WORDS=(nearfar doc) COMP_CWORD=1\n"
        "$(complete -p nearfar | sed 's/.*-F \\([^ ]*\\).*/\\1/') nearfar\n"
        'echo "completed: ${COMPREPLY[*]}"\n'
    )
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": folder + os.pathsep + os.environ["PATH"]}
    done = subprocess.run([bash, "--norc", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["completed: doctor"], done.stdout + done.stderr


@pytest.mark.slow
def test_a_completion_loads_nothing_heavy() -> None:
    """It starts nearfar for every press of the key."""
    script = (
        "import sys\n"
        "from nearfar.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'hydra', 'faiss', 'numba'} & {*sys.modules}))\n"
    )
    asked = {"_NEARFAR_COMPLETE": "complete_bash", "COMP_WORDS": "nearfar doctor --wh", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['nearfar']\n{script}"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["--what-if", "[]"], done.stdout + done.stderr


def test_a_file_of_losses_says_where_its_function_is() -> None:
    from nearfar.errors import NearfarError
    from nearfar.losses import info_nce, supcon

    for file in (info_nce, supcon):
        name = file.__name__.rpartition(".")[2]
        with pytest.raises(NearfarError, match=rf"nearfar\.functional\.{name} \(from nearfar\.functional"):
            file(1, 2)  # type: ignore[operator]
