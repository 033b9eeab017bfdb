"""Losses at several lengths against the loss of each prefix, and against sentence-transformers."""

from __future__ import annotations

import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.losses import (
    CrossBatchMemory,
    InfoNCELoss,
    MatryoshkaLoss,
    MultiLabelSupConLoss,
    SigLipLoss,
    SpatialLoss,
    SupConLoss,
)
from nearfar.training.grad_cache import cached_loss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = draw(8, 6), draw(8, 6, seed=1)


def test_value_gradient_and_records_are_those_of_the_prefixes():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    loss = MatryoshkaLoss(InfoNCELoss(0.3), [6, 2, 4], weights=[1.0, 0.25, 0.5])
    value = loss(a, b)
    plain = InfoNCELoss(0.3)
    expected = sum(w * plain(a[:, :d], b[:, :d]) for d, w in ((2, 0.25), (4, 0.5), (6, 1.0)))
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(
        torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert list(loss.records) == ["dim2", "dim4", "dim6"]
    assert loss.objective.record.weights == {"dim2": 0.25, "dim4": 0.5, "dim6": 1.0}
    plain(a[:, :2], b[:, :2])
    assert loss.records["dim2"] == plain.record
    plain(a, b)
    assert loss.record == plain.record


@pytest.mark.slow
def test_every_loss_of_embeddings():
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    index, alpha = torch.arange(8).roll(1).unsqueeze(1).expand(8, 2).contiguous(), torch.full((8, 2), 0.5)
    calls = [
        (SupConLoss(0.3), {"z": A, "labels": labels}),
        (SupConLoss(0.3), {"z": A, "labels": labels, "other": B}),
        (MultiLabelSupConLoss(0.3), {"z": A, "labels": torch.eye(6)[torch.arange(8) % 6]}),  # as wide as z
        (SigLipLoss(), {"a": A, "b": B, "logit_scale": 5.0, "logit_bias": -1.0}),
        (
            SpatialLoss(),
            {"image": A, "text": B, "logit_scale": 5.0, "neighbor_index": index, "neighbor_alpha": alpha},
        ),
        (InfoNCELoss(), {"a": A, "b": B, "negatives": (draw(3, 6, seed=2), draw(3, 6, seed=3))}),
        (InfoNCELoss(symmetric=False), {"a": A, "b": B, "negatives": draw(8, 3, 6, seed=2)}),
    ]
    embeddings = {"z", "a", "b", "other", "image", "text"}
    for loss, arguments in calls:
        total = 0.0
        for length in (2, 6):
            cut = {name: x[:, :length] if name in embeddings else x for name, x in arguments.items()}
            given = arguments.get("negatives")
            if given is not None:
                cut["negatives"] = (
                    tuple(x[:, :length] for x in given) if isinstance(given, tuple) else given[..., :length]
                )
            total += loss(**cut)
        value = MatryoshkaLoss(loss, [2, 6])(**arguments)
        assert value.item() == pytest.approx(total.item(), rel=1e-12), type(loss).__name__


def test_in_chunks_of_the_encoder():
    encoder = torch.nn.Linear(6, 6).double()
    loss = MatryoshkaLoss(InfoNCELoss(0.3), [3, 6])
    value = loss(encoder(A), B)
    (plain,) = torch.autograd.grad(value, encoder.weight)
    cached = cached_loss(encoder, A.split(3), lambda z: loss(z, B))
    cached.backward()
    assert cached.item() == pytest.approx(value.item(), rel=1e-12)
    torch.testing.assert_close(encoder.weight.grad, plain, rtol=1e-9, atol=1e-12)


def test_with_a_memory():
    memory = CrossBatchMemory(4, 6)
    memory.push(draw(4, 6, seed=5).float())
    loss = MatryoshkaLoss(InfoNCELoss(symmetric=False), [3, 6])
    value = loss(A.float(), B.float(), negatives=memory.rows())
    assert value.isfinite()


def test_as_sentence_transformers_has_it():
    pytest.importorskip("sentence_transformers")
    plain = InfoNCELoss(temperature=1 / 20, symmetric=False)
    similar = torch.nn.functional.cosine_similarity
    total = 0.0
    for length in (2, 4, 6):  # what its MatryoshkaLoss does with MultipleNegativesRankingLoss
        a, b = (torch.nn.functional.normalize(x[:, :length], dim=-1) for x in (A, B))
        scores = torch.stack([similar(row[None], b) for row in a]) * 20
        total += torch.nn.functional.cross_entropy(scores, torch.arange(8))
    assert MatryoshkaLoss(plain, [2, 4, 6])(A, B).item() == pytest.approx(total.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": []}, "empty"),
        ({"dims": [4, 4]}, "twice"),
        ({"dims": [0]}, "dims"),
        ({"dims": [2], "weights": [1.0, 2.0]}, "one for each length"),
        ({"dims": [2], "embeddings": ["c"]}, "takes a, b"),
        ({"dims": [2], "loss": "InfoNCE"}, "loss is a str"),
        ({"dims": [2], "loss": torch.nn.Linear(2, 2)}, "name those that are embeddings"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(NearfarError, match=message):
        MatryoshkaLoss(**({"loss": InfoNCELoss()} | arguments))


def test_a_length_beyond_the_embeddings():
    with pytest.raises(NearfarError, match="lengths up to 6"):
        MatryoshkaLoss(InfoNCELoss(), [4, 8])(A, B)
