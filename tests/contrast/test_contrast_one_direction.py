"""Losses and derivatives in one go over the tiles of some rows, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nearfar.contrast.one_direction as module
import oracles
from nearfar.contrast import as_mask, one_direction_loss
from nearfar.errors import NearfarError
from nearfar.functional import info_nce
from nearfar.losses.info_nce import InfoNCEOptions, info_nce_step

D = 4
SHAPES = [(1, 1), (3, 4), (9, 9), (10, 10), (7, 11), (1, 9)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 3 × 4, the last ones smaller: no size divides the batch."""
    for name, value in (("MIN_ROWS", 1), ("MAX_KEPT_LOGITS", 40), ("TILE", (3, 4))):
        monkeypatch.setattr(module, name, value)


def views(n: int, m: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(k, D, generator=generator, dtype=torch.float64) for k in (n, m))
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


def left_out(n: int, m: int) -> Tensor:
    return torch.rand(n, m, generator=torch.Generator().manual_seed(1)) < 0.4


def value_of(
    a: Tensor, b: Tensor, scale: Tensor, normalize: bool = True, mask: Tensor | None = None
) -> Tensor:
    found = one_direction_loss(a, b, scale, normalize, None if mask is None else as_mask(mask))
    assert found is not None
    return found[0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [0.2, 14.3, 39.9, 41.0, 100.0, 1000.0])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_value_and_gradients(n: int, m: int, scale: float, masked: bool, normalize: bool) -> None:
    a, b = views(n, m)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    mask = left_out(n, m) if masked else None
    exact = oracles.mean(oracles.info_nce(a, b, s, symmetric=False, normalize=normalize, mask=mask))
    oracles.agree(value_of(a, b, s, normalize, mask), (a, b, s), exact, (a, b, s), 1e-9)


@pytest.mark.parametrize("temperature", [5.0, 0.07, 0.01, 0.001])
@pytest.mark.parametrize("noise", [0.02, 3.0])
def test_single_precision(temperature: float, noise: float) -> None:
    """Also near convergence, where a difference of two log-sums would have lost its digits."""
    a, other = views(10, 10, torch.float32)
    b = (a.detach() + noise * other.detach()).requires_grad_()
    s = torch.tensor(1 / temperature, requires_grad=True)
    doubled = oracles.double(a, b, s)
    exact = oracles.mean(oracles.info_nce(*doubled, symmetric=False))
    oracles.agree(value_of(a, b, s), (a, b, s), exact, doubled, 1e-3)


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_record_is_that_of_the_walk_over_tiles(scale: float, masked: bool) -> None:
    a, b = views(10, 12)
    mask = left_out(10, 12) if masked else None
    found = one_direction_loss(
        a, b, torch.tensor(scale, dtype=torch.float64), True, None if mask is None else as_mask(mask)
    )
    assert found is not None
    walked = info_nce_step(a, b, InfoNCEOptions(symmetric=False), scale, mask=mask, tile=(3, 4))[1]
    torch.testing.assert_close(found[1].numbers(), walked.numbers(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_a_query_with_all_others_left_out_has_no_loss(scale: float) -> None:
    a, b = views(5, 5)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2] = True
    value = value_of(a, b, torch.tensor(scale, dtype=torch.float64), mask=mask)
    (gradient,) = torch.autograd.grad(value, a)
    assert gradient.isfinite().all()
    assert not gradient[2].any()


def test_rows_of_zeros_and_duplicates_stay_finite() -> None:
    a, b = (x.detach() for x in views(6, 6))
    a[1], b[3] = 0.0, b[2]
    a.requires_grad_(), b.requires_grad_()
    s = torch.tensor(5.0, dtype=torch.float64)
    exact = oracles.mean(oracles.info_nce(a, b, s, symmetric=False))
    value = value_of(a, b, s)
    torch.testing.assert_close(value, exact)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (a, b)))


@pytest.mark.parametrize("who", ["a", "b", "scale", "nobody"])
def test_only_what_is_asked_for(who: str) -> None:
    a, b = (x.detach().requires_grad_(name == who) for name, x in zip("ab", views(7, 7), strict=True))
    s = torch.tensor(10.0, dtype=torch.float64, requires_grad=who == "scale")
    value = value_of(a, b, s)
    exact = oracles.mean(oracles.info_nce(a, b, s, symmetric=False))
    torch.testing.assert_close(value, exact)
    assert value.requires_grad == (who != "nobody")
    asked = [x for x in (a, b, s) if x.requires_grad]
    if asked:
        oracles.agree(value, asked, exact, asked, 1e-9)
    with torch.no_grad():
        assert value_of(a, b, s) == value


def test_a_graph_can_be_gone_through_twice_and_no_further() -> None:
    a, b = views(7, 7)
    value = value_of(a, b, torch.tensor(5.0, dtype=torch.float64))
    first = torch.autograd.grad(value, (a, b), retain_graph=True)
    first[0].mul_(2.0)  # what was handed out is the caller's
    second = torch.autograd.grad(value, (a, b), retain_graph=True)
    torch.testing.assert_close(first[0], 2.0 * second[0])
    with pytest.raises(NearfarError, match="first derivatives only"):
        torch.autograd.grad(value, a, create_graph=True)


def test_the_same_rows_on_both_sides() -> None:
    a, _ = views(7, 7)
    s = torch.tensor(5.0, dtype=torch.float64)
    exact = oracles.mean(oracles.info_nce(a, a, s, symmetric=False))
    oracles.agree(value_of(a, a, s), (a,), exact, (a,), 1e-9)


def test_so_many_keys_that_too_few_rows_could_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = views(3, 30)
    monkeypatch.setattr(module, "MIN_ROWS", 2)
    assert one_direction_loss(a, b, torch.tensor(1.0, dtype=torch.float64), True) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_batches_take_this_way(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Of ``info_nce`` without tiles set by hand; half precision is scored in single."""
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(1100, 16, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    taken = []
    monkeypatch.setattr(
        module, "_walk", lambda *args, walk=module._walk, **more: taken.append(1) or walk(*args, **more)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        here = info_nce(a, b, symmetric=False)
    assert taken
    tiled = info_nce(a, b, symmetric=False, tile=(512, 512))
    torch.testing.assert_close(here, tiled)
    for one, other in zip(torch.autograd.grad(here, (a, b)), torch.autograd.grad(tiled, (a, b)), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-6)
