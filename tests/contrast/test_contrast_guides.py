"""Masks and weights of negatives by a guide, against loops over pairs."""

from __future__ import annotations

import math

import pytest
import torch

from nearfar.contrast import DuplicateMask, GuideMask, NegativeWeights
from nearfar.errors import NearfarError
from nearfar.functional import info_nce, siglip, supcon
from nearfar.losses import InfoNCELoss, NoNegativesWarning


def rows(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(*sizes, generator=generator, dtype=torch.float64)
    return [first, 0.7 * first + torch.randn(*sizes, generator=generator, dtype=torch.float64)]


def cosine(x, y):
    return sum(p * q for p, q in zip(x, y, strict=True)) / math.sqrt(
        sum(p * p for p in x) * sum(q * q for q in y)
    )


def guide_weights(queries, keys, margin, kind, softness):
    """w[i][j]: how much key j counts as a negative of query i; one pair after the other."""
    table = []
    for i, query in enumerate(queries):
        own = cosine(query, keys[i])
        threshold = own - (margin * abs(own) if kind == "relative" else margin)
        scores = [cosine(query, key) for key in keys]
        if softness:
            table.append([1 / (1 + math.exp((score - threshold) / softness)) for score in scores])
        else:
            table.append([float(score < threshold) for score in scores])
    return table


def loop(a, b, temperature, weights, back=None):
    """The mean loss of queries a and, with ``back``, that of b averaged with it; ``weights[i][j]`` of negatives."""

    def direction(queries, keys, table):
        total = 0.0
        for i, query in enumerate(queries):
            own = math.exp(cosine(query, keys[i]) / temperature)
            rest = sum(
                table[i][j] * math.exp(cosine(query, key) / temperature)
                for j, key in enumerate(keys)
                if j != i
            )
            total += math.log((own + rest) / own)
        return total / len(queries)

    one = direction(a, b, weights)
    return one if back is None else (one + direction(b, a, back)) / 2


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("margin", "softness"), [(0.0, 0.0), (0.2, 0.0), (-0.1, 0.0), (0.1, 0.05), (0.0, 1.0)]
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tile", [None, (3, 4)])
def test_guide_equals_the_loop(kind, margin, softness, symmetric, tile):
    a, b = rows(9, 5)
    u, v = rows(9, 3, seed=3)
    v[4] = -u[4]  # a positive that the guide scores below 0
    mask = GuideMask(u, v, margin, kind, softness)
    forth = guide_weights(u.tolist(), v.tolist(), margin, kind, softness)
    back = guide_weights(v.tolist(), u.tolist(), margin, kind, softness) if symmetric else None
    value = info_nce(a, b, temperature=0.3, symmetric=symmetric, mask=mask, tile=tile)
    assert value.item() == pytest.approx(loop(a.tolist(), b.tolist(), 0.3, forth, back), rel=1e-6)


def test_record_counts_what_is_left_out():
    a, b = rows(9, 5)
    u, v = rows(9, 3, seed=3)
    for softness in (0.0, 0.1):
        loss = InfoNCELoss(temperature=0.3)
        loss(a, b, mask=GuideMask(u, v, 0.1, softness=softness))
        tables = [
            guide_weights(*pair, 0.1, "absolute", softness)
            for pair in ((u.tolist(), v.tolist()), (v.tolist(), u.tolist()))
        ]
        kept = [
            sum(w for j, w in enumerate(row) if j != i) for table in tables for i, row in enumerate(table)
        ]
        record = loss.record
        assert record.masked_per_row == pytest.approx(8 - sum(kept) / len(kept), rel=1e-5)
        assert record.candidates == pytest.approx(1 + sum(kept) / len(kept), rel=1e-5)
        assert record.uniform_level == pytest.approx(sum(math.log1p(w) for w in kept) / len(kept), rel=1e-5)
    loss(a, b)
    assert loss.record.masked_per_row == 0
    loss(a, b, mask=DuplicateMask(torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])))
    assert loss.record.masked_per_row == pytest.approx(2 / 9)


def test_relative_margin_leaves_out_more_than_none_also_below_zero():
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    v = torch.tensor([[-0.6, 0.8], [-0.65, 0.76]])  # of query 0 the own answer is at -.6, the other near -.65
    assert not GuideMask(u, v, 0.0, "relative").tile(slice(0, 1), slice(1, 2)).any()
    assert GuideMask(u, v, 0.2, "relative").tile(slice(0, 1), slice(1, 2)).all()


def test_soft_becomes_the_mask():
    u, v = rows(12, 4, seed=2)
    hard, soft = GuideMask(u, v, 0.05), GuideMask(u, v, 0.05, softness=1e-6)
    whole = slice(0, 12)
    difference = (hard.weights(whole, whole) - soft.weights(whole, whole)).abs()
    assert difference.fill_diagonal_(0).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients(symmetric):
    a, b = rows(5, 3)
    u, v = rows(5, 3, seed=3)
    scale = torch.tensor(3.0, dtype=torch.float64)
    inputs = tuple(x.requires_grad_() for x in (a, b, scale))
    for mask in (
        GuideMask(u, v, 0.1),
        GuideMask(u, v, 0.1, softness=0.2),
        NegativeWeights(torch.rand(5, 5, generator=torch.Generator().manual_seed(1))),
    ):
        for tile in (None, (2, 3)):

            def value(x, y, s, mask=mask, tile=tile):
                return info_nce(x, y, scale=s, mask=mask, symmetric=symmetric, tile=tile)

            assert torch.autograd.gradcheck(value, inputs)


def test_weights_of_both_directions():
    a, b = rows(6, 4)
    generator = torch.Generator().manual_seed(5)
    forth, back = (torch.rand(6, 6, generator=generator) for _ in range(2))
    forth[2, 3] = 0.0
    same = info_nce(a, b, temperature=0.4, mask=NegativeWeights(forth))
    assert same.item() == pytest.approx(
        loop(a.tolist(), b.tolist(), 0.4, forth.tolist(), forth.T.tolist()), rel=1e-6
    )
    apart = info_nce(a, b, temperature=0.4, mask=NegativeWeights(forth, back))
    assert apart.item() == pytest.approx(
        loop(a.tolist(), b.tolist(), 0.4, forth.tolist(), back.T.tolist()), rel=1e-6
    )
    joined = NegativeWeights(forth, back) | torch.eye(6, dtype=torch.bool).roll(1, 0)
    left = forth.clone()
    other = back.clone()
    for i in range(6):
        left[(i + 1) % 6, i] = other[(i + 1) % 6, i] = 0.0
    value = info_nce(a, b, temperature=0.4, mask=joined)
    assert value.item() == pytest.approx(
        loop(a.tolist(), b.tolist(), 0.4, left.tolist(), other.T.tolist()), rel=1e-6
    )


@pytest.mark.parametrize("softness", [0.0, 0.1])
def test_parts_add_up(softness):
    a, b = rows(10, 4)
    u, v = rows(10, 3, seed=3)
    for mask in (
        GuideMask(u, v, 0.1, softness=softness),
        GuideMask(u, v, softness=softness) | DuplicateMask(torch.arange(10) // 2),
    ):
        whole = info_nce(a, b, mask=mask)
        parts = [info_nce(a, b, mask=mask, rows=slice(start, start + 4)) for start in range(0, 10, 4)]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_further_negatives_have_weights():
    a, b = rows(6, 4)
    u, v = rows(6, 3, seed=3)
    generator = torch.Generator().manual_seed(7)
    mined, theirs = (torch.randn(6, 2, d, generator=generator, dtype=torch.float64) for d in (4, 3))
    mask = GuideMask(u, v, 0.1, softness=0.2)
    own = mask.beyond(theirs)
    value = info_nce(a, b, temperature=0.4, symmetric=False, mask=mask, negatives=mined, negatives_mask=own)
    table, total = guide_weights(u.tolist(), v.tolist(), 0.1, "absolute", 0.2), 0.0
    for i in range(6):
        threshold = cosine(u[i].tolist(), v[i].tolist()) - 0.1
        score = [cosine(a[i].tolist(), key.tolist()) / 0.4 for key in b]
        rest = sum(table[i][j] * math.exp(score[j]) for j in range(6) if j != i)
        for k in range(2):
            weight = 1 / (1 + math.exp((cosine(u[i].tolist(), theirs[i, k].tolist()) - threshold) / 0.2))
            rest += weight * math.exp(cosine(a[i].tolist(), mined[i, k].tolist()) / 0.4)
        total += math.log1p(rest / math.exp(score[i]))
    assert value.item() == pytest.approx(total / 6, rel=1e-6)


def test_everything_left_out():
    a, b = rows(4, 3)
    for mask in (NegativeWeights(torch.zeros(4, 4)), GuideMask(a, b, 5.0)):
        a.requires_grad_()
        loss = InfoNCELoss()
        with pytest.warns(NoNegativesWarning):
            value = loss(a, b, mask=mask)
        value.backward()
        assert value.item() == 0
        assert (a.grad == 0).all()
        assert (loss.record.rows_without_negatives, loss.record.masked_per_row) == (4, 3)
        a = a.detach()


def test_tiny_weights_and_small_temperature_stay_finite():
    a, b = (x.float().requires_grad_() for x in rows(8, 4))
    value = info_nce(a, b, temperature=0.001, mask=NegativeWeights(torch.full((8, 8), 1e-35)))
    value.backward()
    assert value.isfinite()
    assert a.grad.isfinite().all()
    value = info_nce(a, b, temperature=1.0, mask=NegativeWeights(torch.full((8, 8), 1e-35)))
    value.backward()
    assert 0 <= value.item() < 1e-30
    assert a.grad.isfinite().all()


def test_bad_input():
    a, b = rows(4, 3)
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(NearfarError, match="numbers from 0"):
        NegativeWeights(torch.full((2, 2), 1.5))
    with pytest.raises(NearfarError, match="one shape"):
        NegativeWeights(torch.ones(2, 2), torch.ones(2, 3))
    with pytest.raises(NearfarError, match="row i of both is a pair"):
        GuideMask(a, b[:2])
    with pytest.raises(NearfarError, match="kind"):
        GuideMask(a, b, kind="percent")
    with pytest.raises(NearfarError, match="pairs"):
        info_nce(a, b, mask=GuideMask(a[:3], b[:3]))
    with pytest.raises(NearfarError, match="one positive for each query"):
        supcon(a, labels, mask=GuideMask(a, softness=0.1))
    assert supcon(a, labels, mask=GuideMask(a, margin=0.1)).isfinite()
    with pytest.raises(NearfarError, match="sigmoid"):
        siglip(a, b, 1.0, 0.0, mask=GuideMask(a, b))
    with pytest.raises(NearfarError, match="no pair of their own"):
        GuideMask(a[:2], b).transposed()
