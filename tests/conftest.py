"""Fixtures that several files of tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import quick_fabric
from array_types import check_imports

SUPPORT = str(Path(__file__).parent / "support")
# pytest's own `pythonpath` is not that of the processes which tests start
if SUPPORT not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (SUPPORT, os.environ.get("PYTHONPATH"))))

quick_fabric.ask_once()
# before anything imports them; of the kernel what is called once for a loss, and not for every tile
check_imports(
    "losses",
    "metrics",
    "batching",
    "contrast/dense.py",
    "contrast/one_direction.py",
    "contrast/kernel.py",
    "contrast/softmax.py",
)


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder that all processes of these tests share, for what is made once (`tiny_runs`)."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own
    os.environ["NEARFAR_TEST_SESSION"] = str(shared / "shared")


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own for a file of tests, so that it neither finds nor leaves anything in yours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEARFAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the first test of a file, all objects that there are leave the collector's sight.

    Those of the libraries are a million, and looking at them each time took a fifth of these tests' time.
    """
    if _at != [item.path]:
        _at[:] = [item.path]
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


#: the file whose tests are at work
_at: list[Path] = []
