"""Hydra groups: one small file per choice; an experiment overrides only what differs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

__all__ = ["experiments"]


def experiments(packages: Iterable[str] = ()) -> dict[str, str]:
    """Every experiment with the line that describes it (the first comment of its file).

    ``packages``: further packages of configurations, those of systems outside nearfar.

    >>> "molecules_demo" in experiments()
    True
    """
    described = {}
    for package in (__name__, *packages):
        folder = resources.files(package).joinpath("experiment")
        for file in sorted(folder.iterdir(), key=lambda f: f.name):
            if file.name.endswith(".yaml"):
                lines = file.read_text(encoding="utf-8").splitlines()
                comments = [line[1:].strip() for line in lines if line.startswith("#")]
                described[file.name[:-5]] = next((c for c in comments if not c.startswith("@")), "")
    return described
