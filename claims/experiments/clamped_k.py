"""What does recall at k say where k is clamped to the size of the batch?"""

from __future__ import annotations

import torch

from nearfar.metrics import RecallAtK

QUANTITIES = {
    "recall_of_worst": "recall of a model that puts every partner last",
    "trivial": "1 where nearfar marks the number as trivial",
}


def run(*, k: int = 10, batch_size: int = 8) -> dict[str, float]:
    """Recall of the worst possible scores: each row's own partner has the lowest.

    >>> run(k=1)["recall_of_worst"], run(k=10)["recall_of_worst"]
    (0.0, 1.0)
    """
    worst = RecallAtK(k).estimate(-torch.eye(batch_size))
    return {"recall_of_worst": worst.value, "trivial": float(worst.trivial)}
