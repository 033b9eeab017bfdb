"""The spatial loss against loops: soft targets, regulariser, masks, and what the record says of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import oracles
from combinations import combined
from nearfar.errors import NearfarError
from nearfar.functional import clip, spatial
from nearfar.losses import ClipLoss, SpatialLoss

N = 10
# Neighbours need not be mutual; named twice, a row itself, none at all, weight 0.
INDEX = torch.tensor(
    [
        [1, 2, 3],
        [0, -1, -1],
        [2, 4, 4],
        [-1, -1, -1],
        [0, 2, 9],
        [6, 7, 8],
        [5, -1, 7],
        [8, 6, 5],
        [7, -1, 9],
        [0, 1, 2],
    ]
)
ALPHA = torch.rand(N, 3, generator=torch.Generator().manual_seed(0)) * 2
ALPHA[9] = 0.0
WAYS = ["soft", "positive", "mask", "none"]
SCALES = [0.2, 2.0, 14.0, 69.0, 72.0, 100.0, 1000.0]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.to(dtype)


def views(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    image = draw(N, 4)
    text = image + draw(N, 4, seed=1)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_()


@pytest.mark.slow
@combined(4, way=WAYS, scale=SCALES, dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_loop(way, scale, dtype):
    a, b = views(dtype)
    s = torch.tensor(scale, dtype=torch.float32 if dtype != torch.float64 else dtype, requires_grad=True)
    exact = oracles.double(a, b, s)
    single = 1e-5 + 3e-6 * scale
    slack = {
        torch.float64: 1e-6,
        torch.float32: single,
        torch.bfloat16: 1e-2 + single,
        torch.float16: 2e-3 + single,
    }
    for weight, factor, tile in (
        (0.05, 0.5, None),
        (0.0, 2.0, None),
        (3.0, 0.5, (4, 3)),
        (0.0, 0.0, (3, 10)),
    ):
        value = spatial(
            a,
            b,
            s,
            INDEX,
            ALPHA,
            neighbors=way,
            temp_reg_weight=weight,
            neighbor_alpha_scale=factor,
            tile=tile,
        )
        directions = oracles.spatial(*exact, INDEX, ALPHA, factor, way)
        wanted = oracles.spatial_value(directions, exact[2], weight)
        # The scale's gradient is a sum over all pairs, in which most cancels at small scales.
        oracles.agree(value, (a, b, s), wanted, exact, slack[dtype] * (1 + weight), floor=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_gradients_by_differences(way):
    inputs = [*views(), torch.tensor(2.5, dtype=torch.float64, requires_grad=True)]

    def value(a, b, scale, tile=None):
        return spatial(a, b, scale, INDEX, ALPHA, neighbors=way, temp_reg_weight=0.7, tile=tile)

    assert torch.autograd.gradcheck(value, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *x: value(*x, tile=(4, 7)), inputs, fast_mode=True)


@pytest.mark.slow
def test_the_regulariser_is_the_derivative_by_the_scale():
    a, b = views()
    for way, length in itertools.product(WAYS, (None, 3.0)):
        s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        options = {"neighbors": way, "normalize": length is None}
        x, y = (a * length, b * length) if length else (a, b)
        plain = spatial(x, y, s, INDEX, ALPHA, temp_reg_weight=0.0, **options)
        slope = torch.autograd.grad(plain, s)[0].item()
        with_it = spatial(x, y, s, INDEX, ALPHA, temp_reg_weight=0.3, **options)
        assert with_it.item() - plain.item() == pytest.approx(0.3 * slope**2, rel=1e-6)


@pytest.mark.slow
def test_long_vectors_that_are_not_brought_to_unit_length():
    for length, way in itertools.product((0.1, 2.0, 2.6, 20.0), WAYS):
        a, b = ((x * length).detach().float().requires_grad_() for x in views())
        u, v = oracles.double(a, b)
        for tile in (None, (4, 3)):
            value = spatial(a, b, 3.0, INDEX, ALPHA, neighbors=way, normalize=False, tile=tile)
            directions = oracles.spatial(u, v, 3.0, INDEX, ALPHA, neighbors=way, normalize=False)
            slack = 1e-4 + 1e-5 * length**2  # logits of 5,000 have steps of 5e-4
            oracles.agree(value, (a, b), oracles.spatial_value(directions, 3.0, 0.05), (u, v), slack)


def test_without_neighbours_it_is_clip():
    a, b = views()
    plain = clip(a, b, 7.0)
    nobody = torch.full((N, 3), -1)
    for way in WAYS:
        value = spatial(a, b, 7.0, nobody, ALPHA, neighbors=way, temp_reg_weight=0.0)
        oracles.agree(value, (a, b), plain, (a, b), 1e-9)
        empty = spatial(a, b, 7.0, nobody[:, :0], ALPHA[:, :0], neighbors=way, temp_reg_weight=0.0)
        assert empty.item() == pytest.approx(plain.item(), rel=1e-9)
    value = spatial(a, b, 7.0, INDEX, ALPHA, neighbor_alpha_scale=0.0, temp_reg_weight=0.0)
    assert value.item() == pytest.approx(plain.item(), rel=1e-9)


def test_one_row_and_rows_that_are_all_neighbours():
    a, b = (x[:1].detach().requires_grad_() for x in views())
    for way in WAYS:
        value = spatial(a, b, 7.0, torch.tensor([[0]]), torch.ones(1, 1), neighbors=way)
        assert value.item() == pytest.approx(0.0, abs=1e-12)
        assert torch.autograd.grad(value, (a, b))[0].abs().max() < 1e-12
    a, b = (x[:3].detach().requires_grad_() for x in views())
    everybody = torch.tensor([[1, 2], [0, 2], [0, 1]])
    value = spatial(a, b, 7.0, everybody, torch.ones(3, 2), neighbors="mask")
    assert value.item() == pytest.approx(0.0, abs=1e-12)  # no negative is left
    loss = SpatialLoss(neighbors="mask")
    loss(a, b, 7.0, everybody, torch.ones(3, 2))
    assert (loss.record.candidates, loss.record.hardest_share, loss.record.uniform_level) == (1.0, 0.0, 0.0)


def test_the_order_of_the_rows_does_not_matter():
    a, b = views()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    place = torch.argsort(order)
    moved = torch.where(INDEX < 0, -1, place[INDEX.clamp(min=0)])[order]
    for way in WAYS:
        mixed = spatial(a[order], b[order], 5.0, moved, ALPHA[order], neighbors=way)
        oracles.agree(mixed, (a, b), spatial(a, b, 5.0, INDEX, ALPHA, neighbors=way), (a, b), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_parts_of_a_batch_and_their_records(way):
    a, b = views()
    directions = oracles.spatial(a, b, 5.0, INDEX, ALPHA, neighbors=way)
    loss = SpatialLoss(temp_reg_weight=0.0, neighbors=way)
    for rows in (slice(0, 3), slice(3, 8), slice(9, 10)):
        value = loss(a, b, 5.0, INDEX, ALPHA, rows=rows)
        oracles.agree(value, (a, b), oracles.mean(directions, rows), (a, b), 1e-6)
        found = {k: v for k, v in loss.record.numbers().items() if k != "rows_with_neighbors"}
        assert found == pytest.approx(oracles.record(directions, 5.0, rows), rel=1e-5, abs=1e-6)
    with pytest.raises(NearfarError, match="temp_reg_weight=0"):
        spatial(a, b, 5.0, INDEX, ALPHA, rows=slice(0, 3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [5.0, 90.0])
@pytest.mark.parametrize("weight", [0.05, 0.0])
def test_record_by_loops(way, scale, weight):
    a, b = views()
    loss = SpatialLoss(neighbors=way, temp_reg_weight=weight, max_scale=100.0)
    value = loss(a, b, scale, INDEX, ALPHA)
    found = loss.record.numbers()
    assert found.pop("rows_with_neighbors") == pytest.approx(0.8)
    assert found.pop("at_clamp") == 0.0
    wanted = oracles.record(oracles.spatial(a, b, scale, INDEX, ALPHA, neighbors=way), scale)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert value.item() >= found["floor"]


def test_the_floor_is_reached_and_guessing_is_ln_n():
    # Two spots that are each other's neighbour by half: the best softmax puts 2/3 and 1/3, which a scale can do.
    index, alpha = torch.tensor([[1], [0]]), torch.ones(2, 1)
    loss = SpatialLoss(temp_reg_weight=0.05)
    scale = math.log(2.0)
    value = loss(torch.eye(2), torch.eye(2), scale, index, alpha)
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert value.item() == pytest.approx(entropy, rel=1e-5) == pytest.approx(loss.record.floor, rel=1e-5)
    guess = loss(torch.ones(N, 2), torch.ones(N, 2), 5.0, INDEX, ALPHA)
    assert (
        guess.item()
        == pytest.approx(math.log(N), rel=1e-5)
        == pytest.approx(loss.record.uniform_level, rel=1e-5)
    )


def test_near_convergence_the_gradient_keeps_its_digits():
    a = (torch.eye(4) * 8 + draw(4, 4)).detach().float().requires_grad_()
    b = (torch.eye(4) * 8 + draw(4, 4, seed=1)).detach().float().requires_grad_()
    u, v = oracles.double(a, b)
    nobody, index = torch.full((4, 1), -1), torch.tensor([[1], [0], [3], [2]])
    for way, near in (("soft", nobody), ("mask", index), ("none", index)):
        directions = oracles.spatial(u, v, 16.0, near, torch.ones(4, 1), neighbors=way)
        exact = oracles.mean(directions)
        assert 1e-6 < exact.item() < 1e-4
        value = spatial(a, b, 16.0, near, torch.ones(4, 1), neighbors=way, temp_reg_weight=0.0)
        oracles.agree(value, (a, b), exact, (u, v), 1e-4, floor=0.0)


def test_the_clamp_of_the_scale():
    a, b = views()
    loss, free = SpatialLoss(max_scale=10.0), SpatialLoss()
    log_scale = torch.tensor(math.log(20.0), requires_grad=True)
    value = loss(a, b, log_scale.exp(), INDEX, ALPHA)
    assert value.item() == pytest.approx(free(a, b, 10.0, INDEX, ALPHA).item(), rel=1e-6)
    assert loss.record.extra["at_clamp"] == 1.0
    assert loss.record.scale == pytest.approx(10.0)
    assert torch.autograd.grad(value, log_scale)[0].item() == 0.0
    below = loss(a, b, torch.tensor(5.0), INDEX, ALPHA)
    assert loss.record.extra["at_clamp"] == 0.0
    assert below.item() == pytest.approx(free(a, b, 5.0, INDEX, ALPHA).item(), rel=1e-6)


def test_a_module_without_neighbours_equals_clip_loss():
    a, b = views()
    value = SpatialLoss(neighbors="none", temp_reg_weight=0.0)(a, b, 9.0, INDEX, ALPHA)
    assert value.item() == pytest.approx(ClipLoss()(a, b, 9.0).item(), rel=1e-9)


def ask(index=INDEX, alpha=ALPHA, scale=5.0, **options):
    return spatial(*views(), scale, index, alpha, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ask(INDEX + 8), "holds 17, but the batch has 10 rows"),
        (lambda: ask(INDEX[:4]), "both are"),
        (lambda: ask(alpha=ALPHA[:, :2]), "both are"),
        (lambda: ask(INDEX[:, 0], ALPHA[:, 0]), "both are"),
        (lambda: ask(INDEX.float()), "whole numbers"),
        (lambda: ask(alpha=-ALPHA - 0.1), "0 or more"),
        (lambda: ask(alpha=ALPHA * math.nan), "not a number"),
        (lambda: ask(alpha=ALPHA / 0), "not a number"),
        (lambda: ask(neighbors="soften"), "'soft', 'positive', 'mask' or 'none'"),
        (lambda: ask(neighbor_alpha_scale=-1.0), "neighbor_alpha_scale"),
        (lambda: ask(scale=-5.0), "above 0"),
        (lambda: ask(max_scale=0.0), "max_scale"),
        (lambda: SpatialLoss(max_scale=0.0), "max_scale"),
        (lambda: spatial(draw(3, 2), draw(4, 2), 5.0, INDEX[:3], ALPHA[:3]), "same spot"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call()
