"""What cannot be is refused before it becomes a number, with words that say what to pass."""

from __future__ import annotations

import pytest
import torch

from nearfar.contrast import OwnPair, softmax_loss
from nearfar.errors import NearfarError
from nearfar.losses import (
    AdaptiveScoreContrastiveLoss,
    BidirectionalScoreContrastiveLoss,
    ClipLoss,
    FocalLoss,
    InfoNCELoss,
    MultiLabelSupConLoss,
    NoPositivesWarning,
    Objective,
    SigLipLoss,
    SpatialLoss,
    SupConLoss,
    WassersteinGapLoss,
)

Z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
QUEUE = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
INDEX, ALPHA = torch.tensor([[1]] * 6), torch.ones(6, 1)
LEFT_OUT = torch.ones(6, 5, dtype=torch.bool)
NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InfoNCELoss()(Z, Z, negatives=(QUEUE, QUEUE), negatives_mask=LEFT_OUT), "pair of masks"),
        (lambda: InfoNCELoss()(Z, Z, negatives_mask=LEFT_OUT), "negatives were not given"),
        (lambda: InfoNCELoss()(Z, Z, negatives=(None, QUEUE), negatives_mask=(LEFT_OUT, None)), "has None"),
        (lambda: InfoNCELoss()(Z, Z, negatives=(QUEUE, QUEUE, QUEUE)), "3 parts"),
        (lambda: InfoNCELoss(temperature=torch.nn.Parameter(torch.tensor(0.1))), "log scale"),
        (lambda: SupConLoss(temperature=torch.nn.Parameter(torch.tensor(0.1))), "log scale"),
        (lambda: InfoNCELoss("0.1"), "a number is needed"),
        (lambda: InfoNCELoss(torch.ones(2)), "a number is needed"),
        (lambda: ClipLoss()(Z, Z, "x"), "a number is needed"),
        (lambda: ClipLoss(max_scale=100)(Z, Z, float("inf")), "scale is inf"),
        (lambda: ClipLoss(max_scale=100)(Z, Z, torch.tensor(float("inf"))), "scale is inf"),
        (lambda: InfoNCELoss()(Z.tolist(), Z), "pass a tensor"),
        (lambda: InfoNCELoss()(Z, Z.numpy()), "pass a tensor"),
        (lambda: SigLipLoss()(Z.tolist(), Z, 10.0), "pass a tensor"),
        (lambda: InfoNCELoss()(Z, Z, mask=[[True]]), "Boolean tensor"),
        (lambda: InfoNCELoss()(Z[:, :0], Z[:, :0]), "no dimension"),
        (lambda: InfoNCELoss()(Z, Z, rows=range(3)), "slice"),
        (lambda: SigLipLoss()(Z, Z, 10.0, rows=range(3)), "slice"),
        (lambda: SupConLoss()(Z, LABELS.tolist()), "pass a tensor"),
        (lambda: SupConLoss()(Z, LABELS, memory_labels=LABELS), "without memory"),
        (lambda: MultiLabelSupConLoss(sum="x"), "outside"),
        (lambda: MultiLabelSupConLoss(weights="legacy")(Z, LABELS[:, None][:, :0]), "at least one"),
        (lambda: SpatialLoss(temp_reg_weight=-1), "temp_reg_weight"),
        (lambda: SpatialLoss(temp_reg_weight=NAN), "temp_reg_weight"),
        (lambda: SpatialLoss(neighbor_alpha_scale=float("inf")), "neighbor_alpha_scale"),
        (lambda: SpatialLoss(neighbors="x"), "neighbors"),
        (lambda: SpatialLoss()(Z, Z, 10.0, INDEX > 0, ALPHA), "whole numbers"),
        (lambda: SpatialLoss()(Z, Z, 10.0, INDEX - 4, ALPHA), "-1 for none"),
        (lambda: AdaptiveScoreContrastiveLoss(threshold=NAN), "threshold"),
        (lambda: AdaptiveScoreContrastiveLoss(top_fraction=2), "top_fraction"),
        (lambda: AdaptiveScoreContrastiveLoss(min_samples=0), "min_samples"),
        (lambda: BidirectionalScoreContrastiveLoss(positive_weight=NAN), "positive_weight"),
    ],
)
def test_refused(call, message):
    with pytest.raises(NearfarError, match=message):
        call()


def test_a_failed_call_leaves_no_record():
    for loss, more in ((InfoNCELoss(), (Z,)), (AdaptiveScoreContrastiveLoss(), (Z[:, 0],))):
        loss(Z, *more)
        assert loss.record is not None
        with pytest.raises(NearfarError, match="not finite"):
            loss(Z * NAN, *more)
        assert loss.record is None


def test_failed_terms_leave_no_record_either():
    good, bad = torch.tensor(1.0), torch.tensor(NAN)
    focal, gap, objective = FocalLoss(), WassersteinGapLoss(), Objective({"a": 1.0})
    for module, ok, not_ok in (
        (focal, (Z, LABELS % 4), (Z * NAN, LABELS % 4)),
        (gap, (Z[:, 0], Z[:, 1]), (Z[:, 0] * NAN, Z[:, 1])),
        (objective, ({"a": good},), ({"a": bad},)),
    ):
        module(*ok)
        assert module.record is not None
        with pytest.raises(NearfarError):
            module(*not_ok)
        assert module.record is None


def test_parts_of_a_batch_without_positives_say_so_as_the_whole_does():
    for rows in (None, slice(0, 3)):
        with pytest.warns(NoPositivesWarning, match="no row of this batch"):
            assert SupConLoss()(Z, torch.arange(6), rows=rows).item() == 0.0


def test_both_directions_need_a_partner_for_each():
    with pytest.raises(NearfarError, match="each needs its partner"):
        softmax_loss(Z, torch.cat([Z, QUEUE]), torch.tensor(1.0), OwnPair(6, 11), both=True)


def test_each_direction_has_its_own_mask():
    loss = InfoNCELoss()
    plain = loss(Z, Z.flip(0))
    masked = loss(Z, Z.flip(0), negatives=[QUEUE, QUEUE], negatives_mask=[LEFT_OUT, LEFT_OUT])
    assert torch.allclose(masked, plain)


def test_weighted_targets_keep_double_precision():
    z = Z.double()
    labels = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(2))
    unit = torch.nn.functional.normalize(z)
    logits = unit @ unit.T / 0.1
    total = torch.zeros((), dtype=torch.float64)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        weight = torch.tensor(
            [
                sum(
                    (a == b) * (1 + (a != 0))
                    for a, b in zip(labels[i].tolist(), labels[j].tolist(), strict=True)
                )
                / 10
                + 0.1
                for j in others
            ],
            dtype=torch.float64,
        )
        total += torch.logsumexp(logits[i, others], 0) - torch.logsumexp(logits[i, others] + weight.log(), 0)
    assert MultiLabelSupConLoss(weights="legacy")(z, labels).item() == pytest.approx(
        (total / 6).item(), rel=1e-13
    )


def test_a_scale_at_its_clamp_keeps_its_gradient():
    """open_clip holds the log scale at ln(100); its exponential is 100.0000076 in float32."""
    log_scale = torch.tensor(4.605170185988092, requires_grad=True)
    assert log_scale.exp() > 100
    ClipLoss(max_scale=100)(Z, Z.roll(1, 0), log_scale.exp()).backward()
    assert log_scale.grad is not None
    assert log_scale.grad > 1
    beyond = torch.tensor(4.7, requires_grad=True)
    ClipLoss(max_scale=100)(Z, Z.roll(1, 0), beyond.exp()).backward()
    assert beyond.grad == 0
