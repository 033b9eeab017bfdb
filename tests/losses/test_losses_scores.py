"""Contrast by score against loops: who is anchor and positive at every batch size, value, gradients, record."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracles
from combinations import combined
from nearfar.errors import NearfarError
from nearfar.functional import adaptive_score_contrastive, bidirectional_score_contrastive
from nearfar.losses import AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss
from nearfar.losses.score_contrastive import split_scores

N = 11
SCORES = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.2, 0.95, 0.3, 0.6, 0.05, 0.8, 0.4])


def draw(n: int = N, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    found = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found.to(dtype).requires_grad_()


@pytest.mark.parametrize("options", [
    {}, {"top": 0.2, "bottom": 0.5}, {"top": 0.5, "bottom": 0.5}, {"top": 0.9, "bottom": 0.9}, {"least": 1},
    {"least": 3, "top": 0.1}, {"top": 0.3, "bottom": 0.7}, {"top": 1.0, "bottom": 1.0}, {"threshold": 0.5},
    {"threshold": 0.0}, {"threshold": 2.0}, {"threshold": -3.0, "least": 1},
])  # fmt: skip
def test_who_is_anchor_and_who_is_positive_at_every_size(options):
    names = {
        "top": "top_fraction",
        "bottom": "bottom_fraction",
        "least": "min_samples",
        "threshold": "threshold",
    }
    for n in range(60):
        scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
        found = split_scores(scores, **{names[key]: value for key, value in options.items()})
        assert [part.tolist() for part in found] == [*map(list, oracles.split(scores, **options))]
        parts = torch.cat(list(found)).sort().values
        assert parts.tolist() == list(range(n))
        if len(found.anchors) and "threshold" not in options:
            assert scores[found.anchors].max() <= scores[found.positives].min()


def test_ties_are_broken_by_position_and_sevens_have_a_middle():
    assert split_scores(torch.zeros(5)).anchors.tolist() == [0, 1]
    assert split_scores(torch.zeros(5)).positives.tolist() == [3, 4]
    seven = split_scores(torch.arange(7.0))
    assert (len(seven.anchors), len(seven.middle), len(seven.positives)) == (2, 3, 2)
    assert len(split_scores(torch.arange(3.0)).anchors) == 0
    overlap = split_scores(torch.arange(5.0), top_fraction=0.6, bottom_fraction=0.6)
    assert (len(overlap.positives), len(overlap.anchors)) == (2, 3)  # n // 2 and n - n // 2


@pytest.mark.slow
@combined(
    2,
    temperature=[5.0, 0.5, 0.07, 0.01, 0.001],
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    middle=["ignore", "negatives"],
    detach=[False, True],
)
def test_equals_the_loop(temperature, dtype, middle, detach):
    z = draw(dtype=dtype)
    (u,) = oracles.double(z)
    scale = 1 / temperature
    single = 1e-5 + 2e-6 * scale
    slack = {
        torch.float64: 1e-9,
        torch.float32: single,
        torch.bfloat16: 1e-2 + single,
        torch.float16: 2e-3 + single,
    }
    options = {"temperature": temperature, "middle": middle, "detach_positives": detach}
    for more, rule in (
        ({}, {}),
        ({"threshold": 0.55}, {"threshold": 0.55}),
        ({"top_fraction": 0.2}, {"top": 0.2}),
    ):
        value = adaptive_score_contrastive(z, SCORES, **options, **more)
        exact, _ = oracles.score_contrastive(u, SCORES, scale, (1.0, 0.0), middle, detach, **rule)
        oracles.agree(value, (z,), exact, (u,), slack[dtype], floor=1e-3 * scale)
        for weights in ((1.0, 0.3), (0.5, 2.0), (0.0, 1.0)):
            value = bidirectional_score_contrastive(
                z, SCORES, anchor_weight=weights[0], positive_weight=weights[1], **options, **more
            )
            exact, _ = oracles.score_contrastive(u, SCORES, scale, weights, middle, detach, **rule)
            oracles.agree(value, (z,), exact, (u,), slack[dtype], floor=1e-3 * scale)


@pytest.mark.parametrize("middle", ["ignore", "negatives"])
def test_gradients_by_differences(middle):
    z = draw()
    assert torch.autograd.gradcheck(
        lambda z: bidirectional_score_contrastive(z, SCORES, temperature=0.5, middle=middle),
        z,
        fast_mode=True,
    )


@pytest.mark.parametrize("n", [4, 5, 7, 8, 23])
def test_every_batch_size(n):
    z = draw(n)
    scores = torch.rand(n, generator=torch.Generator().manual_seed(n))
    for middle in ("ignore", "negatives"):
        exact, _ = oracles.score_contrastive(z, scores, 10.0, (1.0, 0.3), middle)
        value = bidirectional_score_contrastive(z, scores, middle=middle)
        oracles.agree(value, (z,), exact, (z,), 1e-10)


def test_who_gets_a_gradient():
    z = draw()
    split = split_scores(SCORES)
    moved = lambda value: (torch.autograd.grad(value, z)[0] != 0).any(1).nonzero().flatten().tolist()  # noqa: E731
    everybody = sorted([*split.anchors.tolist(), *split.positives.tolist()])
    assert moved(adaptive_score_contrastive(z, SCORES)) == everybody
    assert moved(adaptive_score_contrastive(z, SCORES, detach_positives=True)) == sorted(
        split.anchors.tolist()
    )
    assert moved(adaptive_score_contrastive(z, SCORES, middle="negatives")) == list(range(N))
    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.grad(adaptive_score_contrastive(z, scores), scores, allow_unused=True) == (None,)


def test_scores_of_any_kind_and_order():
    z = draw()
    plain = adaptive_score_contrastive(z, SCORES)
    for scores in (
        SCORES.double(),
        SCORES.half(),
        SCORES * 100 - 7,
        (SCORES * 100).long(),
        SCORES.requires_grad_(),
    ):
        assert adaptive_score_contrastive(z, scores).item() == plain.item()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    plain = bidirectional_score_contrastive(z, SCORES)
    oracles.agree(bidirectional_score_contrastive(z[order], SCORES[order]), (z,), plain, (z,), 1e-9)


@pytest.mark.parametrize("middle", ["ignore", "negatives"])
@pytest.mark.parametrize("kind", [AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss])
def test_record_by_loops(kind, middle):
    z = draw()
    loss = kind(temperature=0.2, middle=middle)
    assert loss.record is None
    loss(z, SCORES)
    _, directions = oracles.score_contrastive(z, SCORES, 5.0, middle=middle)
    found = loss.record.numbers()
    anchors, positives, between = oracles.split(SCORES)
    mean = lambda rows: sum(SCORES[rows].tolist()) / len(rows)  # noqa: E731
    assert found.pop("anchors") == len(anchors) == 4
    assert found.pop("positives") == len(positives)
    assert found.pop("scores_missing") == 0
    assert found.pop("middle_share") == pytest.approx(len(between) / N)
    assert found.pop("score_gap") == pytest.approx(mean(positives) - mean(anchors), rel=1e-5)
    assert found == pytest.approx(oracles.record(directions, 5.0), rel=1e-6)


def test_guessing_and_the_floor():
    loss = AdaptiveScoreContrastiveLoss(temperature=0.01)
    value = loss(torch.ones(10, 2), torch.arange(10.0))
    assert value.item() == pytest.approx(math.log(7 / 4), rel=1e-5)
    assert loss.record.uniform_level == pytest.approx(math.log(7 / 4), rel=1e-5)
    assert loss.record.floor == 0.0
    # Anchors on the positives' side, far from each other: as good as it gets.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert loss(z, torch.tensor([0.1, 0.2, 0.8, 0.9])).item() == pytest.approx(0.0, abs=1e-6)


def test_nobody_to_pull_is_said_and_teaches_nothing():
    z = (draw(6, torch.float32).detach() * 1e38).requires_grad_()
    for loss, scores in (
        (AdaptiveScoreContrastiveLoss(threshold=0.5, normalize=False), torch.linspace(0.91, 0.99, 6)),
        (BidirectionalScoreContrastiveLoss(min_samples=4, normalize=False), torch.linspace(0, 1, 6)),
    ):
        value = loss(z, scores)
        assert value.item() == 0.0
        assert (torch.autograd.grad(value, z)[0] == 0).all()
        found = loss.record.numbers()
        assert (found["anchors"], found["positives"], found["score_gap"]) == (0.0, 0.0, 0.0)
        assert (found["rows_without_positives"], found["middle_share"], found["scale"]) == (6.0, 1.0, 10.0)
        assert found["finite"] is True
    loss = AdaptiveScoreContrastiveLoss(threshold=0.5)
    loss(draw(6), torch.linspace(0.0, 1.0, 6))
    assert loss.record.extra["anchors"] == 3.0
    loss(draw(6), torch.linspace(0.9, 1.0, 6))  # and the record is not that of the last good batch
    assert loss.record.extra["anchors"] == 0.0
    assert loss.record.candidates == 0.0


def test_a_hard_positive_keeps_its_gradient():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.05], [-1.0, 0.02], [-1.0, 0.0]], requires_grad=True)
    value = adaptive_score_contrastive(z, torch.arange(4.0), temperature=0.001)
    assert value.item() > 1000
    assert torch.autograd.grad(value, z)[0].norm(dim=1).min() > 1.0


def test_near_convergence_the_gradient_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    z = (rows + 0.1 * torch.randn(4, 3, generator=generator)).requires_grad_()
    (u,) = oracles.double(z)
    scores = torch.tensor([0.1, 0.2, 0.8, 0.9])
    exact, _ = oracles.score_contrastive(u, scores, 14.0)
    assert 1e-7 < exact.item() < 1e-4
    oracles.agree(
        adaptive_score_contrastive(z, scores, temperature=1 / 14.0), (z,), exact, (u,), 1e-4, floor=0.0
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: adaptive_score_contrastive(z, SCORES[:4]), "one for each"),
        (lambda z: adaptive_score_contrastive(z, SCORES[:, None]), "one for each"),
        (
            lambda z: adaptive_score_contrastive(z, SCORES.index_fill(0, torch.tensor([3, 6]), math.inf)),
            "row 3, 6",
        ),
        (lambda z: adaptive_score_contrastive(z, SCORES.index_fill(0, torch.tensor([3]), math.inf)), "row 3"),
        (lambda z: adaptive_score_contrastive(z, SCORES, temperature=0.0), "above 0"),
        (lambda z: adaptive_score_contrastive(z, SCORES, top_fraction=40.0), "share of the batch"),
        (lambda z: adaptive_score_contrastive(z, SCORES, bottom_fraction=0.0), "share of the batch"),
        (lambda z: adaptive_score_contrastive(z, SCORES, min_samples=0), "1 or more"),
        (lambda z: adaptive_score_contrastive(z, SCORES, middle="margin"), "'ignore' or 'negatives'"),
        (lambda z: adaptive_score_contrastive(z[:0], SCORES[:0]), "no rows"),
        (lambda z: AdaptiveScoreContrastiveLoss(middle="margin"), "'ignore' or 'negatives'"),
        (lambda z: AdaptiveScoreContrastiveLoss(temperature=-1.0), "above 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(NearfarError, match=message):
        call(draw())


def test_options_by_position_keep_their_order():
    one = AdaptiveScoreContrastiveLoss(0.2, 0.3, 0.3, 1, "negatives", True, None, False)
    assert (one.threshold, one.normalize) == (None, False)
    two = BidirectionalScoreContrastiveLoss(0.2, 0.3, 0.3, 1, "negatives", True, 0.5, 2.0, 0.1, False)
    assert (two.threshold, two.anchor_weight, two.positive_weight, two.normalize) == (0.5, 2.0, 0.1, False)
    with pytest.raises(NearfarError, match="positive_weight"):
        BidirectionalScoreContrastiveLoss(positive_weight=-1.0)


@pytest.mark.parametrize("kind", [AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss])
def test_earlier_names_of_the_fractions_are_accepted_with_a_warning(kind):
    with pytest.warns(DeprecationWarning, match="'top_k_percent' is now called 'top_fraction'"):
        assert kind(top_k_percent=0.2).top_fraction == 0.2
    with pytest.warns(DeprecationWarning, match="'bottom_k_percent' is now called 'bottom_fraction'"):
        assert kind(bottom_k_percent=0.3).bottom_fraction == 0.3
    with pytest.raises(NearfarError, match="top_fraction is given twice"):
        kind(top_fraction=0.2, top_k_percent=0.2)


def test_functions_accept_the_earlier_names_with_a_warning():
    z = torch.eye(7)
    scores = torch.linspace(0, 1, 7)
    for function in (adaptive_score_contrastive, bidirectional_score_contrastive):
        with pytest.warns(DeprecationWarning, match="is now called"):
            value = function(z, scores, top_k_percent=0.3, bottom_k_percent=0.6)
        assert value == function(z, scores, top_fraction=0.3, bottom_fraction=0.6)
        assert value != function(z, scores)
    with pytest.warns(DeprecationWarning, match="is now called"):
        split = split_scores(scores, top_k_percent=0.15, min_samples=1)
    assert split.positives.tolist() == [6]
