"""For the site: examples of docstrings (``>>>`` and what they print) are code, also outside a section of examples."""

from __future__ import annotations

import inspect
from typing import Any

import griffe

__all__ = ["Doctests", "fenced"]


class Doctests(griffe.Extension):
    """Puts fences around the examples of every docstring before it is read as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(inspect.cleandoc(obj.docstring.value))


def fenced(text: str) -> str:
    """A text whose examples stand between fences; an example ends at the first empty line."""
    lines: list[str] = []
    inside = False
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        if not inside and line.lstrip().startswith(">>> "):
            inside = True
            if lines and lines[-1].strip():
                lines.append("")
            lines.append(f"{indent}```pycon")
            margin = indent
        elif inside and not line.strip():
            inside = False
            lines.append(f"{margin}```")
        lines.append(line)
    if inside:
        lines.append(f"{margin}```")
    return "\n".join(lines)
