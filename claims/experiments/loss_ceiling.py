"""Where does a stated InfoNCE loss stand beside the loss of guessing?

A model that gives all candidates the same score has ln(candidates). A model that learns is below that; one that has not
begun is at it.
"""

from __future__ import annotations

import math

import torch

from nearfar.losses import InfoNCELoss

QUANTITIES = {
    "guessing": "loss of a model that gives all candidates the same score, nats",
    "above": "stated loss minus that, nats",
    "candidates": "number of candidates for which the stated loss is that of guessing",
}


def run(*, loss: float, batch_size: int) -> dict[str, float]:
    """``loss`` as it was stated for batches of ``batch_size`` pairs.

    >>> {name: round(value, 2) for name, value in run(loss=4.125, batch_size=32).items()}
    {'guessing': 3.47, 'above': 0.66, 'candidates': 61.87}
    """
    guessing = InfoNCELoss()(torch.ones(batch_size, 4), torch.ones(batch_size, 4)).item()
    return {"guessing": guessing, "above": loss - guessing, "candidates": math.exp(loss)}
