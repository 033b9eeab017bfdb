"""SigLIP against loops over pairs: value, gradients of all four inputs, masks, parts, record."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from nearfar.contrast import DuplicateMask
from nearfar.errors import NearfarError
from nearfar.functional import siglip
from nearfar.losses import SigLipLoss

N = 9
MASK = torch.rand(N, N, generator=torch.Generator().manual_seed(5)) < 0.4


def views(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(N, 4, generator=generator, dtype=torch.float64) + 0.5 * a
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def total(found: list[Tensor]) -> Tensor:
    return torch.stack(found).sum() / N


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("scale", "bias"), [(10.0, -10.0), (0.2, 0.0), (1.0, 5.0), (117.0, -12.9), (1000.0, -30.0)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loop(scale, bias, dtype, masked):
    a, b = views(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    s, t = number(scale, wide), number(bias, wide)
    exact = oracles.double(a, b, s, t)
    mask = MASK if masked else None
    wanted = total(oracles.siglip(*exact, mask=mask))
    single = 1e-5 + 2e-6 * scale
    slack = {
        torch.float64: 1e-9,
        torch.float32: single,
        torch.bfloat16: 1e-2 + single,
        torch.float16: 2e-3 + single,
    }
    for tile in (None, (4, 3), (2, 9), (1, 1)):
        value = siglip(a, b, s, t, mask=mask, tile=tile)
        oracles.agree(value, (a, b, s, t), wanted, exact, slack[dtype], floor=0.02)


@pytest.mark.parametrize("tile", [None, (4, 5)])
def test_gradients_by_differences(tile):
    inputs = (*views(), number(3.0), number(-1.5))
    mask = DuplicateMask(torch.arange(N) % 4)
    assert torch.autograd.gradcheck(lambda *x: siglip(*x, mask=mask, tile=tile), inputs, fast_mode=True)


def test_it_is_the_mean_of_the_two_directions_and_blind_to_order():
    a, b = views()
    plain = siglip(a, b, 5.0, -2.0)
    assert siglip(b, a, 5.0, -2.0).item() == pytest.approx(plain.item(), rel=1e-12)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    oracles.agree(siglip(a[order], b[order], 5.0, -2.0), (a, b), plain, (a, b), 1e-10)


def test_long_vectors_that_are_not_brought_to_unit_length():
    for length in (0.1, 3.0, 100.0):
        a, b = ((x * length).detach().float().requires_grad_() for x in views())
        u, v = oracles.double(a, b)
        wanted = total(oracles.siglip(u, v, 5.0, -2.0, normalize=False))
        for tile in (None, (4, 5)):
            value = siglip(a, b, 5.0, -2.0, normalize=False, tile=tile)
            oracles.agree(value, (a, b), wanted, (u, v), 1e-4)


def test_far_from_and_near_to_convergence_the_gradient_keeps_its_digits():
    # Wrong by hundreds: the gradient is not lost in a saturated sigmoid.
    a, b = torch.eye(3).requires_grad_(), (-torch.eye(3)).requires_grad_()
    value = siglip(a, b, 1000.0, 0.0)
    assert value.item() == pytest.approx(1000.0 + 2 * math.log(2), rel=1e-5)
    hard = torch.tensor([[1.0, 0.2], [0.3, 1.0]], requires_grad=True)
    slope = torch.autograd.grad(siglip(hard, torch.tensor([[-0.9, 0.4], [0.1, -1.0]]), 1000.0, 0.0), hard)[0]
    assert slope.norm(dim=1).min() > 100
    # Right by 17: the loss is 1e-7, where 1 - p is 0 in float32.
    a = (torch.eye(4) + 0.05 * views()[0].detach()[:4].float()).requires_grad_()
    b = (torch.eye(4) + 0.05 * views()[1].detach()[:4].float()).requires_grad_()
    u, v = oracles.double(a, b)
    wanted = torch.stack(oracles.siglip(u, v, 34.0, -17.0)).sum() / 4
    assert 1e-8 < wanted.item() < 1e-4
    oracles.agree(siglip(a, b, 34.0, -17.0), (a, b), wanted, (u, v), 1e-4, floor=0.0)


def test_parts_add_up_and_count_for_themselves():
    a, b = views()
    s, t = number(5.0), number(-2.0)
    rows = oracles.siglip(a, b, s, t, mask=MASK)
    for part in (slice(0, 4), slice(4, 5), slice(-4, None), slice(None)):
        value = siglip(a, b, s, t, mask=MASK, rows=part, tile=(3, 4))
        oracles.agree(value, (a, b, s, t), torch.stack(rows[part]).sum() / N, (a, b, s, t), 1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [None, slice(2, 6)])
def test_record_by_loops(masked, rows):
    a, b = views()
    loss = SigLipLoss()
    mask = MASK if masked else None
    value = loss(a, b, 5.0, -2.0, mask, rows)
    score = (oracles.cosines(a, b) * 5.0 - 2.0).tolist()
    candidates, p, hardest, guess = [], [], [], []
    for i in range(N)[rows or slice(None)]:
        others = [score[i][j] for j in range(N) if j != i and not (masked and MASK[i, j])]
        count = len(others) + 1
        candidates.append(count)
        p.append(1 / (1 + math.exp(-score[i][i])))
        push = [1 / (1 + math.exp(-x)) for x in others]
        if push:
            hardest.append(max(push) / sum(push))
            guess.append(math.log(count) - (count - 1) * math.log(1 - 1 / count))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    wanted = {
        "candidates": mean(candidates), "positives_per_row": 1.0, "positives_min": 1.0, "rows_without_positives": 0.0,
        "rows_without_negatives": sum(count == 1 for count in candidates),
        "masked_per_row": N - mean(candidates),
        "p_positive": mean(p), "hardest_share": mean(hardest), "uniform_level": mean(guess), "floor": 0.0,
        "scale": 5.0, "finite": True,
    }  # fmt: skip
    assert loss.record.numbers() == pytest.approx(wanted)
    assert value.isfinite()


def test_the_best_constant_answer():
    same = torch.ones(50, 2)
    loss = SigLipLoss()
    best = math.log(1 / 49)  # σ(bias) = 1/50
    value = loss(same, same, 1e-9, best)
    assert value.item() == pytest.approx(loss.record.uniform_level, rel=1e-5)
    assert value.item() == pytest.approx(math.log(50) + 1, rel=0.01)
    for other in (best - 0.3, best + 0.3):
        assert loss(same, same, 1e-9, other).item() > value.item()


def test_one_row_and_everything_masked():
    loss = SigLipLoss()
    a, b = (x[:1].detach().requires_grad_() for x in views())
    value = loss(a, b, 5.0, -2.0)
    cosine = torch.nn.functional.cosine_similarity(a, b).item()
    assert value.item() == pytest.approx(math.log1p(math.exp(2.0 - 5.0 * cosine)))
    assert (loss.record.candidates, loss.record.hardest_share, loss.record.uniform_level) == (1.0, 0.0, 0.0)
    a, b = views()
    everything = torch.ones(N, N, dtype=torch.bool)
    value = loss(a, b, 5.0, -2.0, everything)
    own = torch.nn.functional.cosine_similarity(a, b) * 5.0 - 2.0
    oracles.agree(value, (a, b), torch.nn.functional.softplus(-own).mean(), (a, b), 1e-10)
    assert (loss.record.candidates, loss.record.hardest_share) == (1.0, 0.0)


def test_numbers_and_tensors_as_scale_and_bias():
    a, b = views()
    plain = siglip(a, b, 5.0, -2.0).item()
    for scale, bias in (
        (torch.tensor(5.0), torch.tensor([-2.0])),
        (torch.tensor([5.0]), -2),
        (5, torch.tensor(-2)),
    ):
        assert siglip(a, b, scale, bias).item() == pytest.approx(plain)
    assert SigLipLoss(normalize=False)(a, b, 5.0).item() == pytest.approx(
        siglip(a, b, 5.0, normalize=False).item()
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: siglip(a, b[:4], 5.0), "partner"),
        (lambda a, b: siglip(a, b[:, :2], 5.0), "same dimensions"),
        (lambda a, b: siglip(a[:0], b[:0], 5.0), "no rows"),
        (lambda a, b: siglip(a, b, 0.0), "above 0"),
        (lambda a, b: siglip(a, b, 5.0, math.nan), "one finite number"),
        (lambda a, b: siglip(a, b, 5.0, torch.zeros(2)), "one finite number"),
        (lambda a, b: siglip(a, b, 5.0, mask=MASK[:4]), "mask is for"),
        (lambda a, b: siglip(a, b, 5.0, mask=MASK.float()), "Boolean"),
        (lambda a, b: siglip(a, b, 5.0, rows=slice(0, 9, 2)), "without steps"),
        (lambda a, b: siglip(a, b, 5.0, rows=slice(3, 3)), "at least one row"),
        (lambda a, b: siglip(a, b, 5.0, tile=(3, 0)), "tile"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call(*views())
