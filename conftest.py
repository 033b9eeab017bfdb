"""What is collected, files with examples for their doctests, and in which order it runs."""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "src"

# while the tests are collected libraries are imported, of which nothing is garbage: looking for it takes a tenth
gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes, mostly of waiting, begin first: at the end two processes would wait for the third."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Files without an example are not imported for their doctests: some take seconds, and each process collects."""
    if collection_path.suffix != ".py" or collection_path.name.startswith("test_"):
        return None
    if ">>>" not in collection_path.read_text(encoding="utf-8"):
        return True
    if collection_path.is_relative_to(SOURCE):
        # pytest would import the package first, which imports this file, and then this file once more: classes twice
        with suppress(ImportError):
            importlib.import_module(".".join(collection_path.relative_to(SOURCE).with_suffix("").parts))
    return None
