"""SupCon and its form for several labels against loops over rows: every option, the extremes, the record."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from nearfar.contrast import DuplicateMask
from nearfar.errors import NearfarError
from nearfar.functional import multi_label_supcon, supcon
from nearfar.losses import MultiLabelSupConLoss, SupConLoss
from nearfar.losses.memory import CrossBatchMemory

N = 11
LABELS = torch.tensor([2, -7, 2, 0, 5, -7, 2, 0, 9, 5, 2])  # unsorted, negative, one of a kind
MULTI = torch.tensor(
    [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0],
     [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
)  # fmt: skip
CODES = torch.tensor(
    [[0, 0, 2], [0, 1, 2], [2, 2, 0], [0, 0, 0], [1, 1, 1], [0, 1, 2], [0, 2, 2], [1, 0, 2], [2, 0, 1],
     [2, 1, 0], [0, 0, 0]]
)  # fmt: skip
TEMPERATURES = [5.0, 0.5, 0.07, 0.01, 0.001]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.to(dtype).requires_grad_()


def tolerance(dtype: torch.dtype, temperature: float) -> float:
    # In float32 a logit of 1 / temperature is known to 1e-7 of itself.
    single = 1e-5 + 2e-6 / temperature
    return {
        torch.float64: 1e-6,
        torch.float32: single,
        torch.bfloat16: 1e-2 + single,
        torch.float16: 2e-3 + single,
    }[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_supcon_equals_the_loop(dtype, temperature, where):
    z, other = draw(N, 5, dtype=dtype), draw(N, 5, seed=1, dtype=dtype)
    memory, kinds = draw(4, 5, seed=2, dtype=dtype).detach(), torch.tensor([9, 2, 100, 9])
    u, v = oracles.double(z, other)
    inside, scale = where == "inside", 1 / temperature
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) < 0.4
    options = {"temperature": temperature, "sum": where}
    slack = tolerance(dtype, temperature)
    cases = [
        (supcon(z, LABELS, **options), oracles.supcon(u, LABELS, scale, inside), (z,), (u,)),
        (
            supcon(z, LABELS, mask=mask, **options),
            oracles.supcon(u, LABELS, scale, inside, mask=mask),
            (z,),
            (u,),
        ),
        (
            supcon(z, LABELS, memory=memory, memory_labels=kinds, **options),
            oracles.supcon(u, LABELS, scale, inside, memory=memory.double(), memory_labels=kinds),
            (z,),
            (u,),
        ),
    ]
    for own in (True, False):
        found = supcon(z, LABELS, other=other, own_pair=own, mask=mask, **options)
        exact = oracles.supcon(u, LABELS, scale, inside, other=v, own_pair=own, mask=mask)
        cases.append((found, exact, (z, other), (u, v)))
    for value, directions, inputs, wanted in cases:
        oracles.agree(value, inputs, oracles.mean(directions), wanted, slack, floor=1e-3 / temperature)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_several_labels_equal_the_loop(dtype, temperature, where):
    z = draw(N, 5, dtype=dtype)
    (u,) = oracles.double(z)
    for labels, weights, matrix in (
        (MULTI, "jaccard", oracles.jaccard(MULTI)),
        (CODES, "legacy", oracles.legacy(CODES)),
    ):
        value = multi_label_supcon(z, labels, temperature=temperature, weights=weights, sum=where)
        exact = oracles.mean(oracles.multi_label(u, matrix, 1 / temperature, where == "inside"))
        oracles.agree(value, (z,), exact, (u,), tolerance(dtype, temperature), floor=1e-3 / temperature)


def test_the_defaults_are_those_of_the_definitions():
    z = draw(N, 5)
    value = multi_label_supcon(z, MULTI)
    assert value.item() == pytest.approx(
        oracles.mean(oracles.multi_label(z, oracles.jaccard(MULTI), 10.0, False)).item()
    )
    value = multi_label_supcon(z, CODES, weights="legacy", neutral=1)
    exact = oracles.mean(oracles.multi_label(z, oracles.legacy(CODES, neutral=1), 10.0, True))
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert value.item() != pytest.approx(multi_label_supcon(z, CODES, weights="legacy").item(), rel=1e-3)
    assert supcon(z, LABELS).item() == pytest.approx(oracles.mean(oracles.supcon(z, LABELS, 10.0)).item())


@pytest.mark.slow
def test_long_vectors_that_are_not_brought_to_unit_length():
    for length in (0.1, 3.0, 30.0, 1e4):
        z = (draw(N, 5, dtype=torch.float32) * length).detach().requires_grad_()
        other = (draw(N, 5, seed=1, dtype=torch.float32) * length).detach().requires_grad_()
        u, v = oracles.double(z, other)
        for tile in (None, (4, 5)):
            for where in ("outside", "inside"):
                value = supcon(z, LABELS, other=other, normalize=False, sum=where, tile=tile)
                exact = oracles.mean(
                    oracles.supcon(u, LABELS, 10.0, where == "inside", normalize=False, other=v)
                )
                oracles.agree(value, (z, other), exact, (u, v), 2e-3, floor=1e-2)
            value = supcon(z, LABELS, normalize=False, tile=tile)
            exact = oracles.mean(oracles.supcon(u, LABELS, 10.0, normalize=False))
            oracles.agree(value, (z,), exact, (u,), 2e-3, floor=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(1, 1), (3, 2), (4, 100), (100, 4), (11, 11)])
def test_tiles_do_not_matter(tile):
    z = draw(N, 5)
    for call in (
        lambda tile: supcon(z, LABELS, tile=tile),
        lambda tile: supcon(z, LABELS.sort().values, tile=tile),
        lambda tile: supcon(z, LABELS, sum="inside", tile=tile),
        lambda tile: supcon(z, LABELS, temperature=0.001, tile=tile),
        lambda tile: supcon(z, LABELS, other=z * z, own_pair=False, tile=tile),
        lambda tile: supcon(z, LABELS, memory=-z[:4].detach(), memory_labels=LABELS[:4], tile=tile),
        lambda tile: supcon(z, LABELS, mask=DuplicateMask(torch.arange(N) % 3), tile=tile),
        lambda tile: multi_label_supcon(z, MULTI, tile=tile),
        lambda tile: multi_label_supcon(z, MULTI, sum="inside", temperature=0.001, tile=tile),
        lambda tile: multi_label_supcon(z, CODES, weights="legacy", tile=tile),
    ):
        whole = call(None)
        oracles.agree(call(tile), (z,), whole, (z,), 1e-9)


def test_the_order_of_the_rows_does_not_matter():
    z = draw(N, 5)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    for call in (
        lambda z, p: supcon(z, LABELS[p]),
        lambda z, p: supcon(z, LABELS[p], sum="inside", temperature=0.01),
        lambda z, p: multi_label_supcon(z, MULTI[p]),
        lambda z, p: multi_label_supcon(z, CODES[p], weights="legacy"),
    ):
        plain, mixed = call(z, torch.arange(N)), call(z[order], order)
        oracles.agree(mixed, (z,), plain, (z,), 1e-10)


@pytest.mark.slow
def test_a_large_batch_is_sorted_and_nobody_notices():
    n = 1100
    labels = torch.arange(n) * 389 % 40 - 20
    z = draw(n, 4, dtype=torch.float32)
    u = z.detach().double().requires_grad_()
    whole = supcon(u, labels, tile=(n, n))
    oracles.agree(supcon(z, labels), (z,), whole, (u,), 1e-4)
    oracles.agree(
        supcon(z, labels.int(), sum="inside"), (z,), supcon(u, labels, sum="inside", tile=(n, n)), (u,), 1e-4
    )
    sorted_loss, plain = SupConLoss(), SupConLoss()
    sorted_loss(z, labels)
    plain(z, labels, mask=torch.zeros(n, n, dtype=torch.bool))
    assert sorted_loss.record.numbers() == pytest.approx(plain.record.numbers(), rel=1e-4, abs=1e-6)


def test_near_convergence_the_gradient_keeps_its_digits():
    # Two rows of a class are each other's only positive, so that the loss can go to 0.
    labels = torch.arange(6) // 2
    z = (torch.eye(3).repeat_interleave(2, 0) * 8 + draw(6, 3)).detach().float().requires_grad_()
    (u,) = oracles.double(z)
    exact = oracles.mean(oracles.supcon(u, labels, 16.0))
    assert 1e-6 < exact.item() < 3e-5
    oracles.agree(supcon(z, labels, temperature=1 / 16.0), (z,), exact, (u,), 1e-4, floor=0.0)
    plain = z / z.norm(dim=1, keepdim=True)
    scores = (plain @ plain.T * 16.0).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    naive = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0, 3, 2, 5, 4]))
    found = torch.autograd.grad(naive, z)[0]
    assert oracles.error(found, torch.autograd.grad(exact, u)[0], 0.0) > 1e-4


def test_a_hard_positive_keeps_its_gradient():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.02], [1.0, 0.03], [-1.0, 0.0]], requires_grad=True)
    for where in ("outside", "inside"):
        gradient = torch.autograd.grad(
            supcon(z, torch.tensor([0, 0, 1, 1]), temperature=0.001, sum=where), z
        )[0]
        assert gradient.norm(dim=1).min() > 1.0


@pytest.mark.slow
def test_records_by_loops():
    z = draw(N, 5)
    other, memory, kinds = draw(N, 5, seed=1), draw(4, 5, seed=2), torch.tensor([9, 2, 100, 9])
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) < 0.4
    for where in ("outside", "inside"):
        inside = where == "inside"
        loss, pairs = SupConLoss(0.2, sum=where), SupConLoss(0.2, sum=where, own_pair=False)
        for options in (
            {},
            {"mask": mask},
            {"other": other},
            {"memory": memory, "memory_labels": kinds},
        ):
            value = loss(z, LABELS, **options)
            wanted = oracles.record(oracles.supcon(z, LABELS, 5.0, inside, **options), 5.0)
            assert loss.record.numbers() == pytest.approx(wanted, rel=1e-6)
            assert value.item() >= wanted["floor"] - 1e-9
        pairs(z, LABELS, other)
        wanted = oracles.record(oracles.supcon(z, LABELS, 5.0, inside, other=other, own_pair=False), 5.0)
        assert pairs.record.numbers() == pytest.approx(wanted, rel=1e-6)
        for labels, weights, matrix in (
            (MULTI, "jaccard", oracles.jaccard(MULTI)),
            (CODES, "legacy", oracles.legacy(CODES)),
        ):
            several = MultiLabelSupConLoss(0.2, weights=weights, sum=where)
            several(z, labels)
            wanted = oracles.record(oracles.multi_label(z, matrix, 5.0, inside), 5.0)
            assert several.record.numbers() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_guessing_and_the_floor():
    labels = torch.arange(12) % 3
    loss = SupConLoss(temperature=0.01)
    guess = loss(torch.ones(12, 2), labels)
    assert guess.item() == pytest.approx(math.log(11), rel=1e-5)
    assert loss.record.uniform_level == pytest.approx(math.log(11))
    best = loss(torch.eye(3)[labels], labels)
    assert best.item() == pytest.approx(math.log(3), rel=1e-5) == pytest.approx(loss.record.floor, rel=1e-5)
    inside = SupConLoss(temperature=0.01, sum="inside")
    assert inside(torch.ones(12, 2), labels).item() == pytest.approx(math.log(11 / 3), rel=1e-5)
    assert inside.record.uniform_level == pytest.approx(math.log(11 / 3))
    assert inside(torch.eye(3)[labels], labels).item() == pytest.approx(0.0, abs=1e-6)
    collapsed = MultiLabelSupConLoss(weights="legacy")
    value = collapsed(torch.ones(N, 2), CODES)
    matrix = oracles.legacy(CODES).fill_diagonal_(0)
    assert value.item() == pytest.approx(-(matrix.sum(1) / (N - 1)).log().mean().item(), rel=1e-5)
    assert value.item() == pytest.approx(collapsed.record.uniform_level, rel=1e-5)


def test_rows_of_parts_and_their_records():
    z = draw(N, 5)
    loss = SupConLoss()
    directions = oracles.supcon(z, LABELS, 10.0)
    for rows in (slice(0, 4), slice(4, 9), slice(8, 9), slice(-2, None)):
        value = loss(z, LABELS, rows=rows)
        oracles.agree(value, (z,), oracles.mean(directions, rows), (z,), 1e-9)
        assert loss.record.numbers() == pytest.approx(oracles.record(directions, 10.0, rows))


def test_a_memory_that_is_still_empty_is_no_memory():
    z, memory = draw(N, 5), CrossBatchMemory(6, 5, ids=True)
    plain = supcon(z, LABELS)
    found = supcon(z, LABELS, memory=memory.rows(), memory_labels=memory.ids())
    oracles.agree(found, (z,), plain, (z,), 1e-12)
    memory.push(draw(4, 5, seed=5).detach().float(), torch.tensor([2, 2, 0, 5]))
    exact = oracles.supcon(z, LABELS, 10.0, memory=memory.rows().double(), memory_labels=memory.ids())
    found = supcon(z, LABELS.int(), memory=memory.rows(), memory_labels=memory.ids())
    oracles.agree(found, (z,), oracles.mean(exact), (z,), 1e-6)


def test_labels_of_the_memory_are_not_cut_to_the_type_of_the_labels():
    z = draw(N, 5)
    kinds = torch.tensor([2**32 + 2, 2**33 + 5, 5])
    found = supcon(z, LABELS.int(), memory=draw(3, 5, seed=6), memory_labels=kinds)
    exact = oracles.mean(oracles.supcon(z, LABELS, 10.0, memory=draw(3, 5, seed=6), memory_labels=kinds))
    assert found.item() == pytest.approx(exact.item())


def test_classes_of_one_and_everybody_in_one_class():
    z = draw(N, 5)
    alone = torch.arange(N)
    alone[3] = 0  # rows 0 and 3 belong together, nobody else
    exact = oracles.mean(oracles.supcon(z, alone, 10.0))
    oracles.agree(supcon(z, alone), (z,), exact, (z,), 1e-9)
    same = torch.zeros(N, dtype=torch.long)
    for where in ("outside", "inside"):
        exact = oracles.mean(oracles.supcon(z, same, 10.0, where == "inside"))
        oracles.agree(supcon(z, same, sum=where), (z,), exact, (z,), 1e-9)
        copies = torch.ones(N, 5, dtype=torch.float64, requires_grad=True)
        value = supcon(copies, same, sum=where)
        assert value.item() == pytest.approx(math.log(N - 1) if where == "outside" else 0.0, abs=1e-12)
        assert torch.autograd.grad(value, copies)[0].abs().max() < 1e-10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: supcon(z, LABELS[:4]), "one label for each row"),
        (lambda z: supcon(z, LABELS + 0.5), "whole number"),
        (lambda z: supcon(z, LABELS, sum="between"), "'outside' or 'inside'"),
        (lambda z: supcon(z, LABELS, temperature=0.0), "above 0"),
        (lambda z: supcon(z, LABELS, memory=z), "memory_labels"),
        (lambda z: supcon(z, LABELS, memory=z, memory_labels=LABELS, other=z), "one view"),
        (lambda z: supcon(z, LABELS, memory=z, memory_labels=LABELS + 0.5), "whole number"),
        (lambda z: supcon(z, LABELS, memory=z[:, :2], memory_labels=LABELS), "same dimensions"),
        (lambda z: supcon(z, LABELS, other=z[:4]), "two views"),
        (lambda z: supcon(z, LABELS, mask=torch.zeros(3, 3, dtype=torch.bool)), "mask is for"),
        (lambda z: supcon(z[:0], LABELS[:0]), "no rows"),
        (lambda z: multi_label_supcon(z, LABELS), "one row of labels"),
        (lambda z: multi_label_supcon(z, CODES), "multi-hot"),
        (lambda z: multi_label_supcon(z, MULTI, weights="dice"), "'jaccard' or 'legacy'"),
        (lambda z: multi_label_supcon(z, MULTI * 0.5, weights="legacy"), "whole numbers"),
        (lambda z: SupConLoss(sum="between"), "'outside' or 'inside'"),
        (lambda z: MultiLabelSupConLoss(weights="dice"), "'jaccard' or 'legacy'"),
        (lambda z: MultiLabelSupConLoss(sum="between")(z, MULTI), "'outside' or 'inside'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call(draw(N, 5))


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 1100])
@pytest.mark.parametrize("options", [{}, {"sum": "inside"}, {"weights": "legacy", "sum": "outside"}])
def test_a_scaled_loss_with_lonely_rows_has_a_scaled_gradient(n, options):
    """Loss scaling in mixed precision multiplies by 65,536 and more; rows without positives must not overflow it."""
    z = torch.randn(n, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.zeros(n, 3, dtype=torch.long)
    labels[:4, 0] = 1
    loss = MultiLabelSupConLoss(**options)
    (plain,) = torch.autograd.grad(loss(z, labels), z)
    for factor in (2.0**16, 2.0**24):
        (scaled,) = torch.autograd.grad(loss(z, labels) * factor, z)
        assert torch.equal(scaled, plain * factor)
