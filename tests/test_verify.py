"""Certificates: losses of several processes as people write them, and loaders that forget."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import losses_of_others as others
import processes  # noqa: F401  (what processes have imported when they start)
from nearfar import verify
from nearfar.batching import HardNegativeSampler, RandomBatchSampler, nearest_neighbors
from nearfar.errors import NearfarError


# -- losses --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("fn", [others.nearfar_gather, others.gather_with_gradient, others.with_scale])
def test_losses_that_gather_with_gradients_pass(fn: Callable[..., torch.Tensor]) -> None:
    verdict = verify.loss(fn)
    assert verdict.passed, str(verdict)
    assert verdict.values == pytest.approx([verdict.value] * 2)
    assert (verdict.temperature is not None) == (fn is others.with_scale)


@pytest.mark.slow
def test_losses_of_labels_and_three_processes() -> None:
    assert verify.loss(others.nearfar_labels, ranks=3, labels=True).passed


@pytest.mark.slow
def test_wrong_losses_are_named() -> None:
    alone = verify.loss(others.own_rows_alone)
    assert not alone.passed
    assert "negatives of other processes are missing" in str(alone)
    cut = verify.loss(others.gather_without_gradient)
    assert not cut.passed
    assert cut.direction > 1 - 1e-6
    assert cut.scale == pytest.approx(0.5)
    assert "1/W" in cut.advice
    with pytest.raises(NearfarError, match=r"failed in a process: ValueError: shapes do not fit"):
        verify.loss(others.fails)


def test_what_processes_cannot_import_is_said() -> None:
    with pytest.raises(NearfarError, match="no lambda"):
        verify.loss(lambda a, b: a.sum())
    with pytest.raises(NearfarError, match="ranks"):
        verify.loss(others.own_rows_alone, ranks=1)


@pytest.mark.slow
def test_a_module_that_processes_do_not_find_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidden.py").write_text("def loss(a, b):\n    return (a * b).sum()\n")
    spec = importlib.util.spec_from_file_location("hidden", tmp_path / "hidden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hidden", module)
    spec.loader.exec_module(module)
    with pytest.raises(NearfarError, match="cannot import the module 'hidden'"):
        verify.loss(module.loss)


# -- loaders -------------------------------------------------------------------------------------------------
class Forgetful:
    """Batches of twelve numbers, shuffled; ``how`` says what its state forgets."""

    def __init__(self, how: str) -> None:
        self.how, self.epoch, self.at = how, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.at = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.epoch if self.how != "order" or not self.at else 99)
        order = torch.randperm(12, generator=generator).tolist()
        start = self.at
        for at in range(start, 4):
            self.at = at + 1
            yield order[3 * at : 3 * at + 3]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        ahead = {"repeats": -1, "skips": 1}.get(self.how, 0)
        return {"epoch": self.epoch, "at": max(0, self.at + ahead)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = (0 if self.how == "epoch" else state["epoch"]), state["at"]


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("right", "exact"),
        ("repeats", "1 repeated"),
        ("skips", "1 skipped"),
        ("order", "strange"),
        ("epoch", "repeated"),
    ],
)
def test_what_a_loader_forgets(how: str, word: str) -> None:
    verdict = verify.resume(lambda: Forgetful(how))
    assert verdict.passed == (how == "right"), str(verdict)
    assert word in str(verdict), str(verdict)


def test_samplers_of_nearfar_are_exact() -> None:
    vectors = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    neighbors = nearest_neighbors(vectors, 5)
    makers: list[Callable[[], Any]] = [
        lambda: RandomBatchSampler(40, 8, seed=1),
        lambda: HardNegativeSampler(neighbors, 8, hardness_k=5, seed=1),
    ]
    for make in makers:
        assert verify.resume(make).passed


def test_loaders_that_cannot_be_judged() -> None:
    with pytest.raises(NearfarError, match="no state_dict"):
        verify.resume(lambda: [[1], [2]])

    class Endless(Forgetful):
        def __iter__(self) -> Iterator[list[int]]:
            while True:
                yield [1]

    with pytest.raises(NearfarError, match="without an end"):
        verify.resume(lambda: Endless("right"), most=50)
    with pytest.raises(NearfarError, match="stops: 99"):
        verify.resume(lambda: Forgetful("right"), stops=[99])
