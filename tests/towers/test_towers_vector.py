"""Vectors, and the choice of a tower by name, by entry point and by the look of its values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nearfar.data.batch import Inputs, Rows
from nearfar.errors import NearfarError
from nearfar.models.views import PassThrough
from nearfar.towers import Tower, build_tower, guess_tower, load_tower, register_tower, tower_names
from nearfar.towers import build as registry


def test_vectors_are_standardised_by_the_training_rows(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(3, [[1.0, 10.0, 0.0]], size=(50, 3)).astype(np.float32)
    tower = build_tower("vector").fit(rows)
    module = tower.build()
    out = module(tower.read(rows).batch(torch.arange(50)))
    expected = (rows - rows.mean(0)) / np.where(rows.std(0) > 1e-3, rows.std(0), 1)
    assert np.allclose(out.numpy(), expected, atol=1e-4)
    assert np.allclose(tower.reference(rows), expected, atol=1e-4)
    tower.save(tmp_path)
    again = load_tower(tmp_path)
    loaded = again.build()
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(again.read(rows).batch(torch.arange(50))), out)


def test_lists_and_single_numbers_are_vectors() -> None:
    tower = build_tower("vector", standardize=False).fit([1.0, 2.0])
    assert tower.read([3.0]).batch(torch.tensor([0])).tolist() == [[3.0]]  # type: ignore[attr-defined]
    assert tower.check([1.0, "x", [1, 2], float("nan")]) == [
        None,
        "no number",
        "not 1 numbers",
        "number that is not finite",
    ]
    with pytest.raises(NearfarError, match="vectors have 2 numbers; those of training have 1"):
        tower.read([[1.0, 2.0]])
    with pytest.raises(NearfarError, match="was not fitted"):
        build_tower("vector").build()


class Lengths(Tower):
    """A tower of one's own: how long a text is."""

    kind = "lengths"

    def __init__(self, unit: float = 1.0) -> None:
        self.unit = unit

    @property
    def description(self) -> str:
        return f"length in units of {self.unit}"

    @property
    def options(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def read(self, values: Any) -> Inputs:
        return Rows(np.array([[len(value) / self.unit] for value in values], np.float32))

    def build(self) -> nn.Module:
        return PassThrough(1)


class Point:
    name, value = "lengths", "package:Lengths"

    def load(self) -> type[Tower]:
        return Lengths


def test_a_tower_of_another_package_is_known_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registry._installed.cache_clear()
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Point()] if group == "nearfar.towers" else []
    )
    try:
        assert "lengths" in tower_names()
        tower = build_tower("lengths", unit=2.0)
        assert tower.read(["four"]).batch(torch.tensor([0])).tolist() == [[2.0]]  # type: ignore[attr-defined]
        tower.save(tmp_path)
        assert load_tower(tmp_path).description == "length in units of 2.0"
    finally:
        registry._installed.cache_clear()


def test_a_tower_may_be_registered_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TOWERS", dict(registry.TOWERS))
    register_tower("lengths", Lengths)
    assert build_tower("lengths").description == "length in units of 1.0"
    register_tower("wrong", int)  # type: ignore[arg-type]
    with pytest.raises(NearfarError, match=r"has to be a class below nearfar\.towers\.Tower"):
        build_tower("wrong")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.zeros((2, 8, 8), np.uint8), "image"),
        (np.zeros((2, 8)), "vector"),
        (["a.PNG", None, "b.jpeg"], "image"),
        ([Path("a.png")], "image"),
        ([[1.0, 2.0], None], "vector"),
        (["a.png", "no picture"], "text"),
        (["1.5", "-2e3", None], "vector"),
        (["1.5", "two"], "text"),
        ([None, None], "text"),
    ],
)
def test_values_call_for_a_tower(values: Any, kind: str) -> None:
    assert guess_tower(values) == kind


def test_a_folder_without_a_tower_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NearfarError, match=r"tower\.json is missing"):
        load_tower(tmp_path)
    (tmp_path / "tower.json").write_text('{"kind": 3, "options": {}}')
    with pytest.raises(NearfarError, match="kind"):
        load_tower(tmp_path)
