"""Distillation and margins against loops in float64, and against sentence-transformers where the loss is the same."""

from __future__ import annotations

import math

import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.functional import distillation, margin_mse
from nearfar.losses import DistillationLoss, MarginMSELoss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ Q (log Q − log P) of one row; scores are divided by their temperatures already."""
    q = teacher.exp() / teacher.exp().sum()
    p = student.exp() / student.exp().sum()
    return torch.stack([q[j] * (q[j].log() - p[j].log()) for j in range(len(q)) if q[j] > 0]).sum()


def loop(a, b, teacher, scale, theirs, symmetric=True, normalize=True):
    student = (unit(a) @ unit(b).T if normalize else a @ b.T) * scale
    rows = [kl(student[i], teacher[i] / theirs) for i in range(len(a))]
    value = torch.stack(rows).mean()
    if not symmetric:
        return value
    columns = [kl(student[:, j], teacher[:, j] / theirs) for j in range(len(b))]
    return (value + torch.stack(columns).mean()) / 2


@pytest.mark.slow
@pytest.mark.parametrize("n", [7, 1100])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_value_and_gradient_equal_the_loop(n, vectors, symmetric):
    leaves = [draw(n, 5), draw(n, 5, seed=1), torch.tensor(3.0, dtype=torch.float64)]
    a, b, scale = (x.requires_grad_() for x in leaves)
    u, v = draw(n, 3, seed=2), draw(n, 3, seed=3)
    scores = unit(u) @ unit(v).T
    teacher = (u, v) if vectors else scores
    value = distillation(a, b, teacher, scale=scale, teacher_temperature=0.2, symmetric=symmetric)
    student = (unit(a) @ unit(b).T) * scale
    if n < 100:
        expected = loop(a, b, scores, scale, 0.2, symmetric)
    else:  # by matrices: loops over a million pairs take minutes

        def one(s, t):
            return torch.nn.functional.kl_div(s.log_softmax(1), (t / 0.2).softmax(1), reduction="batchmean")

        expected = one(student, scores)
        expected = (expected + one(student.T, scores.T)) / 2 if symmetric else expected
    assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    ours, theirs = torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    for one_, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one_, other, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.002])
def test_temperatures_in_float32(temperature):
    a, b, u, v = (draw(12, 6, seed=seed).float() for seed in range(4))
    a.requires_grad_()
    value = distillation(a, b, (u, v), temperature=temperature)
    value.backward()
    exact = distillation(a.detach().double(), b.double(), (u.double(), v.double()), temperature=temperature)
    assert value.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-5)
    assert a.grad.isfinite().all()


@pytest.mark.slow
def test_gradcheck_and_parts():
    a, b, scale = draw(5, 3), draw(5, 3, seed=1), torch.tensor(2.0, dtype=torch.float64)
    teacher = draw(5, 5, seed=2)
    inputs = tuple(x.requires_grad_() for x in (a, b, scale))
    assert torch.autograd.gradcheck(lambda x, y, s: distillation(x, y, teacher, scale=s), inputs)
    whole = distillation(a, b, teacher)
    parts = [distillation(a, b, teacher, rows=slice(k, k + 2)) for k in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-10)
    mined = draw(5, 4, 3, seed=4).requires_grad_()
    scores = draw(5, 4, seed=5)
    assert torch.autograd.gradcheck(lambda x, c: distillation(x, c, scores, temperature=0.5), (a, mined))
    whole = distillation(a, mined, scores)
    parts = [distillation(a, mined, scores, rows=slice(k, k + 2)) for k in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-10)


def test_listed_candidates_equal_the_loop():
    a, mined, scores = draw(6, 4), draw(6, 3, 4, seed=1), draw(6, 3, seed=2)
    scores[2, 1] = -torch.inf  # no candidate of the teacher
    value = distillation(a, mined, scores, temperature=0.5, teacher_temperature=2.0)
    rows = [kl((unit(mined[i]) @ unit(a[i])) / 0.5, scores[i] / 2.0) for i in range(6)]
    assert value.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-10)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    a, b = draw(6, 4).requires_grad_(), draw(6, 4, seed=1)
    loss = DistillationLoss(temperature=0.3)
    loss(a, b, (a.detach(), b)).backward()
    assert a.grad.abs().max() < 1e-12
    record = loss.record
    assert record.p_positive < 1
    assert (record.candidates, record.positives_per_row) == (6, 6)
    scores = unit(a.detach()) @ unit(b).T / 0.3
    q = [scores.softmax(1), scores.T.softmax(1)]
    entropy = sum(-(x * x.log()).sum(1).mean() for x in q) / 2
    assert record.floor == pytest.approx(entropy.item(), rel=1e-9)
    assert record.to_dict()["positives_by"] == "weights"


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_margins_equal_the_loop(k):
    a, b, negatives, margins = draw(6, 4), draw(6, 4, seed=1), draw(6, k, 4, seed=2), draw(6, k, seed=3)
    for x in (a, b, negatives):
        x.requires_grad_()
    if k > 1:
        margins[1, 2] = torch.nan
    value = margin_mse(a, b, negatives, margins, scale=4.0)
    errors = []
    for i in range(6):
        for j in range(k):
            if not math.isnan(margins[i, j]):
                gap = 4.0 * (unit(a[i]) @ unit(b[i]) - unit(a[i]) @ unit(negatives[i, j]))
                errors.append((gap - margins[i, j]) ** 2)
    assert value.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-10)
    assert torch.autograd.gradcheck(lambda x, y, z: margin_mse(x, y, z, margins), (a, b, negatives))
    parts = [MarginMSELoss(4.0)(a, b, negatives, margins, rows=slice(j, j + 4)) for j in (0, 4)]
    assert sum(parts).item() == pytest.approx(value.item(), rel=1e-10)


def test_as_sentence_transformers_has_them():
    pytest.importorskip("sentence_transformers")
    try:
        from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
        from sentence_transformers.sentence_transformer.losses import MarginMSELoss as Theirs
    except ImportError:
        from sentence_transformers.losses import DistillKLDivLoss
        from sentence_transformers.losses import MarginMSELoss as Theirs
    query, positive, one, two = (draw(5, 4, seed=seed).float() for seed in range(4))
    scores = draw(5, 3, seed=9).float()
    theirs = DistillKLDivLoss(model=None, temperature=2.0)
    value = theirs.compute_loss_from_embeddings([query, positive, one, two], scores)
    candidates = torch.stack([positive, one, two], 1)
    ours = distillation(query, candidates, scores, temperature=2.0, normalize=False)
    assert 2.0**2 * ours.item() == pytest.approx(value.item(), rel=1e-5)
    margins = draw(5, 2, seed=8).float()
    wanted = Theirs(model=None).compute_loss_from_embeddings([query, positive, one, two], margins)
    found = MarginMSELoss(normalize=False)(query, positive, torch.stack([one, two], 1), margins)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": draw(4, 3)}, "of all rows and keys"),
        ({"teacher": (draw(4, 3), draw(3, 3))}, "vectors of keys"),
        ({"teacher": (draw(4, 3),)}, "1 parts"),
        ({"teacher": torch.full((4, 4), torch.nan)}, "not a number"),
        ({"teacher": torch.full((4, 4), -torch.inf)}, "no candidate"),
        ({"b": draw(6, 3), "teacher": draw(4, 6)}, "symmetric=False"),
        ({"b": draw(4, 2, 3), "teacher": draw(4, 3)}, "scores are"),
        ({"teacher": "teacher"}, "teacher is a str"),
        ({"teacher_temperature": 0.0}, "above 0"),
    ],
)
def test_wrong_input(arguments, message):
    given = {"a": draw(4, 3), "b": draw(4, 3, seed=1), "teacher": draw(4, 4)} | arguments
    with pytest.raises(NearfarError, match=message):
        distillation(**given)


def test_wrong_margins():
    with pytest.raises(NearfarError, match="are needed"):
        margin_mse(draw(4, 3), draw(4, 3), draw(4, 2, 3), draw(4, 3))
    with pytest.raises(NearfarError, match="row i of both"):
        margin_mse(draw(4, 3), draw(5, 3), draw(4, 2, 3), draw(4, 2))
