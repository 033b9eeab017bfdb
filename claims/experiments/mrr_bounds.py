"""Can a stated MRR belong to the stated shares of hits?

Hits at two cut-offs say how many queries have rank 1, a rank up to k, and a rank beyond. MRR is smallest when each of
them has the last rank of its range, and largest when it has the first.
"""

from __future__ import annotations

from nearfar.errors import NearfarError

QUANTITIES = {
    "lowest": "smallest MRR these hits allow",
    "highest": "largest MRR these hits allow",
    "from_lowest": "stated MRR minus the smallest",
    "to_highest": "largest minus stated MRR",
}


def run(*, mrr: float, hits_1: float, hits_k: float, k: int, gallery: int) -> dict[str, float]:
    """Shares between 0 and 1; ``k`` is the larger cut-off.

    >>> bounds = run(mrr=0.372, hits_1=0.224, hits_k=0.686, k=10, gallery=33010)
    >>> round(bounds["lowest"], 3), round(bounds["highest"], 3)
    (0.27, 0.484)
    """
    if not 0.0 <= hits_1 <= hits_k <= 1.0 or not 2 <= k < gallery:
        raise NearfarError(
            f"hits {hits_1} at 1 and {hits_k} at {k} of {gallery} are no hits: shares do not fall, and 1 < k < gallery"
        )
    middle, beyond = hits_k - hits_1, 1.0 - hits_k
    lowest = hits_1 + middle / k + beyond / gallery
    highest = hits_1 + middle / 2 + beyond / (k + 1)
    return {"lowest": lowest, "highest": highest, "from_lowest": mrr - lowest, "to_highest": highest - mrr}
