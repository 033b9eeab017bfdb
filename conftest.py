"""What is collected for its doctests: files with examples."""

from __future__ import annotations

import gc
import importlib
from contextlib import suppress
from pathlib import Path

SOURCE = Path(__file__).parent / "src"

# while the tests are collected libraries are imported, of which nothing is garbage: looking for it takes a tenth
gc.disable()


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
