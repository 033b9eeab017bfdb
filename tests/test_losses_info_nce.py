"""InfoNCE against float64 loops, at the extremes where others turn infinite, and its record."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.functional import info_nce
from nearfar.losses import InfoNCELoss, Record, duplicate_mask, false_negative_mask


def batch(n: int, d: int = 6, seed: int = 0, m: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64)
    b = torch.randn(m or n, d, generator=generator, dtype=torch.float64)
    b[:n] += 0.5 * a
    return a, b


def loop(a, b, temperature, symmetric, mask=None):
    """One query after the other, one candidate after the other."""

    def cosine(x, y):
        dot = sum(p * q for p, q in zip(x, y, strict=True))
        return dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))

    a, b = a.tolist(), b.tolist()
    score = [[cosine(x, y) / temperature for y in b] for x in a]
    left_out = lambda i, j: mask is not None and i != j and bool(mask[i][j])  # noqa: E731

    def direction(rows, columns, at, out):
        losses = []
        for i in rows:
            candidates = [at(i, j) for j in columns if not out(i, j)]
            top = max(candidates)
            losses.append(math.log(sum(math.exp(c - top) for c in candidates)) + top - at(i, i))
        return sum(losses) / len(losses)

    total = direction(range(len(a)), range(len(b)), lambda i, j: score[i][j], left_out)
    if not symmetric:
        return total
    swapped = direction(range(len(b)), range(len(a)), lambda j, i: score[i][j], lambda j, i: left_out(i, j))
    return (total + swapped) / 2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.001])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_loop(symmetric, temperature, masked):
    a, b = batch(7)
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) < 0.4 if masked else None
    value = info_nce(a, b, temperature=temperature, symmetric=symmetric, mask=mask)
    assert value.shape == ()
    assert value.item() == pytest.approx(loop(a, b, temperature, symmetric, mask), rel=1e-10, abs=1e-12)


def test_further_rows_of_b_are_negatives():
    a, b = batch(4, m=9)
    assert info_nce(a, b, symmetric=False).item() == pytest.approx(loop(a, b, 0.07, False))
    with pytest.raises(NearfarError, match="symmetric=False"):
        info_nce(a, b)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients(masked):
    a, b = batch(5, 3)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(2)) < 0.3 if masked else None
    scale = torch.tensor(3.0, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (a, b, scale))
    assert torch.autograd.gradcheck(lambda x, y, s: info_nce(x, y, scale=s, mask=mask), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.001, 0.07])
def test_half_precision_and_small_temperature(dtype, temperature):
    a, b = (x.to(dtype).requires_grad_() for x in batch(16, 32))
    value = info_nce(a, b, temperature=temperature)
    value.backward()
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    reference = info_nce(*exact, temperature=temperature)
    reference.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference.item(), rel=1e-4, abs=1e-5)
    for x, y in zip((a, b), exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        error = (x.grad.double() - y.grad).abs().max() / y.grad.abs().max()
        assert error < tolerance


def test_a_hard_positive_keeps_its_gradient_at_small_temperature():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    b = torch.tensor([[-0.2, 1.0], [1.0, 0.1]])  # each partner is the other's neighbour
    info_nce(a, b, temperature=0.001).backward()
    assert a.grad is not None
    assert a.grad.norm(dim=1).min() > 100


def test_half_precision_autocast_is_left_aside():
    a, b = (x.float() for x in batch(12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = info_nce(a, b, temperature=0.01)
    assert value.item() == info_nce(a, b, temperature=0.01).item()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_lengths_do_not_matter(factor):
    a, b = (x.float() for x in batch(8))
    assert info_nce(factor * a, b).item() == pytest.approx(info_nce(a, b).item(), rel=1e-5)


def test_rows_of_zeros_stay_finite():
    a, b = (x.float() for x in batch(5))
    a[2] = 0.0
    a.requires_grad_()
    value = info_nce(a, b)
    value.backward()
    assert value.isfinite()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_order_of_the_pairs_does_not_matter():
    a, b = batch(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert info_nce(a[order], b[order]).item() == pytest.approx(info_nce(a, b).item(), rel=1e-12)
    assert info_nce(b, a).item() == pytest.approx(info_nce(a, b).item(), rel=1e-12)


def test_one_row_has_no_one_to_be_told_apart_from():
    loss = InfoNCELoss()
    a = torch.ones(1, 4, requires_grad=True)
    value = loss(a, torch.ones(1, 4))
    value.backward()
    assert value.item() == 0.0
    assert a.grad is not None
    assert (a.grad == 0).all()
    assert loss.record == Record(1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, pytest.approx(1 / 0.07))


def test_masked_duplicates_are_as_if_absent():
    a, b = batch(6)
    b[4], a[4] = b[1], a[1]
    mask = duplicate_mask(torch.tensor([0, 1, 2, 3, 1, 5]))
    with_copy = info_nce(a, b, mask=mask, symmetric=False)
    keep = [0, 1, 2, 3, 5]
    rows = [loop(a[[i]], b[[i] + [j for j in keep if j != i]], 0.07, False) for i in keep]
    # Rows 1 and 4 each see the four others once; the others see the pair 1, 4 twice.
    two = [loop(a[[i]], b[[i] + [j for j in range(6) if j != i]], 0.07, False) for i in (0, 2, 3, 5)]
    assert with_copy.item() == pytest.approx((sum(two) + 2 * rows[1]) / 6)


def test_a_row_cannot_lose_its_own_partner():
    a, b = batch(5)
    everything = torch.ones(5, 5, dtype=torch.bool)
    loss = InfoNCELoss()
    assert loss(a, b, mask=everything).item() == 0.0
    assert loss.record is not None
    assert (loss.record.candidates, loss.record.hardest_share) == (1.0, 0.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_record_by_loops(symmetric):
    a, b = (torch.nn.functional.normalize(x) for x in batch(9))
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(5)) < 0.3
    loss = InfoNCELoss(temperature=0.2, symmetric=symmetric)
    assert loss.record is None
    loss(a, b, mask)
    weight = torch.exp(a @ b.T / 0.2)
    candidates, positives, hardest = [], [], []
    for matrix, out in ((weight, mask), (weight.T, mask.T))[: 2 if symmetric else 1]:
        for i in range(9):
            others = [matrix[i, j].item() for j in range(9) if j != i and not out[i, j]]
            candidates.append(len(others) + 1)
            positives.append(matrix[i, i].item() / (sum(others) + matrix[i, i].item()))
            if others:
                hardest.append(max(others) / sum(others))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    expected = {
        "candidates": mean(candidates),
        "positives_per_row": 1.0,
        "positives_min": 1.0,
        "rows_without_positives": 0.0,
        "p_positive": mean(positives),
        "hardest_share": mean(hardest),
        "uniform_level": mean([math.log(c) for c in candidates]),
        "floor": 0.0,
        "scale": 5.0,
        "finite": True,
    }
    assert loss.record is not None
    assert loss.record.to_dict() == pytest.approx(expected)


def test_guessing_gives_the_uniform_level():
    loss = InfoNCELoss()
    value = loss(torch.ones(32, 4), torch.ones(32, 4))
    assert loss.record is not None
    assert value.item() == pytest.approx(loss.record.uniform_level) == pytest.approx(math.log(32))
    assert loss.record.hardest_share == pytest.approx(1 / 31)


def test_the_module_equals_the_function_and_can_be_copied():
    a, b = batch(6)
    loss = InfoNCELoss(temperature=0.3, symmetric=False, normalize=False)
    value = loss(a.requires_grad_(), b)
    assert value.item() == info_nce(a, b, temperature=0.3, symmetric=False, normalize=False).item()
    assert copy.deepcopy(loss).record == pickle.loads(pickle.dumps(loss)).record == loss.record
    assert loss.state_dict() == {}
    assert loss(a, b, scale=torch.tensor(2.0)).item() == loss(a, b, scale=2.0).item()


def test_false_negative_mask_by_loops():
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(12, 3, generator=generator)
    text[5], text[7] = 4 * text[2], text[2] + 1e-3
    cosine = torch.nn.functional.cosine_similarity(text[:, None].double(), text[None].double(), dim=2)
    for threshold in (0.95, 0.5):
        expected = [[i != j and bool(cosine[i, j] >= threshold) for j in range(12)] for i in range(12)]
        assert false_negative_mask(text, threshold).tolist() == expected
    assert false_negative_mask(text.half(), 0.95)[2, 7]
    assert false_negative_mask(text, 1.0)[2, 5]
    assert not false_negative_mask(text, -1.0).diagonal().any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InfoNCELoss(temperature=0), "must be above 0"),
        (lambda: info_nce(torch.ones(3, 2), torch.ones(3, 4)), "same dimensions"),
        (lambda: info_nce(torch.ones(0, 2), torch.ones(0, 2)), "at least one row"),
        (lambda: info_nce(torch.ones(3, 2), torch.ones(3, 2), mask=torch.zeros(3, 3)), "Boolean"),
        (lambda: info_nce(torch.ones(3, 2), torch.ones(3, 2), temperature=-1.0), "above 0"),
        (lambda: false_negative_mask(torch.ones(3, 2), 95), "cosine"),
        (lambda: duplicate_mask(torch.ones(3, 2)), "one label"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call()
