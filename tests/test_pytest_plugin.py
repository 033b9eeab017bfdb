"""The plug-in of pytest, in a pytest of its own, as a user has it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
# by its name alone: where nearfar is installed, its entry point would register it a second time
PLUGIN = ("--disable-plugin-autoload", "-p", "nearfar.pytest_plugin", "-p", "no:cacheprovider")
LOSSES = """
from nearfar.losses import InfoNCELoss


def alone(a, b):
    return InfoNCELoss(0.1)(a, b)
"""
LOADERS = """
class Loader:
    def __init__(self, forgets=False):
        self.at, self.forgets = 0, forgets

    def __iter__(self):
        for at in range(self.at, 4):
            self.at = at + 1
            yield [at]
        self.at = 0

    def state_dict(self):
        return {"at": 0 if self.forgets else self.at}

    def load_state_dict(self, state):
        self.at = state["at"]
"""


@pytest.mark.slow
def test_tests_pass_and_fail_with_the_verdict(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        loaders=LOADERS,
        contrastive=LOSSES,
        test_verdicts="""
        import contrastive
        from loaders import Loader

        def test_right(verify_resume):
            assert verify_resume(Loader).batches == 8

        def test_forgetful(verify_resume):
            verify_resume(lambda: Loader(forgets=True), stops=[2])

        def test_none(verify_resume):
            verify_resume(lambda: [[1], [2]])

        def test_alone(verify_loss):
            verify_loss(contrastive.alone)
        """,
    )
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*a resumed loader does not go on where it stopped: different: 8 batches*",
            "*after 2: 8 batches for 6 left: 2 too many*",
        ]
    )
    result.stdout.fnmatch_lines(["*NearfarError: the loader has no state_dict*"])
    result.stdout.fnmatch_lines(["*the gradient is not that of one: different: *", "*"])


@pytest.mark.slow
def test_nothing_heavy_is_loaded_before_a_fixture_is_used() -> None:
    code = (
        "import sys, nearfar.pytest_plugin; "
        "print([m for m in ('torch', 'numpy', 'numba', 'faiss', 'nearfar.verify') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pytest_finds_it_where_nearfar_is_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"nearfar": "nearfar.pytest_plugin"}
