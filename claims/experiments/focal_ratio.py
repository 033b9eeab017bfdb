"""How much more does a focal loss attend to a hard prediction than to an easy one?

Three answers that are easily taken for each other: the ratio of the modulating factors (1 − p)^γ, of the losses, and of
the gradients on the logits. Computed with ``FocalLoss`` itself for a hard and an easy prediction.
"""

from __future__ import annotations

import torch

from nearfar.losses import FocalLoss

QUANTITIES = {
    "factor_ratio": "ratio of the modulating factors, hard over easy",
    "loss_ratio": "ratio of the focal losses",
    "loss_ratio_ce": "ratio of the cross-entropies",
    "gradient_ratio": "ratio of the gradients, focal loss",
    "gradient_ratio_ce": "ratio of the gradients, cross-entropy",
    "gain": "gradient ratio of the focal loss over that of cross-entropy",
}


def run(
    *, hard: float = 0.60, easy: float = 0.95, gamma: float = 2.0, hard_alpha: float = 1.0, classes: int = 3
) -> dict[str, float]:
    """``hard`` and ``easy`` are the probabilities of the true class; ``hard_alpha`` weighs the hard one."""
    ratios = {}
    for name, g, alpha in (("focal", gamma, hard_alpha), ("ce", 0.0, 1.0)):
        loss = FocalLoss(g, reduction="none")
        values, gradients = [], []
        for p, weight in ((hard, alpha), (easy, 1.0)):
            # The other classes share 1 - p; logits are then logarithms of probabilities.
            logits = torch.full((1, classes), (1 - p) / (classes - 1), dtype=torch.double)
            logits[0, 0] = p
            logits = logits.log().requires_grad_(True)
            value = weight * loss(logits, torch.tensor([0]))[0]
            value.backward()
            assert logits.grad is not None
            values.append(value.item())
            gradients.append(float(logits.grad[0, 0].abs()))
        ratios[name] = values[0] / values[1], gradients[0] / gradients[1]
    return {
        "factor_ratio": hard_alpha * ((1 - hard) / (1 - easy)) ** gamma,
        "loss_ratio": ratios["focal"][0],
        "loss_ratio_ce": ratios["ce"][0],
        "gradient_ratio": ratios["focal"][1],
        "gradient_ratio_ce": ratios["ce"][1],
        "gain": ratios["focal"][1] / ratios["ce"][1],
    }
