"""Is a focal loss above cross-entropy a sign of "more signal", and whose gradient is it?

Generated predictions for three classes, most of them easy, as after some training. Value and gradient of both losses at
the same predictions: the value can only fall, and what changes is whose gradient is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import one_hot

from nearfar.losses import FocalLoss

QUANTITIES = {
    "cross_entropy": "value of cross-entropy",
    "focal": "value of the focal loss at the same predictions",
    "focal_minus_ce": "the latter minus the former",
    "focal_alpha_minus_ce": "the same with class weights in both, each divided by their sum",
    "hardest_ce": "share of the gradient from the tenth of the labels with the lowest probability, cross-entropy",
    "hardest_focal": "the same, focal loss",
    "gradient_ratio": "length of the focal gradient over that of cross-entropy",
}


def run(
    seed: int,
    *,
    labels: int = 4000,
    classes: int = 3,
    margin: float = 5.0,
    wrong: float = 2.0,
    frequent: float = 0.887,
    gamma: float = 2.0,
    alpha: Sequence[float] = (1.0, 2.0, 0.5),
) -> dict[str, float]:
    """Draw logits whose true class leads by ``margin`` ± ``wrong``; ``frequent`` is the share of the last class."""
    g = torch.Generator().manual_seed(seed)
    rare = torch.randint(classes - 1, (labels,), generator=g)
    often = torch.rand(labels, generator=g) < frequent
    label = torch.where(often, classes - 1, rare)
    lead = margin + wrong * torch.randn(labels, 1, generator=g)
    logits = 0.5 * torch.randn(labels, classes, generator=g) + lead * one_hot(label, classes)
    logits.requires_grad_(True)
    value, share, length = {}, {}, {}
    for name, loss in {
        "ce": FocalLoss(0.0),
        "focal": FocalLoss(gamma),
        "ce_alpha": FocalLoss(0.0, list(alpha)),
        "focal_alpha": FocalLoss(gamma, list(alpha)),
    }.items():
        loss_value = loss(logits, label)
        (gradient,) = torch.autograd.grad(loss_value, logits)
        assert loss.record is not None
        value[name], share[name] = loss_value.item(), loss.record.hardest_share
        length[name] = float(gradient.norm())
    return {
        "cross_entropy": value["ce"],
        "focal": value["focal"],
        "focal_minus_ce": value["focal"] - value["ce"],
        "focal_alpha_minus_ce": value["focal_alpha"] - value["ce_alpha"],
        "hardest_ce": share["ce"],
        "hardest_focal": share["focal"],
        "gradient_ratio": length["focal"] / length["ce"],
    }
