"""Debiased and hard-weighted InfoNCE against loops that write the papers' formulas one query after the other."""

from __future__ import annotations

import pytest
import torch

from nearfar.contrast import GuideMask, NegativeWeights
from nearfar.errors import NearfarError
from nearfar.functional import info_nce
from nearfar.losses import InfoNCELoss


def rows(n: int, d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return a, 0.7 * a + torch.randn(n, d, generator=generator, dtype=torch.float64)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def direction(a, b, scale, tau, beta, weights=None, further=None):
    """The loss of each query: Ng = max((N Σ w e^((1+β)s) / Σ w e^(βs) - N τ e^(s⁺)) / (1 - τ), N e^(-scale))."""
    losses = []
    for i in range(len(a)):
        own = (unit(a[i]) @ unit(b[i])) * scale
        scores, weight = [], []
        for j in range(len(b)):
            w = 1.0 if weights is None else float(weights[i][j])
            if j != i and w > 0:
                scores.append((unit(a[i]) @ unit(b[j])) * scale)
                weight.append(w)
        for key in [] if further is None else further[i]:
            scores.append((unit(a[i]) @ unit(key)) * scale)
            weight.append(1.0)
        if not scores:
            losses.append(own * 0.0)
            continue
        s, w = torch.stack(scores), torch.tensor(weight, dtype=torch.float64)
        n = w.sum()
        sum_ = n * (w * ((1 + beta) * s).exp()).sum() / (w * (beta * s).exp()).sum()
        estimate = (
            sum_ if tau == 0 else torch.maximum((sum_ - n * tau * own.exp()) / (1 - tau), n * (-scale).exp())
        )
        losses.append((1 + estimate / own.exp()).log())
    return torch.stack(losses)


def loop(a, b, scale, tau, beta, symmetric=True, weights=None, back=None):
    one = direction(a, b, scale, tau, beta, weights).mean()
    return (one + direction(b, a, scale, tau, beta, back).mean()) / 2 if symmetric else one


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("tile", [None, (4, 3)])
def test_value_and_gradient_equal_the_loop(tau, beta, symmetric, n, tile):
    inputs = [x.requires_grad_() for x in (*rows(n, 5), torch.tensor(4.0, dtype=torch.float64))]
    a, b, scale = inputs
    value = info_nce(a, b, scale=scale, symmetric=symmetric, tau_plus=tau, beta=beta, tile=tile)
    expected = loop(a, b, scale, tau, beta, symmetric)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("tau", "beta"), [(0.1, 0.0), (0.0, 1.0), (0.2, 0.7)])
def test_gradcheck(tau, beta):
    inputs = tuple(x.requires_grad_() for x in (*rows(5, 3), torch.tensor(3.0, dtype=torch.float64)))
    assert torch.autograd.gradcheck(lambda a, b, s: info_nce(a, b, scale=s, tau_plus=tau, beta=beta), inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("tau", "beta"), [(0.1, 0.0), (0.0, 1.0), (0.2, 0.7)])
def test_with_masks_and_weights(tau, beta):
    a, b = rows(7, 4)
    u, v = rows(7, 3, seed=3)
    scale = torch.tensor(4.0, dtype=torch.float64)
    whole = slice(0, 7)
    for mask in (GuideMask(u, v, 0.1), GuideMask(u, v, 0.1, softness=0.1)):
        weights = mask.weights(whole, whole), mask.transposed().weights(whole, whole)
        value = info_nce(a, b, scale=scale, tau_plus=tau, beta=beta, mask=mask)
        assert value.item() == pytest.approx(loop(a, b, scale, tau, beta, True, *weights).item(), rel=1e-7)
    left = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    value = info_nce(a, b, scale=scale, tau_plus=tau, beta=beta, mask=left)
    assert value.item() == pytest.approx(loop(a, b, scale, tau, beta, True, ~left, ~left.T).item(), rel=1e-9)
    nothing = info_nce(a, b, scale=scale, tau_plus=tau, beta=beta, mask=NegativeWeights(torch.zeros(7, 7)))
    assert nothing.item() == 0


@pytest.mark.parametrize(("tau", "beta"), [(0.1, 0.0), (0.0, 1.0), (0.2, 0.7)])
def test_with_further_negatives_alone_and_in_parts(tau, beta):
    a, b = rows(6, 4)
    mined = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scale = torch.tensor(4.0, dtype=torch.float64)
    options = {"scale": scale, "symmetric": False, "tau_plus": tau, "beta": beta}
    value = info_nce(a, b, negatives=mined, **options)
    assert value.item() == pytest.approx(
        direction(a, b, scale, tau, beta, None, mined).mean().item(), rel=1e-9
    )
    alone = info_nce(a, b, negatives=mined, in_batch=False, **options)
    nobody = torch.zeros(6, 6)
    expected = direction(a, b, scale, tau, beta, nobody, mined).mean()
    assert alone.item() == pytest.approx(expected.item(), rel=1e-9)
    each = info_nce(a, b, negatives=mined, reduction="none", **options)
    torch.testing.assert_close(each, direction(a, b, scale, tau, beta, None, mined), rtol=1e-9, atol=0)
    both = {"scale": scale, "tau_plus": tau, "beta": beta}
    parts = [info_nce(a, b, rows=slice(k, k + 2), **both) for k in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(info_nce(a, b, **both).item(), rel=1e-12)


def test_options_at_zero_are_the_plain_loss():
    a, b = rows(8, 4)
    assert info_nce(a, b, tau_plus=0.0, beta=0.0).item() == info_nce(a, b).item()
    near = info_nce(a, b, tau_plus=1e-12, beta=1e-9)
    assert near.item() == pytest.approx(info_nce(a, b).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.001, 0.05, 1.0])
@pytest.mark.parametrize(("tau", "beta"), [(0.1, 0.0), (0.999999, 0.0), (0.0, 3.0), (0.3, 1.0)])
def test_small_temperatures_stay_finite(dtype, temperature, tau, beta):
    a, b = (x.to(dtype).requires_grad_() for x in rows(16, 8))
    value = info_nce(a, b, temperature=temperature, tau_plus=tau, beta=beta)
    value.backward()
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    reference = info_nce(*exact, temperature=temperature, tau_plus=tau, beta=beta)
    reference.backward()
    assert value.item() == pytest.approx(reference.item(), rel=2e-3, abs=1e-4)
    assert a.grad.isfinite().all()


def test_all_alike_is_guessing():
    for tau, beta in ((0.3, 0.0), (0.0, 2.0), (0.3, 2.0)):
        loss = InfoNCELoss(tau_plus=tau, beta=beta)
        assert loss(torch.ones(5, 3), torch.ones(5, 3)).exp().item() == pytest.approx(5.0, rel=1e-4)
        assert loss.record.uniform_level == pytest.approx(1.609438, rel=1e-5)


def test_record():
    a, b = rows(9, 4)
    plain, hard = InfoNCELoss(0.3), InfoNCELoss(0.3, beta=1.0)
    plain(a, b)
    hard(a, b)
    assert plain.record.hardest_share < hard.record.hardest_share <= 1
    assert plain.record.candidates == hard.record.candidates == 9
    assert "debias_clamped" not in hard.record.to_dict()
    debiased = InfoNCELoss(0.3, tau_plus=0.9, symmetric=False)
    debiased(a, b)
    sums = (unit(a) @ unit(b).T / 0.3).exp()
    own = sums.diagonal()
    estimate = (sums.sum(1) - own - 8 * 0.9 * own) / 0.1
    least = 8 * torch.tensor(-1 / 0.3).exp()
    assert debiased.record.extra["debias_clamped"] == pytest.approx((estimate < least).double().mean().item())
    assert 0 < debiased.record.to_dict()["debias_clamped"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_plus": 1.0}, "below 1"),
        ({"tau_plus": -0.1}, "share of negatives"),
        ({"beta": -1.0}, "beta"),
        ({"tau_plus": 0.1, "denominator": "negatives"}, "leave one of them out"),
        ({"tau_plus": "much"}, "tau_plus"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NearfarError, match=message):
        InfoNCELoss(**options)


def test_decoupled_takes_beta():
    a, b = rows(6, 4)
    value = info_nce(a, b, temperature=1.0, symmetric=False, denominator="negatives", beta=1.0)
    s = unit(a) @ unit(b).T
    off = ~torch.eye(6, dtype=torch.bool)
    total = 0.0
    for i in range(6):
        rest = s[i][off[i]]
        total += (5 * (2 * rest).exp().sum() / rest.exp().sum()).log() - s[i, i]
    assert value.item() == pytest.approx(total.item() / 6, rel=1e-9)
