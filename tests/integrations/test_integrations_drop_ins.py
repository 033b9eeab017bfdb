"""Losses with the call of open_clip, lightly and pytorch-metric-learning: the values of theirs, or of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import losses_of_others
from nearfar import verify
from nearfar.errors import NearfarError
from nearfar.integrations import lightly, open_clip, pytorch_metric_learning


def views(n: int = 24, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=generator)
    b = a + torch.randn(n, d, generator=generator)
    return a.requires_grad_(), b.requires_grad_()


def gradients(value: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, of, retain_graph=True))


def assert_same(value: Tensor, expected: Tensor, *of: Tensor) -> None:
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, theirs in zip(gradients(value, *of), gradients(expected, *of), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_open_clip_losses() -> None:
    a, b = views()
    scale, bias = torch.tensor(14.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    image, text = normalize(a, dim=1), normalize(b, dim=1)
    logits = scale.double() * image.double() @ text.double().T
    target = torch.arange(24)
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    loss = open_clip.ClipLoss()
    assert_same(loss(image, text, scale), expected, a, b, scale)
    assert loss.record.candidates == 24
    assert loss(image, text, scale, output_dict=True)["contrastive_loss"].item() == pytest.approx(
        expected.item()
    )
    sign = 2 * torch.eye(24) - 1
    pairwise = -logsigmoid(sign * (logits + bias)).sum() / 24
    assert_same(open_clip.SigLipLoss()(image, text, scale, bias), pairwise, a, b, scale, bias)


def test_open_clip_masks_likely_false_negatives() -> None:
    a, b = (normalize(each.detach(), dim=1) for each in views())
    b[3] = b[5]
    plain = open_clip.ClipLoss()(a, b, 20.0)
    masked = open_clip.ClipLoss(mask_threshold=0.999)(a, b, 20.0)
    assert masked < plain
    with pytest.raises(NearfarError, match="and 1 processes work together"):
        open_clip.ClipLoss(world_size=2)(a, b, 20.0)
    with pytest.raises(NearfarError, match="use_horovod"):
        open_clip.ClipLoss(use_horovod=True)


@pytest.mark.slow
@pytest.mark.parametrize("fn", [losses_of_others.open_clip_softmax, losses_of_others.open_clip_sigmoid])
def test_open_clip_losses_of_two_processes_are_those_of_one(fn: Any) -> None:
    verdict = verify.loss(fn)
    assert verdict.passed, str(verdict)
    assert verdict.values == pytest.approx([verdict.value] * 2)


@pytest.mark.slow
def test_open_clip_does_not_take_several_processes_for_one() -> None:
    with pytest.raises(NearfarError, match="world_size=1, and 2 processes work together"):
        verify.loss(losses_of_others.open_clip_of_one)


def two_views(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Sum outside, by a loop."""
    z = normalize(z.double(), dim=1)
    n, losses = len(z), []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        whole = torch.logsumexp(torch.stack([z[i] @ z[j] / temperature for j in others]), 0)
        same = [j for j in others if labels[j] == labels[i]]
        if same:
            losses.append(torch.stack([whole - z[i] @ z[j] / temperature for j in same]).mean())
    return torch.stack(losses).mean()


@pytest.mark.slow
def test_lightly_losses() -> None:
    a, b = views(12)
    expected = two_views(torch.cat([a, b]), torch.arange(12).repeat(2), 0.5)
    loss = lightly.NTXentLoss(temperature=0.5)
    assert_same(loss(a, b), expected, a, b)
    assert loss.record.candidates == 23
    labels = torch.arange(12) // 3
    expected = two_views(torch.cat([a, b]), labels.repeat(2), 0.1)
    assert_same(lightly.SupConLoss()(torch.stack([a, b], 1), labels), expected, a, b)
    with pytest.raises(NearfarError, match="CrossBatchMemory"):
        lightly.NTXentLoss(memory_bank_size=4096)
    with pytest.raises(NearfarError, match="two views"):
        loss(a, b[:5])
    with pytest.raises(NearfarError, match="rows, views, d"):
        lightly.SupConLoss()(a)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_pytorch_metric_learning_losses(name: str, mined: bool, reference: bool) -> None:
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    a, b = views()
    labels, ref_labels = torch.arange(24) % 6, (torch.arange(24) + 1) % 6
    host: nn.Module = getattr(theirs, name)(temperature=0.1)
    loss: nn.Module = getattr(pytorch_metric_learning, name)(temperature=0.1)
    options: dict[str, Any] = {"ref_emb": b, "ref_labels": ref_labels} if reference else {}
    if mined:
        # As many positives for each anchor, some of the negatives.
        same = labels[:, None] == (ref_labels if reference else labels)[None]
        if not reference:
            same.fill_diagonal_(False)
        generator = torch.Generator().manual_seed(1)
        different = (labels[:, None] != (ref_labels if reference else labels)[None]) & (
            torch.rand(24, 24, generator=generator) < 0.5
        )
        pairs = (*same.nonzero(as_tuple=True), *different.nonzero(as_tuple=True))
        options["indices_tuple"] = pairs
    of = (a, b) if reference else (a,)
    assert_same(loss(a, labels, **options), host(a, labels, **options), *of)


def test_pytorch_metric_learning_bad_input() -> None:
    a, b = views()
    loss = pytorch_metric_learning.SupConLoss()
    with pytest.raises(NearfarError, match="go together"):
        loss(a, torch.arange(24), ref_emb=b)
    with pytest.raises(NearfarError, match="labels are None"):
        loss(a)
    with pytest.raises(NearfarError, match="2 parts"):
        loss(a, indices_tuple=(torch.arange(2), torch.arange(2)))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["open_clip", "lightly", "pytorch_metric_learning"])
def test_a_small_encoder_learns(host: str) -> None:
    """The smallest training loop with each: the loss leaves the level of guessing."""
    torch.manual_seed(0)
    encoder, x = nn.Linear(16, 8), torch.randn(64, 16)
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
    call: dict[str, Any] = {
        "open_clip": lambda p, q: open_clip.ClipLoss()(normalize(p, dim=1), normalize(q, dim=1), 10.0),
        "lightly": lambda p, q: lightly.NTXentLoss(0.1)(p, q),
        "pytorch_metric_learning": lambda p, q: pytorch_metric_learning.NTXentLoss(0.1)(
            torch.cat([p, q]), torch.arange(64).repeat(2)
        ),
    }
    values = []
    for _ in range(60):
        noise = [torch.cat([x[:, :4], torch.randn(64, 12)], 1) for _ in range(2)]
        value = call[host](encoder(noise[0]), encoder(noise[1]))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-5:]) < sum(values[:5]) - 2.5
