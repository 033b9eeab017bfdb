"""Objective: the sum, its schedule, and shares of the gradient that leave no trace."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from nearfar.errors import NearfarError
from nearfar.losses.focal import FocalLoss
from nearfar.losses.info_nce import InfoNCELoss
from nearfar.losses.objective import Objective
from nearfar.schedules import Piecewise


class Model(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 5))
            self.head = nn.Linear(5, 3)

    def forward(self, x):
        z = self.body(x)
        return z, self.head(z)


def batch(n: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 6, generator=generator) for _ in range(2))
    return x, y, torch.randint(3, (n,), generator=generator)


def values_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    x, y, labels = batch()
    z, logits = model(x)
    other, _ = model(y)
    return {"contrastive": InfoNCELoss(0.5)(z, other), "focal": FocalLoss()(logits, labels)}, z


def number(x: float) -> torch.Tensor:
    return torch.tensor(x)


def test_the_sum_and_its_gradient():
    weights = {"a": 0.3, "b": 0.7, "c": 2}
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    values = {"b": (x**2).sum(), "a": x.prod(), "c": x[1]}
    objective = Objective(weights)
    total = objective(values)
    plain = 0.3 * x.prod() + 0.7 * (x**2).sum() + 2 * x[1]
    assert total.shape == ()
    assert total.item() == pytest.approx(plain.item(), rel=1e-12)
    gradients = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (total, plain)]
    torch.testing.assert_close(*gradients)
    assert objective.record is not None
    assert objective.record.to_dict() == pytest.approx(
        {
            "total": 0.3 * 6 + 0.7 * 14 + 2 * 2,
            "a/raw": 6.0,
            "a/weight": 0.3,
            "a/weighted": 1.8,
            "b/raw": 14.0,
            "b/weight": 0.7,
            "b/weighted": 9.8,
            "c/raw": 2.0,
            "c/weight": 2.0,
            "c/weighted": 4.0,
        }
    )


def test_shares_by_hand():
    """Gradients (3, 0) and (0, 4) with weights 2 and 0.5; a third against the first."""
    z = torch.tensor([1.0, 1.0], requires_grad=True)
    values = {"a": 3 * z[0], "b": 4 * z[1], "c": -z[0] + z[1]}
    objective = Objective({"a": 2.0, "b": 0.5, "c": 1.0})
    objective(values, on=z)
    flat = objective.record.to_dict()
    whole = 6 + 2 + math.sqrt(2)
    assert [flat[f"{k}/share"] for k in "abc"] == pytest.approx([6 / whole, 2 / whole, math.sqrt(2) / whole])
    assert [flat[f"{k}/connected"] for k in "abc"] == [1.0, 1.0, 1.0]
    cosines = [flat["a/cosine/b"], flat["a/cosine/c"], flat["b/cosine/c"]]
    assert cosines == pytest.approx([0.0, -math.sqrt(0.5), math.sqrt(0.5)])
    assert objective.measure_shares(values, z) == objective.record.gradient
    turned = Objective({"a": -2.0, "b": 0.5, "c": 1.0}).measure_shares(values, z)
    assert turned.shares == pytest.approx(objective.record.gradient.shares)
    assert turned.cosines["a", "c"] == pytest.approx(math.sqrt(0.5))


def test_shares_on_several_tensors_are_those_of_one_vector():
    model = Model().double()
    x, y, labels = (t.double() if t.is_floating_point() else t for t in batch())
    z, logits = model(x)
    values = {"contrastive": InfoNCELoss(0.5)(z, model(y)[0]), "focal": FocalLoss()(logits, labels)}
    weights = {"contrastive": 0.3, "focal": 0.7}
    parameters = list(model.parameters())
    flat = {}
    for name, value in values.items():
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        flat[name] = weights[name] * torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]
        )
    norms = {name: g.norm().item() for name, g in flat.items()}
    measured = Objective(weights).measure_shares(values, on=model.parameters())  # a generator
    assert measured.shares == pytest.approx({k: norm / sum(norms.values()) for k, norm in norms.items()})
    cosine = torch.cosine_similarity(flat["contrastive"], flat["focal"], dim=0).item()
    assert measured.cosines["contrastive", "focal"] == pytest.approx(cosine)


def test_frozen_tensors_have_no_part():
    model = Model()
    values, _ = values_of(model)
    frozen = torch.ones(3)
    alone = Objective({"contrastive": 1, "focal": 1}).measure_shares(values, [model.body[0].weight])
    both = Objective({"contrastive": 1, "focal": 1}).measure_shares(values, [frozen, model.body[0].weight])
    assert alone == both


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("place", ["embedding", "parameters", "first layer"])
def test_measuring_leaves_no_trace(dropout, place):
    """Bit for bit the same gradients with and without, and nothing touched in between."""
    found = []
    for measure in (False, True):
        model = Model(dropout)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.125)  # of an earlier, accumulated batch
        with torch.random.fork_rng():
            torch.manual_seed(3)
            values, z = values_of(model)
            objective = Objective({"contrastive": 0.3, "focal": 0.7})
            on = {"embedding": z, "parameters": list(model.parameters()), "first layer": model.body[0].weight}
            total = objective(values, on=on[place] if measure else None)
            state = torch.get_rng_state()
            if measure:
                objective.measure_shares(values, on[place])
                assert torch.equal(torch.get_rng_state(), state)
                assert all((p.grad == 0.125).all() for p in model.parameters())
                assert 0 < objective.record.gradient.shares["focal"] < 1
            total.backward()
        found.append([total.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_weight_of_0_costs_no_backward():
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad

    z = torch.ones(3, requires_grad=True)
    objective = Objective({"a": 1.0, "late": {"kind": "piecewise", "points": [[0, 0], [3, 0], [4, 1]]}})
    total = objective({"a": z.sum(), "late": Counted.apply(z).sum()}, position=2, on=z)
    total.backward()
    assert calls == []
    flat = objective.record.to_dict()
    assert (flat["late/share"], flat["late/weighted"], flat["late/raw"]) == (0.0, 0.0, 3.0)
    assert "late/connected" not in flat
    objective({"a": z.sum(), "late": Counted.apply(z).sum()}, position=4, on=z).backward()
    assert len(calls) == 2  # one for the measure, one for the step
    # It may be left out altogether, and then is in no log.
    objective({"a": z.sum()}, position=0)
    assert "late/raw" not in objective.record.to_dict()
    with pytest.raises(NearfarError, match=r"term 'late' \(weight 1\) is missing; given: a"):
        objective({"a": z.sum()}, position=5)


def test_all_weights_0_can_still_go_backward():
    z = torch.ones(3, requires_grad=True)
    total = Objective({"a": "linear 0 -> 1"})({"a": z.sum()}, position=0, total=5, on=z)
    total.backward()
    assert total.item() == 0.0
    assert z.grad.tolist() == [0.0, 0.0, 0.0]


def test_weights_depend_on_the_position_alone():
    spec = {
        "a": "linear 0 -> 1",
        "b": "0.3 -> 0.6",
        "c": 2,
        "d": Piecewise([(0, 1.0), (10, 0.0)]),
        "e": {"kind": "step", "values": [1, 2]},
    }
    values = dict.fromkeys(spec, number(1.0))
    objective = Objective(spec)
    order = [7, 0, 3, 9, 3, 0]
    for position in order:
        objective(values, position=position, total=10)
        expected = {
            "a": position / 9,
            "b": 0.3 if position < 5 else 0.6,
            "c": 2.0,
            "d": 1 - position / 10,
            "e": 1.0 if position < 5 else 2.0,
        }
        assert objective.record.weights == pytest.approx(expected)
        assert objective.record.total == pytest.approx(sum(expected.values()))
    assert objective.weights(0.5, 10)["a"] == pytest.approx(0.5 / 9)


def test_what_is_not_connected_says_so():
    z, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    objective = Objective({"a": 1.0, "elsewhere": 1.0, "constant": 1.0, "flat": 1.0})
    values = {"a": z.sum(), "elsewhere": other.sum(), "constant": number(2.0), "flat": (0 * z).sum()}
    found = objective.measure_shares(values, z)
    assert found.shares == {"a": 1.0, "elsewhere": 0.0, "constant": 0.0, "flat": 0.0}
    assert found.connected == {"a": True, "elsewhere": False, "constant": False, "flat": True}
    assert found.cosines == {}
    nobody = Objective({"a": 1.0}).measure_shares({"a": other.sum()}, z)
    assert nobody.shares == {"a": 0.0}


@pytest.mark.parametrize("factor", [1e-35, 1e-20, 1e20, 1e35])
def test_shares_of_tiny_and_huge_gradients(factor):
    z = torch.ones(1000, requires_grad=True)
    values = {"a": (factor * z).mean(), "b": (3 * factor * z).mean()}
    found = Objective({"a": 1.0, "b": 1.0}).measure_shares(values, z)
    assert found.shares == pytest.approx({"a": 0.25, "b": 0.75}, rel=1e-3)
    assert found.cosines["a", "b"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    z = torch.ones(400, dtype=dtype, requires_grad=True)
    values = {"a": z.sum() * 100, "b": (z[:100]).sum() * 100}
    objective = Objective({"a": 0.1, "b": 0.1})
    total = objective(values, on=z)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(0.1 * 40000 + 0.1 * 10000, rel=1e-2)
    assert objective.record.gradient.shares == pytest.approx({"a": 2 / 3, "b": 1 / 3}, rel=1e-3)


def test_mixed_precision_and_sparse_gradients():
    z, table = torch.ones(3, dtype=torch.float64, requires_grad=True), nn.Embedding(5, 2, sparse=True)
    values = {"a": (3 * z).sum(), "b": table(torch.tensor([1, 1, 4])).sum()}
    found = Objective({"a": 1.0, "b": 1.0}).measure_shares(values, [table.weight, z])
    norms = math.sqrt(27), math.sqrt(4 + 4 + 1 + 1)
    assert found.shares == pytest.approx({"a": norms[0] / sum(norms), "b": norms[1] / sum(norms)})


def test_copies_and_state():
    objective = Objective({"contrastive": "0 -> 0.3", "focal": 0.7})
    values, z = values_of(Model())
    objective(values, position=3, total=5, on=z)
    assert copy.deepcopy(objective).record == pickle.loads(pickle.dumps(objective)).record == objective.record
    assert objective.state_dict() == {}
    assert list(objective.parameters()) == []
    assert not objective._seen[1].requires_grad
    assert "contrastive=Step" in repr(objective)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Objective({}), "no terms"),
        (lambda: Objective({"": 1.0}), "without '/'"),
        (lambda: Objective({"a/b": 1.0}), "without '/'"),
        (lambda: Objective({"a": "liner 0 -> 1"}), "weight of term 'a'.*did you mean 'linear'"),
        (lambda: Objective({"a": math.nan}), "weight of term 'a'"),
        (lambda: Objective({"a": lambda *_: math.inf})({"a": number(1.0)}, 0), "is inf at position 0"),
        (lambda: Objective({"a": "0 -> 1"})({"a": number(1.0)}), "pass position="),
        (lambda: Objective({"a": "0 -> 1"})({"a": number(1.0)}, 3), "call it with total="),
        (lambda: Objective({"focal": 1})({"focl": number(1.0)}), "did you mean 'focal'"),
        (lambda: Objective({"a": 1, "b": 1})({"a": number(1.0)}), "'b' .weight 1. is missing; given: a"),
        (lambda: Objective({"a": 0})({}), "is missing; given: none"),
        (lambda: Objective({"a": 1})({"a": torch.ones(2)}), "0-d"),
        (lambda: Objective({"a": 1})({"a": 1.0}), "term 'a' is 1.0"),
        (lambda: Objective({"a": 1})({"a": torch.tensor(1)}), "0-d floating"),
        (lambda: Objective({"a": 1, "b": 1})({"a": number(1.0), "b": number(math.nan)}), "'b' is nan"),
        (lambda: Objective({"a": 1})({"a": number(math.inf)}), "'a' is inf"),
        (lambda: Objective({"a": 1})({"a": number(1.0)}, on=torch.ones(2)), "requires a gradient"),
        (lambda: Objective({"a": 1})({"a": number(1.0)}, on=[]), "requires a gradient"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call()


def test_measuring_too_late_and_infinite_gradients():
    z = torch.ones(3, requires_grad=True)
    objective = Objective({"a": 1.0})
    values = {"a": (z**2).sum()}
    objective(values).backward()
    with pytest.raises(NearfarError, match="before backward"):
        objective.measure_shares(values, z)
    zero = torch.zeros(2, requires_grad=True)
    with pytest.raises(NearfarError, match="gradient of term 'a' is not finite"):
        objective.measure_shares({"a": zero.sqrt().sum()}, zero)
