"""Libraries that take seconds to load, for the files of tests that use them: collected by all processes, run by one."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest


class Lazily:
    """A module that is imported when something of it is asked for; without it the file of tests is skipped."""

    def __init__(self, name: str, reason: str | None = None) -> None:
        if find_spec(name.split(".")[0]) is None:
            pytest.skip(reason or f"needs {name}", allow_module_level=True)
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # pytest asks everything in a file of tests what it is
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
