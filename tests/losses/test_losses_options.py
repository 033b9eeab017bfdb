"""What a positive is told apart from, how rows are added up, and given candidates: every option against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from combinations import combined
from nearfar.contrast import DuplicateMask, OwnPair, SameClass, Weights
from nearfar.contrast.softmax import listed_logits
from nearfar.errors import NearfarError
from nearfar.functional import info_nce, supcon
from nearfar.losses import InfoNCELoss, SupConLoss

N = 9
LABELS = torch.tensor([2, -7, 2, 0, 5, -7, 2, 0, 9])  # classes of three, of two, and two of one
SINGLE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.to(dtype).requires_grad_()


MASK = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) < 0.3
QUEUE, MINED = draw(7, 5, seed=4).detach(), draw(N, 3, 5, seed=5).detach()
POSITIVES = torch.rand(N, N, generator=torch.Generator().manual_seed(6)) < 0.3


# -- own partner and given negatives -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SINGLE)
@pytest.mark.parametrize("scale", [0.5, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("negatives", [QUEUE, MINED])
def test_given_candidates_only(negatives, scale, dtype):
    a, b = draw(N, 5, dtype=dtype), draw(N, 5, seed=1, dtype=dtype)
    more = negatives.to(dtype).requires_grad_()
    s = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    exact = oracles.double(a, b, s, more)
    u, v, factor, others = exact
    out = torch.rand(N, negatives.shape[-2], generator=torch.Generator().manual_seed(7)) < 0.3
    slack = SINGLE[dtype] + (0 if dtype == torch.float64 else 3e-6 * scale)
    for mask in (None, out):
        directions = oracles.info_nce(
            u, v, factor, negatives=(others, others), negatives_masks=(mask, mask), in_batch=False
        )
        one = info_nce(a, b, scale=s, symmetric=False, negatives=more, negatives_mask=mask, in_batch=False)
        wanted = oracles.mean(directions[:1])
        oracles.agree(one, (a, b, s, more), wanted, exact, slack, floor=1e-3 * scale)
        pair = None if mask is None else (mask, mask)
        two = info_nce(a, b, scale=s, negatives=(more, more), negatives_mask=pair, in_batch=False)
        oracles.agree(two, (a, b, s, more), oracles.mean(directions), exact, slack, floor=1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [QUEUE, MINED])
def test_records_and_parts_of_given_candidates(negatives):
    a, b = draw(N, 5), draw(N, 5, seed=1)
    loss = InfoNCELoss(0.2, symmetric=False, in_batch=False)
    directions = oracles.info_nce(a, b, 5.0, False, negatives=(negatives, None), in_batch=False)
    for part in (None, slice(0, 4), slice(4, 5), slice(-4, None)):
        value = loss(a, b, negatives=negatives, rows=part)
        oracles.agree(value, (a, b), oracles.mean(directions, part), (a, b), 1e-9)
        assert loss.record.numbers() == pytest.approx(oracles.record(directions, 5.0, part))
    assert loss.record.candidates == 1 + negatives.shape[-2]


def test_given_candidates_cost_no_product_of_all_with_all():
    a, b = torch.ones(100_000, 2), torch.ones(100_000, 2)  # 40 GB
    value = info_nce(a, b, symmetric=False, negatives=torch.ones(3, 2), in_batch=False)
    assert value.item() == pytest.approx(math.log(4), rel=1e-5)


def test_an_empty_queue_leaves_the_partner_alone():
    a, b = draw(4, 3), draw(4, 3, seed=1)
    loss = InfoNCELoss(symmetric=False, in_batch=False)
    value = loss(a, b, negatives=torch.empty(0, 3, dtype=torch.float64))
    value.backward()
    assert value.item() == 0.0
    assert not a.grad.any()
    assert (loss.record.candidates, loss.record.uniform_level) == (1.0, 0.0)


# -- denominators ----------------------------------------------------------------------------------------------------

CALLS = {
    "one view": {},
    "masked": {"mask": MASK},
    "two views": {"other": draw(N, 5, seed=1).detach()},
    "other partners": {"other": draw(N, 5, seed=1).detach(), "own_pair": False, "mask": MASK},
    "memory": {"memory": QUEUE, "memory_labels": torch.tensor([9, 2, 100, 2, 0, 0, -7])},
    "references": {
        "memory": QUEUE,
        "memory_labels": torch.tensor([9, 2, 100, 2, 0, 0, 2]),
        "in_batch": False,
    },
}


@pytest.mark.slow
@combined(
    3,
    form=["own outside", "negatives outside", "negatives inside"],
    temperature=[5.0, 0.1, 0.01, 0.001],
    dtype=SINGLE,
)
def test_denominators_of_classes(form, temperature, dtype):
    denominator, where = form.split()
    z = draw(N, 5, dtype=dtype)
    (u,) = oracles.double(z)
    slack = SINGLE[dtype] + (0 if dtype == torch.float64 else 3e-6 / temperature)
    for options in CALLS.values():
        here = {k: x.to(dtype) if k in ("other", "memory") else x for k, x in options.items()}
        there = {k: x.double() if k in ("other", "memory") else x for k, x in here.items()}
        tables = oracles.supcon(u, LABELS, 1 / temperature, where == "inside", **there)
        exact = oracles.mean(tables, denominator=denominator)
        for tile in (None, (4, 3)):
            value = supcon(
                z, LABELS, temperature=temperature, sum=where, denominator=denominator, tile=tile, **here
            )
            oracles.agree(value, (z,), exact, (u,), slack, floor=1e-3 / temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.001])
@pytest.mark.parametrize("negatives", [None, QUEUE, MINED])
def test_decoupled_pairs(negatives, temperature):
    a, b = draw(N, 5), draw(N, 5, seed=1)
    exact = oracles.double(a, b)
    tables = oracles.info_nce(*exact, 1 / temperature, mask=MASK, negatives=(negatives, None))
    options = {"temperature": temperature, "denominator": "negatives", "mask": MASK}
    for symmetric in (True, False):
        value = info_nce(a, b, symmetric=symmetric, negatives=negatives, **options)
        wanted = oracles.mean(tables[: 1 + symmetric], denominator="negatives")
        oracles.agree(value, (a, b), wanted, exact, 1e-9)


@pytest.mark.slow
def test_records_of_denominators():
    z = draw(N, 5)
    for denominator, where in (("own", "outside"), ("negatives", "outside"), ("negatives", "inside")):
        for options in CALLS.values():
            settings = {name: options.get(name, True) for name in ("own_pair", "in_batch")}
            loss = SupConLoss(0.2, sum=where, denominator=denominator, **settings)
            tables = oracles.supcon(z, LABELS, 5.0, where == "inside", **options)
            for part in (None, slice(1, 5)):
                given = {name: x for name, x in options.items() if name not in settings}
                value = loss(z, LABELS, rows=part, **given)
                wanted = oracles.mean(tables, part, denominator)
                oracles.agree(value, (z,), wanted, (z,), 1e-9)
                assert loss.record.numbers() == pytest.approx(oracles.record(tables, 5.0, part, denominator))
                if part is None:
                    assert value.item() >= loss.record.floor


def test_guessing_gives_the_uniform_level_of_each_denominator():
    for denominator, level in (("all", 8), ("own", 7), ("negatives", 6)):
        loss = SupConLoss(denominator=denominator)
        value = loss(torch.ones(9, 2), torch.arange(9) // 3)
        assert value.item() == pytest.approx(math.log(level), rel=1e-5)
        assert loss.record.uniform_level == pytest.approx(math.log(level))
    pairs = InfoNCELoss(denominator="negatives")
    assert pairs(torch.ones(9, 2), torch.ones(9, 2)).item() == pytest.approx(math.log(8), rel=1e-5)


def test_of_single_positives_own_is_all():
    z, labels = draw(8, 4), torch.arange(4).repeat(2)
    assert torch.allclose(supcon(z, labels, denominator="own"), supcon(z, labels))


def test_positives_alone_ask_nothing_of_the_other_denominators():
    z = draw(4, 3)
    for denominator in ("own", "negatives"):
        value = supcon(z, torch.zeros(4, dtype=torch.long), denominator=denominator)
        assert value.item() == 0.0
        assert not torch.autograd.grad(value, z)[0].any()
    assert info_nce(draw(1, 3), draw(1, 3, seed=1), denominator="negatives").item() == 0.0


def test_a_hard_positive_and_a_converged_one_keep_their_gradient():
    """Where a coupled pair is found, its pull is gone; decoupled it is not, in the same direction."""
    z = torch.eye(4, dtype=torch.float64).repeat(2, 1) + 0.05 * draw(8, 4).detach()
    z.requires_grad_()
    labels = torch.arange(4).repeat(2)
    coupled, apart = (
        torch.autograd.grad(supcon(z, labels, temperature=0.02, denominator=kind), z)[0].norm()
        for kind in ("all", "negatives")
    )
    assert coupled < 1e-9
    assert apart > 0.1


# -- reductions ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("denominator", ["all", "own", "negatives"])
def test_each_row_has_its_loss_and_its_gradient(denominator):
    z, weight = draw(N, 5), draw(N, seed=8).detach()
    for options in CALLS.values():
        tables = oracles.supcon(z, LABELS, 10.0, **options)
        rows = [
            torch.stack([z.sum() * 0.0 if x is None else x for x in oracles.losses(each, denominator)])
            for each in tables
        ]
        exact = torch.stack(rows).mean(0)
        found = supcon(z, LABELS, denominator=denominator, reduction="none", **options)
        assert torch.allclose(found, exact, rtol=1e-9)
        oracles.agree((found * weight).sum(), (z,), (exact * weight).sum(), (z,), 1e-9)
        added = supcon(z, LABELS, denominator=denominator, reduction="sum", **options)
        oracles.agree(added, (z,), exact.sum(), (z,), 1e-9)


def test_rows_of_pairs():
    a, b, weight = draw(N, 5), draw(N, 5, seed=1), draw(N, seed=8).detach()
    loss = InfoNCELoss(0.1, reduction="none")
    tables = oracles.info_nce(a, b, 10.0, mask=MASK, negatives=(QUEUE, None))
    exact = torch.stack([torch.stack(oracles.losses(each)) for each in tables]).mean(0)
    found = loss(a, b, mask=MASK, negatives=QUEUE)
    oracles.agree((found * weight).sum(), (a, b), (exact * weight).sum(), (a, b), 1e-9)
    assert torch.allclose(found.mean(), info_nce(a, b, temperature=0.1, mask=MASK, negatives=QUEUE))
    assert torch.allclose(loss(a, b, mask=MASK, negatives=QUEUE, rows=slice(2, 5)), found[2:5])
    assert loss.record.finite
    assert "reduction='none'" in repr(loss)


def test_rows_of_a_large_batch_stay_in_their_order():
    z = draw(1100, 3, dtype=torch.float32)
    labels = torch.randint(9, (1100,), generator=torch.Generator().manual_seed(0))
    found = supcon(z, labels, reduction="none")
    assert torch.allclose(found.mean(), supcon(z, labels), rtol=1e-5)
    assert torch.allclose(found[:40], supcon(z, labels, reduction="none", rows=slice(0, 40)), rtol=1e-5)


# -- explicit positives ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("denominator", ["all", "own", "negatives"])
@pytest.mark.parametrize("dtype", SINGLE)
@pytest.mark.parametrize("positives", [POSITIVES, POSITIVES * torch.linspace(0.1, 2.0, N)])
def test_a_matrix_of_positives(positives, dtype, denominator):
    z, other = draw(N, 5, dtype=dtype), draw(N, 5, seed=1, dtype=dtype)
    u, v = oracles.double(z, other)
    for views, exact in (((z,), {}), ((z, other), {"other": v})):
        tables = oracles.supcon(u, None, 10.0, positives=positives, **exact)
        value = supcon(
            z, positives=positives, denominator=denominator, other=None if len(views) == 1 else other
        )
        wanted = oracles.mean(tables, denominator=denominator)
        oracles.agree(value, views, wanted, (u, v)[: len(views)], SINGLE[dtype], floor=1e-2)
    loss = SupConLoss(0.2, denominator=denominator)
    loss(z.double(), positives=positives)
    wanted = oracles.record(
        oracles.supcon(z.double(), None, 5.0, positives=positives), 5.0, None, denominator
    )
    assert loss.record.numbers() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_matrix_of_positives_in_a_memory(in_batch):
    z, kinds = draw(N, 5), torch.tensor([9, 2, 100, 2, 0, 0, -7])
    same = LABELS[:, None] == (torch.cat([LABELS, kinds]) if in_batch else kinds)
    options = {"memory": QUEUE, "in_batch": in_batch, "denominator": "own"}
    wanted = supcon(z, LABELS, memory_labels=kinds, **options)
    found = supcon(z, positives=same, **options)
    oracles.agree(found, (z,), wanted, (z,), 1e-9)
    weighted = same * torch.linspace(0.5, 2.0, same.shape[1])
    if not in_batch:
        exact = oracles.supcon(z, None, 10.0, memory=QUEUE, positives=weighted, in_batch=False)
        oracles.agree(
            supcon(z, positives=weighted, **options), (z,), oracles.mean(exact, None, "own"), (z,), 1e-9
        )


def test_a_matrix_of_classes_is_the_classes():
    z = draw(N, 5)
    same = LABELS[:, None] == LABELS
    for options in ({}, {"sum": "inside"}, {"mask": MASK}, {"rows": slice(2, 6)}):
        assert torch.allclose(supcon(z, positives=same, **options), supcon(z, LABELS, **options))


# -- lists of pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without_self", [True, False])
def test_positives_listed(without_self):
    other = torch.tensor([0, 2, -7, 2, 7])
    rows = slice(2, 7)
    for target, dense in (
        (SameClass(LABELS), oracles.same_class(LABELS)),
        (SameClass(LABELS, other), oracles.same_class(LABELS, other)),
        (Weights(POSITIVES * 0.5), POSITIVES * 0.5),
        (OwnPair(N), torch.eye(N)),
    ):
        row, column, weight = target.listed(rows, without_self)
        found = torch.zeros(5, dense.shape[1]).index_put((row, column), weight.float(), accumulate=True)
        wanted = dense.float().clone()
        if without_self:
            wanted[: min(wanted.shape), : min(wanted.shape)].fill_diagonal_(0)
        assert torch.equal(found, wanted[rows])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_listed_logits_a_part_at_a_time(monkeypatch, share):
    monkeypatch.setattr(
        "nearfar.contrast.softmax.PART", 20
    )  # four pairs of five numbers, or tiles of two rows
    a, b = draw(N, 5), draw(10, 5, seed=1)
    chosen = torch.rand(N, 10, generator=torch.Generator().manual_seed(0)) < share
    row, column = chosen.nonzero(as_tuple=True)
    weight = draw(len(row), seed=2).detach()
    value, exact = listed_logits(a, b, row, column), (a @ b.T)[row, column]
    assert torch.allclose(value, exact)
    oracles.agree((value * weight).sum(), (a, b), (exact * weight).sum(), (a, b), 1e-9)


# -- bad input -------------------------------------------------------------------------------------------------------

Z = torch.eye(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce(Z, Z, in_batch=False, symmetric=False), "negatives is None"),
        (lambda: info_nce(Z, Z, in_batch=False, negatives=Z), "in a direction"),
        (
            lambda: info_nce(
                Z, Z, in_batch=False, symmetric=False, negatives=Z, mask=DuplicateMask(torch.arange(4))
            ),
            "mask leaves out pairs of the batch",
        ),
        (
            lambda: info_nce(Z[:2], Z, in_batch=False, symmetric=False, negatives=Z),
            "b has 2 rows more than a",
        ),
        (lambda: info_nce(Z, Z, reduction="average"), "'mean', 'sum' or 'none'"),
        (lambda: InfoNCELoss(reduction="average"), "'mean', 'sum' or 'none'"),
        (lambda: SupConLoss(denominator="others"), "'negatives' alone"),
        (lambda: info_nce(Z, Z, denominator="others"), "'negatives' alone"),
        (lambda: supcon(Z, torch.zeros(4).long(), sum="inside", denominator="own"), "sum='outside'"),
        (lambda: supcon(Z), "neither labels nor positives"),
        (lambda: supcon(Z, torch.zeros(4).long(), positives=Z), "leave labels and memory_labels out"),
        (lambda: supcon(Z, positives=Z[:3]), r"a matrix \(4, 4\) is needed"),
        (lambda: supcon(Z, positives=Z, memory=Z[:1], in_batch=False), r"a matrix \(4, 1\) is needed"),
        (lambda: supcon(Z, positives=Z, in_batch=False), "there are none; until a memory"),
        (lambda: supcon(Z, positives=Z, memory=Z[:0], in_batch=False), "there are none; until a memory"),
        (lambda: supcon(Z, positives=-Z), "0 or more"),
    ],
)
def test_refused(call, message):
    with pytest.raises(NearfarError, match=message):
        call()
