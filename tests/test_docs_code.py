"""Python in the documentation that needs data of one's own, and so is no doctest: its names and arguments exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = [
    (f"{page.relative_to(ROOT)}:{number}", block)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
    if ">>>" not in block
]


def imported(tree: ast.Module) -> dict[str, Any]:
    """What of nearfar a block imports, by its name there."""
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "nearfar":
                    known[name.asname or "nearfar"] = importlib.import_module(
                        (name.asname and name.name) or "nearfar"
                    )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nearfar":
            module = importlib.import_module(str(node.module))
            known |= {name.asname or name.name: getattr(module, name.name) for name in node.names}
    return known


def called(function: ast.expr, known: dict[str, Any]) -> Any:
    """The object of nearfar that is called; None where it is something else."""
    if isinstance(function, ast.Name):
        return known.get(function.id)
    if isinstance(function, ast.Attribute):
        owner = called(function.value, known)
        if inspect.ismodule(owner) or inspect.isclass(owner):
            return getattr(owner, function.attr)
    return None


@pytest.mark.parametrize(("where", "block"), BLOCKS, ids=[where for where, _ in BLOCKS])
def test_names_and_arguments_exist(where: str, block: str) -> None:
    libraries = ("sentence_transformers", "transformers", "mteb", "lightning")
    if missing := [name for name in libraries if name in block and find_spec(name) is None]:
        pytest.skip(f"needs {missing[0]}")
    tree = ast.parse(block)
    known = imported(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        target = called(call.func, known)
        if target is None or any(isinstance(each, ast.Starred) for each in call.args):
            continue
        named = {str(each.arg): None for each in call.keywords if each.arg}
        inspect.signature(target).bind(*[None] * len(call.args), **named)


def test_most_blocks_use_nearfar() -> None:
    """Reading blocks without a name of nearfar would test nothing."""
    assert sum(bool(imported(ast.parse(block))) for _, block in BLOCKS) > 12
