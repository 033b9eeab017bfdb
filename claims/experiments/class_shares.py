"""What do the sizes of the classes alone say about a batch?"""

from __future__ import annotations

from collections.abc import Sequence

QUANTITIES = {
    "majority": "share of the largest class: the accuracy of always guessing it",
    "same_class": "expected share of an anchor's negatives that are of its own class, random batches",
    "same_class_negatives": "the same as a number of negatives",
    "class_only": "exact-pair retrieval in the batch of an encoder that gives the class and nothing else",
    "chance": "exact-pair retrieval by chance",
}


def run(*, counts: Sequence[int], batch_size: int) -> dict[str, float]:
    """``counts`` of each class; batches are random samples.

    An encoder that knows the class alone picks one of its items in the batch, so that each class present contributes
    one expected hit: the mean number of classes present, over the batch size.

    >>> round(run(counts=[50, 50], batch_size=24)["class_only"], 4)
    0.0833
    """
    shares = [count / sum(counts) for count in counts]
    same = sum(share**2 for share in shares)
    present = sum(1 - (1 - share) ** batch_size for share in shares)
    return {
        "majority": max(shares),
        "same_class": same,
        "same_class_negatives": same * (batch_size - 1),
        "class_only": present / batch_size,
        "chance": 1 / batch_size,
    }
