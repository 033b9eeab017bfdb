"""Focal loss against float64 loops and torch's cross-entropy, at p near 0 and 1, and its record."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy

from nearfar.errors import NearfarError
from nearfar.losses.focal import FocalLoss, focal_alpha, focal_loss

GAMMAS = [0.0, 0.1, 0.5, 1.0, 2.0, 5.0]


def batch(*shape: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, shape, generator=generator)


def one(logits: list[float], y: int, gamma: float) -> float:
    """A single label, from the definition."""
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    p = powers[y] / sum(powers)
    return (1 - p) ** gamma * -math.log(p)


def loop(logits, labels, gamma, alpha, reduction, ignore=-100):
    """Aspect after aspect, row after row; logits (B, A, C), alpha (A, C)."""
    by_aspect, total, count = [], 0.0, 0
    for a in range(logits.shape[1]):
        numerator = denominator = 0.0
        for b in range(logits.shape[0]):
            y = int(labels[b, a])
            if y == ignore:
                continue
            weight = float(alpha[a][y])
            numerator += weight * one(logits[b, a].tolist(), y, gamma)
            denominator += weight
            count += 1
        total += numerator
        if denominator > 0:
            by_aspect.append(numerator / denominator)
    if reduction == "weighted_mean":
        return sum(by_aspect) / len(by_aspect)
    return total / count if reduction == "mean" else total


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum"])
@pytest.mark.parametrize("holes", [False, True])
def test_equals_the_loop(gamma, reduction, holes):
    logits, labels = batch(9, 5)
    alpha = torch.rand(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    if holes:
        labels[::2, 1] = -100
        labels[:, 3] = -100  # an aspect without any label
        alpha[4] = 0.0  # and one in which no label has a weight
    value = focal_loss(logits, labels, gamma=gamma, alpha=alpha, reduction=reduction)
    assert value.shape == ()
    assert value.item() == pytest.approx(loop(logits, labels, gamma, alpha, reduction), rel=1e-12)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (2, 5, 3), ()])
def test_none_gives_each_label_its_own(shape):
    logits, labels = batch(*shape)
    alpha = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    if shape:
        labels.view(-1)[2] = -100
    value = focal_loss(logits, labels, alpha=alpha, reduction="none")
    assert value.shape == shape
    for z, y, found in zip(logits.reshape(-1, 4), labels.reshape(-1), value.reshape(-1), strict=True):
        expected = 0.0 if y == -100 else alpha[y] * one(z.tolist(), int(y), 2.0)
        assert found.item() == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_without_focus_it_is_cross_entropy(weighted):
    logits, labels = batch(40)
    labels[3] = -100
    alpha = focal_alpha([10, 3, 80, 1]).double() if weighted else None
    logits.requires_grad_()
    ours = focal_loss(logits, labels, gamma=0.0, alpha=alpha)
    torchs = cross_entropy(logits, labels, weight=alpha)
    assert ours.item() == pytest.approx(torchs.item(), rel=1e-14)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (ours, torchs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)
    # Several aspects: the mean of torch's values, one for each.
    logits, labels = batch(20, 3)
    alpha = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = [cross_entropy(logits[:, a], labels[:, a], weight=alpha[a]).item() for a in range(3)]
    assert focal_loss(logits, labels, gamma=0.0, alpha=alpha).item() == pytest.approx(sum(each) / 3)
    # The reductions "mean" and "sum" of the plain loss agree, too.
    for reduction in ("mean", "sum"):
        plain = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
        assert focal_loss(logits, labels, gamma=0.0, reduction=reduction).item() == pytest.approx(
            plain.item()
        )


@pytest.mark.slow
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradients(gamma):
    logits, labels = batch(6, 2)
    labels[0, 0] = -100
    alpha = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    call = lambda z: focal_loss(z, labels, gamma=gamma, alpha=alpha)  # noqa: E731
    assert torch.autograd.gradcheck(call, (logits.requires_grad_(),))
    assert torch.autograd.gradgradcheck(call, (logits,))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("margin", [-1e30, -200.0, -40.0, -20.0, 0.0, 20.0, 200.0, 1e30])
def test_finite_and_exact_for_sure_and_hopeless_labels(gamma, margin):
    """Two classes, margin = log((1 − p) / p): p runs from 1 to 0 far beyond what a probability can hold."""
    logits = torch.tensor([[0.0, margin]], requires_grad=True)
    value = focal_loss(logits, torch.tensor([0]), gamma=gamma)
    value.backward()
    sigma = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
    softplus = max(margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    slope = sigma**gamma * (gamma * (1 - sigma) * softplus + sigma)
    assert logits.grad is not None
    assert value.item() == pytest.approx(sigma**gamma * softplus, rel=1e-5, abs=1e-37)
    assert logits.grad[0].tolist() == pytest.approx([-slope, slope], rel=1e-4, abs=1e-37)


def test_the_last_digits_of_a_sure_label_are_not_lost():
    """Cross-entropy at p = 1 − 2e-9 in float32: torch's own value is 0."""
    logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
    value = focal_loss(logits, torch.tensor([0]), gamma=0.0)
    assert value.item() == pytest.approx(math.log1p(math.exp(-20.0)), rel=1e-6)
    wrong = torch.tensor([[0.0, 21.0]], dtype=torch.float64)  # nor those of a hopeless one
    value = focal_loss(wrong, torch.tensor([0]), gamma=0.0)
    assert value.item() == pytest.approx(21.0 + math.log1p(math.exp(-21.0)), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_half_precision_is_computed_in_float32(dtype, gamma):
    logits, labels = batch(16, 3)
    half = (3 * logits).to(dtype).requires_grad_()
    exact = half.detach().float().requires_grad_()
    for call in (lambda z: focal_loss(z, labels, gamma=gamma), FocalLoss(gamma, alpha=[1.0, 2.0, 1.0, 0.3])):
        if isinstance(call, FocalLoss):
            reference = call(exact, labels)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = call(half, labels)
        else:
            reference, value = call(exact), call(half)
        assert value.dtype == torch.float32
        assert value.item() == reference.item()
        g, r = torch.autograd.grad(value, half)[0], torch.autograd.grad(reference, exact)[0]
        assert g.isfinite().all()
        torch.testing.assert_close(g.float(), r, rtol=1e-2, atol=1e-6)


def test_a_label_that_is_left_out_changes_nothing_whatever_its_logits():
    logits, labels = batch(8)
    keep = torch.tensor([0, 1, 2, 4, 5, 6])
    labels[[3, 7]] = -100
    logits[3], logits[7, 1] = torch.nan, torch.inf
    logits.requires_grad_()
    for reduction in ("weighted_mean", "mean", "sum"):
        value = focal_loss(logits, labels, reduction=reduction)
        assert value.item() == focal_loss(logits[keep], labels[keep], reduction=reduction).item()
        (gradient,) = torch.autograd.grad(value, logits)
        assert (gradient[[3, 7]] == 0).all()
        assert gradient.isfinite().all()
    padded = torch.where(labels == -100, 0, labels)  # class 0 as the label that is none
    expected = focal_loss(logits.nan_to_num(), torch.where(padded == 0, -100, padded))
    assert focal_loss(logits, padded, ignore_index=0).item() == expected.item()


@pytest.mark.parametrize("rows", [0, 4])
def test_no_label_at_all_gives_0_with_gradient_0(rows):
    logits = torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = FocalLoss()
    value = loss(logits, torch.full((rows, 3), -100))
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert (logits.grad == 0).all()
    assert loss.record is not None
    assert (loss.record.labels, loss.record.aspects_left_out, loss.record.p_true) == (0.0, 3.0, 0.0)


def test_integer_types_of_labels():
    logits, labels = batch(6)
    expected = focal_loss(logits, labels)
    for dtype in (torch.int32, torch.int8, torch.uint8):
        assert focal_loss(logits, labels.to(dtype)).item() == expected.item()


def test_the_level_of_alpha_cancels_in_the_weighted_mean_only():
    logits, labels = batch(30, 2)
    counts = [[10, 3, 80, 1], [5, 5, 5, 5]]
    a, b = (focal_alpha(counts, normalized=which) for which in (False, True))
    assert (a / b == 4).all()
    values = [focal_loss(logits, labels, alpha=alpha).item() for alpha in (a, b)]
    assert values[0] == pytest.approx(values[1])
    means = [focal_loss(logits, labels, alpha=alpha, reduction="mean").item() for alpha in (a, b)]
    assert means[0] == pytest.approx(4 * means[1])


def test_alpha_from_counts():
    table = focal_alpha(torch.tensor([[90, 9, 1], [1, 1, 2]]))
    assert table.tolist() == [pytest.approx([100 / 90, 100 / 9, 100.0]), [4.0, 4.0, 2.0]]
    assert focal_alpha([1, 1, 2]).tolist() == [4.0, 4.0, 2.0]
    balanced = focal_alpha([7, 7], normalized=True)
    assert balanced.tolist() == [1.0, 1.0]
    assert balanced.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["weighted_mean", "mean", "sum", "none"])
def test_record_by_autograd(reduction):
    logits, labels = batch(10, 4, seed=3)
    labels[:, 2] = -100
    labels[0, 0] = -100
    alpha = torch.rand(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    loss = FocalLoss(2.0, alpha, reduction)
    assert loss.record is None
    value = loss(logits.requires_grad_(), labels)
    total = value.sum()
    (gradient,) = torch.autograd.grad(total, logits)
    pull = gradient.abs().sum(-1)[labels != -100]
    known = labels != -100
    p = logits.detach().softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)[known]
    hardest = p.argsort()[: math.ceil(len(p) / 10)]
    guess = FocalLoss(2.0, alpha, reduction)(torch.zeros_like(logits), labels)
    record = loss.record
    assert record is not None
    assert record.to_dict() == pytest.approx(
        {
            "loss_kind": "other",
            "labels": 29.0,
            "labels_left_out": 11.0,
            "aspects_left_out": 1.0,
            "p_true": p.mean().item(),
            "hardest_share": (pull[hardest].sum() / pull.sum()).item(),
            "uniform_level": guess.sum().item() / (29 if reduction == "none" else 1),
            "floor": 0.0,
            "finite": True,
        }
    )
    assert 0.1 < record.hardest_share < 1


def test_record_near_convergence_and_its_memory():
    """Gradients of e^-300 are 0 in float32, their shares are not."""
    logits = torch.zeros(20, 2, requires_grad=True)
    with torch.no_grad():
        logits[:, 0] = 100.0
        logits[0, 0] = 99.0
    loss = FocalLoss()
    loss(logits, torch.zeros(20, dtype=torch.long))
    assert loss.record is not None
    assert loss.record.hardest_share == pytest.approx((math.exp(3) + 1) / (math.exp(3) + 19), rel=1e-3)
    assert loss._step is not None
    assert not any(x.requires_grad for x in loss._step if isinstance(x, torch.Tensor))


def test_the_ratios_of_the_focal_story():
    """p = .95 against p = .6 with γ = 2: the modulating factor 64, the loss 637, the gradient 8 → 440."""
    logits = torch.tensor([[math.log(0.6 / 0.4), 0.0], [math.log(0.95 / 0.05), 0.0]], dtype=torch.float64)
    logits.requires_grad_()
    ratio = {}
    for gamma in (0.0, 2.0):
        value = focal_loss(logits, torch.tensor([0, 0]), gamma=gamma, reduction="none")
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        ratio[gamma] = (value[0] / value[1]).item(), (gradient[0, 0] / gradient[1, 0]).item()
    assert round(ratio[2.0][0] / ratio[0.0][0]) == 64
    assert round(ratio[2.0][0]) == 637
    assert (round(ratio[0.0][1]), round(ratio[2.0][1])) == (8, 440)


def test_the_module_equals_the_function_and_can_be_copied():
    logits, labels = batch(6, 3)
    loss = FocalLoss(gamma=1.5, alpha=torch.tensor([1, 2, 3, 4]), reduction="mean", ignore_index=1)
    value = loss(logits.requires_grad_(), labels)
    expected = focal_loss(
        logits, labels, gamma=1.5, alpha=[1.0, 2.0, 3.0, 4.0], reduction="mean", ignore_index=1
    )
    assert value.item() == expected.item()
    assert copy.deepcopy(loss).record == pickle.loads(pickle.dumps(loss)).record == loss.record
    assert loss.state_dict() == {}
    assert loss.to("meta").alpha.device.type == "meta"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FocalLoss(gamma=-1), "0 .cross-entropy. or more"),
        (lambda: FocalLoss(gamma=math.nan), "or more"),
        (lambda: FocalLoss(reduction="weighted"), "did you mean 'weighted_mean'"),
        (lambda: FocalLoss(alpha=0.25), r"\[0.75, 0.25\]"),
        (lambda: FocalLoss(alpha=[1.0, -1.0]), "0 or more"),
        (lambda: FocalLoss(alpha=[1.0, math.inf]), "finite"),
        (lambda: FocalLoss(alpha=[1.0] * 3)(*batch(5)), r"\(C,\)"),
        (lambda: FocalLoss(alpha=torch.ones(5, 4))(*batch(5)), r"\(A, C\)"),
        (lambda: FocalLoss(alpha=torch.ones(2, 4))(*batch(5, 3)), r"\(A, C\)"),
        (lambda: focal_loss(torch.ones(3, 2), torch.zeros(3, 1).long()), "without the last axis"),
        (lambda: focal_loss(torch.ones(3, 1), torch.zeros(3).long()), "at least two classes"),
        (lambda: focal_loss(torch.ones(3, 2), torch.full((3,), 0.5)), "no class: whole numbers"),
        (lambda: focal_loss(torch.ones(3, 2), torch.zeros(3).bool()), "integer classes"),
        (lambda: focal_loss(torch.ones(3, 2).long(), torch.zeros(3).long()), "floating logits"),
        (lambda: focal_loss(torch.ones(3, 2), torch.tensor([0, 1, 2])), "label 2 of row 2 is no class"),
        (lambda: focal_loss(torch.ones(2, 2, 2), torch.tensor([[0, 1], [0, -2]])), "row 1, position 1"),
        (lambda: focal_loss(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.tensor([0, 1])), "row 1"),
        (lambda: focal_loss(torch.tensor([[0.0, -math.inf]]), torch.tensor([0])), "row 0"),
        (lambda: focal_alpha([3, 0, 5]), "class 1 has count 0"),
        (lambda: focal_alpha([[3, 1], [0, 5]]), "class 0 of aspect 1 has count 0"),
        (lambda: focal_alpha([3, -1]), "count -1"),
        (lambda: focal_alpha([3.0, math.nan]), "count nan"),
        (lambda: focal_alpha([3]), "at least two"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call()
