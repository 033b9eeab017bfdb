"""The model of any number of views: what is encoded, what is shared, and which weights it takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nearfar.errors import NearfarError
from nearfar.models.views import PassThrough, Standardize, ViewMemory, ViewModel, build_head


def seeded(make: Callable[[], ViewModel], seed: int = 0) -> ViewModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def model(memory: int = 0, reference: int | None = None, **options: object) -> ViewModel:
    kept = ViewMemory({"a": 2, "meta.b": 2}, memory, reference) if memory else None
    towers = {"a": PassThrough(4), "meta.b": PassThrough(6)}
    heads = {"a": nn.Linear(4, 2), "meta.b": nn.Linear(6, 2)}
    return ViewModel(towers, heads, memory=kept, **options)  # type: ignore[arg-type]


def test_a_view_goes_through_its_tower_and_its_head() -> None:
    views, x = seeded(model), torch.arange(18.0).reshape(3, 6)
    head = views.heads["meta_b"]
    torch.testing.assert_close(views.encode("meta.b", x), x @ head.weight.T + head.bias)  # type: ignore[operator,union-attr]
    some = views.encode("meta.b", x, torch.tensor([True, False, True]))
    assert torch.equal(some[1], torch.zeros(2))
    assert torch.equal(some[[0, 2]], views.encode("meta.b", x)[[0, 2]])


def test_a_shared_tower_is_one() -> None:
    tower, head = nn.Sequential(nn.Linear(4, 3)), nn.Linear(3, 2)
    views = ViewModel({"a": tower, "b": tower}, {"a": head, "b": head})
    assert sum(p.numel() for p in views.parameters()) == 15 + 8
    assert views.tower("a") is views.tower("b")


def test_the_scale_is_that_of_the_temperature_and_has_a_bound() -> None:
    assert model(temperature=0.05).scale() is None
    learned = model(temperature=0.05, learn_temperature=True)
    scale = learned.scale()
    assert scale is not None
    assert scale.item() == pytest.approx(20)
    assert learned.log_scale is not None
    learned.log_scale.data.fill_(math.log(500.0))
    assert learned.scale() == 100
    with pytest.raises(NearfarError, match="beyond max_scale=100"):
        model(temperature=0.001, learn_temperature=True)
    with pytest.raises(NearfarError, match=r"towers are for \['a'\] and heads for \['b'\]"):
        ViewModel({"a": PassThrough(2)}, {"b": nn.Identity()})


def filled(views: ViewModel, steps: int) -> ViewModel:
    assert views.memory is not None
    for step in range(steps):
        rows, groups = torch.full((3, 2), float(step)), torch.arange(3) + 3 * step
        vectors = None if views.memory.vectors is None else torch.full((3, 5), float(step))
        views.memory.push({"a": rows, "meta.b": -rows}, {"a": groups, "meta.b": groups + 100}, vectors)
    return views


def test_a_memory_keeps_the_last_items_of_every_view() -> None:
    memory = filled(model(memory=7, reference=5), 4).memory
    assert memory is not None
    assert memory.filled == 7
    assert memory.age().item() == pytest.approx((1 * 3 + 2 * 3 + 3) / 7)
    kept = sorted(range(12))[-7:]
    assert sorted(memory.groups("a").tolist()) == kept
    assert sorted(memory.groups("meta.b").tolist()) == [group + 100 for group in kept]
    assert torch.equal(memory.rows("a"), -memory.rows("meta.b"))
    for row, group in zip(memory.rows("a"), memory.groups("a").tolist(), strict=True):
        assert row.tolist() == [group // 3] * 2
    assert memory.vectors is not None
    assert torch.equal(memory.vectors.rows()[:, 0], memory.rows("a")[:, 0])


@pytest.mark.parametrize("memory", [0, 7, 9])
@pytest.mark.parametrize("learns", [False, True])
def test_weights_of_a_model_with_another_memory_or_temperature(memory: int, learns: bool) -> None:
    source = filled(seeded(lambda: model(memory=7, temperature=0.1, learn_temperature=True), 1), 2)
    target = seeded(lambda: model(memory=memory, temperature=0.05, learn_temperature=learns), 2)
    state = source.state_dict()
    target.load_state_dict(state)
    x = torch.ones(1, 4)
    assert torch.equal(target.encode("a", x), source.encode("a", x))
    if memory:
        assert target.memory is not None
        assert target.memory.filled == (6 if memory == 7 else 0)
    scale = target.scale()
    assert scale is None if not learns else scale is not None and scale.item() == pytest.approx(10)
    assert state.keys() == source.state_dict().keys()  # what was given is left as it is
    plain = seeded(model, 3)
    learner = model(temperature=0.05, learn_temperature=True)
    learner.load_state_dict(plain.state_dict())
    scale = learner.scale()
    assert scale is not None
    assert scale.item() == pytest.approx(20)
    with pytest.raises(RuntimeError, match="heads"):
        ViewModel({"a": PassThrough(4)}, {"a": nn.Linear(4, 2)}).load_state_dict(plain.state_dict())


def test_standardised_columns() -> None:
    rows = torch.tensor([[0.0, 5.0, 1e6], [2.0, 5.0, 3e6], [4.0, 5.0, 2e6]])
    scaled = Standardize(rows)(rows)
    for column in (0, 2):
        assert scaled[:, column].mean().item() == pytest.approx(0, abs=1e-6)
        assert scaled[:, column].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(scaled[:, 1], torch.zeros(3))  # a constant column stays finite
    with pytest.raises(NearfarError, match="vectors have 3 numbers; this tower reads 4"):
        PassThrough(4)(rows)
    with pytest.raises(NearfarError, match="head=none: the tower gives 3 numbers and the shared space has 2"):
        build_head("none", 3, 2)
    assert build_head("mlp", 3, 2, hidden=4)(rows).shape == (3, 2)
