"""Hydra groups: one small file per choice; an experiment overrides only what differs."""

from __future__ import annotations

from importlib import resources

__all__ = ["experiments"]


def experiments() -> dict[str, str]:
    """Every experiment with the line that describes it (the first comment of its file).

    >>> "molecules_demo" in experiments()
    True
    """
    found = {}
    folder = resources.files(__name__).joinpath("experiment")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            comments = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
            found[file.name[:-5]] = next((c for c in comments if not c.startswith("@")), "")
    return found
