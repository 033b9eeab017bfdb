"""InfoNCE against float64 loops, at the extremes where others turn infinite, and its record."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

import oracles
from combinations import combined
from nearfar.contrast import DuplicateMask
from nearfar.errors import NearfarError
from nearfar.functional import clip, info_nce
from nearfar.losses import ClipLoss, InfoNCELoss, Record, duplicate_mask, false_negative_mask


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


@pytest.mark.slow
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
    assert loss.record == Record(
        1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, pytest.approx(1 / 0.07), rows_without_negatives=1.0
    )


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
        "rows_without_negatives": sum(count == 1 for count in candidates) / 2,
        "masked_per_row": 9 - mean(candidates),
        "p_positive": mean(positives),
        "hardest_share": mean(hardest),
        "uniform_level": mean([math.log(c) for c in candidates]),
        "floor": 0.0,
        "scale": 5.0,
        "finite": True,
    }
    assert loss.record is not None
    assert loss.record.numbers() == pytest.approx(expected)


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


# -- every option against the oracle ----------------------------------------------------------------------------

MORE, OTHERS, MINED = (batch(n, 6, seed=seed)[0] for n, seed in ((5, 30), (3, 31), (8 * 2, 32)))
MINED = MINED.reshape(8, 2, 6)
MASK = torch.rand(8, 8, generator=torch.Generator().manual_seed(33)) < 0.4
NEGATIVES = {
    "none": ((None, None), (None, None)),
    "shared": ((MORE, None), (None, None)),
    "mined": ((MINED, None), (None, None)),
    "both ways": ((MORE, MINED), (None, None)),
    "second only": ((None, MORE), (None, None)),
    "masked": ((MORE, OTHERS), (torch.rand(8, 5) < 0.5, DuplicateMask(torch.arange(8) % 3, torch.arange(3)))),
    "mined, masked": ((MINED, MINED.flip(0)), (torch.eye(8, 2) > 0, torch.ones(8, 2) > 0)),
}


def dense(mask):
    return (
        mask
        if mask is None or isinstance(mask, torch.Tensor)
        else mask.tile(*(slice(0, n) for n in mask.shape))
    )


@pytest.mark.slow
@combined(
    4,
    kind=NEGATIVES,
    scale=[0.2, 14.0, 38.0, 44.0, 69.0, 72.0, 100.0, 1000.0],
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
)
def test_values_and_gradients_of_every_option(kind, scale, dtype):
    rows, masks = NEGATIVES[kind]
    a, b = (x.to(dtype).requires_grad_() for x in batch(8))
    s = torch.tensor(
        scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True
    )
    exact = oracles.double(a, b, s)
    more = [None if x is None else x.to(dtype) for x in rows]
    single = 1e-5 + 3e-6 * scale
    slack = {
        torch.float64: 1e-9,
        torch.float32: single,
        torch.bfloat16: 1e-2 + single,
        torch.float16: 2e-3 + single,
    }
    for mask, tile in ((None, None), (MASK, None), (MASK, (3, 5)), (None, (8, 3))):
        options = {"mask": mask, "tile": tile, "scale": s}
        if kind != "none":
            options |= {"negatives": tuple(more), "negatives_mask": masks}
        wide = [None if x is None else x.double() for x in more]
        directions = oracles.info_nce(
            *exact, mask=mask, negatives=wide, negatives_masks=[dense(x) for x in masks]
        )
        value = info_nce(a, b, **options)
        oracles.agree(value, (a, b, s), oracles.mean(directions), exact, slack[dtype], floor=1e-3 * scale)
        if rows[1] is None:
            options["negatives"] = more[0]
            options["negatives_mask"] = masks[0]
            value = info_nce(a, b, symmetric=False, **options)
            oracles.agree(
                value, (a, b, s), oracles.mean(directions[:1]), exact, slack[dtype], floor=1e-3 * scale
            )


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEGATIVES)
def test_parts_and_records_of_every_option(kind):
    rows, masks = NEGATIVES[kind]
    a, b = (x.requires_grad_() for x in batch(8))
    options = {} if kind == "none" else {"negatives": rows, "negatives_mask": masks}
    loss = InfoNCELoss(temperature=0.2)
    directions = oracles.info_nce(
        a, b, 5.0, mask=MASK, negatives=rows, negatives_masks=[dense(x) for x in masks]
    )
    for part in (None, slice(0, 3), slice(3, 4), slice(-4, None)):
        value = loss(a, b, MASK, rows=part, **options)
        oracles.agree(value, (a, b), oracles.mean(directions, part), (a, b), 1e-9)
        assert loss.record.numbers() == pytest.approx(oracles.record(directions, 5.0, part))


@pytest.mark.slow
@pytest.mark.parametrize("length", [0.1, 1.5, 2.2, 3.0, 1000.0])
def test_long_vectors_that_are_not_brought_to_unit_length(length):
    for tile in (None, (3, 5)):
        a, b = ((x / x.norm(dim=1).max() * length).float().requires_grad_() for x in batch(8))
        u, v = oracles.double(a, b)
        value = info_nce(a, b, temperature=0.1, normalize=False, negatives=MORE.float(), tile=tile)
        exact = oracles.mean(oracles.info_nce(u, v, 10.0, normalize=False, negatives=(MORE, None)))
        oracles.agree(value, (a, b), exact, (u, v), 1e-4 + 1e-6 * length**2)
        value = info_nce(a, b, temperature=0.1, normalize=False, tile=tile)
        exact = oracles.mean(oracles.info_nce(u, v, 10.0, normalize=False))
        oracles.agree(value, (a, b), exact, (u, v), 1e-4 + 1e-6 * length**2)


@pytest.mark.parametrize("scale", [17.0, 60.0, 120.0])
@pytest.mark.parametrize("options", [{}, {"tile": (2, 3)}, {"tile": (9, 9)}, {"negatives": -torch.eye(5)}])
def test_near_convergence_the_gradient_keeps_its_digits(scale, options):
    generator = torch.Generator().manual_seed(0)
    apart = 13.0 / scale  # of any two rows the cosine is 1 - apart, so that the loss is about exp(-13)
    rows = torch.cat([torch.full((4, 1), (1 - apart) ** 0.5), apart**0.5 * torch.eye(4)], 1)
    noise = 0.04 * apart**0.5 * torch.randn(2, 4, 5, generator=generator)
    a, b = ((rows + each).requires_grad_() for each in noise)
    u, v = oracles.double(a, b)
    more = (options["negatives"].double(), None) if "negatives" in options else (None, None)
    exact = oracles.mean(oracles.info_nce(u, v, scale, negatives=more))
    assert 1e-8 < exact.item() < 1e-4
    oracles.agree(info_nce(a, b, scale=scale, **options), (a, b), exact, (u, v), 1e-4, floor=0.0)


def test_plain_cross_entropy_does_not_keep_them():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.eye(4) * 8 + 0.2 * torch.randn(4, 4, generator=generator) for _ in range(2))
    a, b = a.requires_grad_(), b.requires_grad_()
    u, v = oracles.double(a, b)
    exact = torch.autograd.grad(oracles.mean(oracles.info_nce(u, v, 17.0, symmetric=False)), u)[0]
    scores = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T * 17.0
    naive = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, torch.arange(4)), a)[0]
    assert oracles.error(naive, exact, 0.0) > 1e-3


def test_a_row_all_of_whose_negatives_are_left_out():
    for shape in ((4, 6), (1, 4, 6)):
        a, b = (x.requires_grad_() for x in batch(1))
        negatives = torch.ones(*shape, dtype=torch.float64)
        mask = torch.ones(1, 4, dtype=torch.bool)
        value = info_nce(a, b, negatives=negatives, negatives_mask=mask)
        assert value.item() == 0.0
        assert all((x == 0).all() for x in torch.autograd.grad(value, (a, b)))
        loss = InfoNCELoss()
        loss(a, b, negatives=negatives, negatives_mask=mask)
        assert (loss.record.candidates, loss.record.hardest_share, loss.record.uniform_level) == (
            1.0,
            0.0,
            0.0,
        )


def test_no_further_negatives_are_none():
    a, b = batch(4)
    for nothing in (torch.empty(0, 6), torch.empty(4, 0, 6), (None, None), (torch.empty(0, 6), None)):
        assert info_nce(a, b, negatives=nothing).item() == pytest.approx(info_nce(a, b).item(), rel=1e-12)


def test_further_negatives_get_a_gradient_of_their_own():
    a, b = batch(8)
    for shape in ((5, 6), (8, 2, 6)):
        rows = torch.randn(
            shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
        ).requires_grad_()
        (exact,) = oracles.double(rows)
        wanted = oracles.mean(oracles.info_nce(a, b, 5.0, negatives=(exact, None)))
        oracles.agree(info_nce(a, b, scale=5.0, negatives=rows), (rows,), wanted, (exact,), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_small_path_equals_the_kernel(symmetric):
    # Up to half the limit of a shift-free sum the small path is taken, beyond it the kernel: no step between.
    a, b = (x.float().requires_grad_() for x in batch(8))
    for scale in (30.0, 40.0, 42.0, 43.0, 45.0, 60.0):
        for mask in (None, MASK):
            found = info_nce(a, b, scale=scale, symmetric=symmetric, mask=mask)
            kernel = info_nce(a, b, scale=scale, symmetric=symmetric, mask=mask, tile=(8, 8))
            oracles.agree(found, (a, b), kernel, (a, b), 2e-4)
            one, other = InfoNCELoss(1 / scale, symmetric), InfoNCELoss(1 / scale, symmetric)
            one(a, b, mask)
            other(a, b, mask, rows=slice(0, 8))
            assert one.record.numbers() == pytest.approx(other.record.numbers(), rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_scale_that_learns_and_one_that_does_not():
    a, b = batch(8)
    for scale in (5.0, 90.0):
        log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
        value = info_nce(a, b, scale=log_scale.exp())
        exact = log_scale.detach().clone().requires_grad_()
        oracles.agree(value, (log_scale,), oracles.mean(oracles.info_nce(a, b, exact.exp())), (exact,), 1e-8)
        for same in (
            scale,
            torch.tensor(scale),
            torch.tensor([scale]),
            torch.tensor(scale).half(),
            int(scale),
        ):
            assert info_nce(a, b, scale=same).item() == pytest.approx(value.item(), rel=1e-5)
        moving = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        value = info_nce(a, b, scale=moving)
        with torch.no_grad():
            moving.mul_(2.0)
        exact = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        oracles.mean(oracles.info_nce(a, b, exact)).backward()
        value.backward()  # the derivative at the scale that the loss was computed with, whatever has become of it
        assert moving.grad.item() == pytest.approx(exact.grad.item(), rel=1e-8)
        moving = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        value = info_nce(a, b, scale=moving, tile=(4, 4))
        with torch.no_grad():
            moving.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.slow
def test_clip_and_its_clamp():
    a, b = batch(8)
    loss = ClipLoss(max_scale=10.0)
    for scale, at in ((5.0, 0.0), (10.0, 1.0), (20.0, 1.0)):
        s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        value = loss(a, b, s, MASK)
        exact = s.detach().clone().requires_grad_()
        wanted = oracles.mean(oracles.info_nce(a, b, exact.clamp(max=10.0), mask=MASK))
        oracles.agree(value, (s,), wanted, (exact,), 1e-9)
        assert loss.record.extra == {"at_clamp": at}
        assert loss.record.scale == pytest.approx(min(scale, 10.0))
        assert loss(a, b, scale, MASK).item() == pytest.approx(value.item(), rel=1e-12)
        assert clip(a, b, scale, max_scale=10.0, mask=MASK).item() == pytest.approx(value.item(), rel=1e-12)
    free = ClipLoss(normalize=False)
    assert free(a, b, 2.0).item() == pytest.approx(
        oracles.mean(oracles.info_nce(a, b, 2.0, normalize=False)).item()
    )
    assert free.record.extra == {}
    parts = [ClipLoss()(a, b, 5.0, rows=rows).item() for rows in (slice(0, 3), slice(3, 8))]
    assert sum(parts) == pytest.approx(clip(a, b, 5.0).item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": torch.ones(3, 4)}, "negatives are"),
        ({"negatives": torch.ones(3, 2, 6)}, "negatives are"),
        ({"negatives": torch.ones(6)}, "matrix"),
        ({"negatives": torch.full((3, 6), math.nan)}, "negatives is not finite in 3 of 3 rows"),
        ({"negatives": (None, torch.ones(3, 6)), "symmetric": False}, "one direction only"),
        (
            {"negatives": torch.ones(3, 6), "negatives_mask": torch.ones(8, 4, dtype=torch.bool)},
            "mask is for",
        ),
        ({"negatives": torch.ones(3, 6), "negatives_mask": torch.ones(8, 3)}, "Boolean"),
        ({"mask": torch.ones(8, 7, dtype=torch.bool)}, "mask is for"),
        ({"scale": torch.ones(2)}, "one number"),
        ({"scale": -1.0}, "finite number above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NearfarError, match=message):
        info_nce(*batch(8), **options)
    with pytest.raises(NearfarError, match="max_scale"):
        ClipLoss(max_scale=-1.0)
