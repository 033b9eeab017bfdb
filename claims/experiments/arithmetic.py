"""Does a stated number follow from the numbers it is made of?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nearfar.errors import NearfarError

QUANTITIES = {
    "computed": "the number as it comes out",
    "distance": "its distance from the stated one, in units of the last stated digit",
}


def run(
    *,
    stated: float,
    digit: float,
    total: Sequence[Sequence[float]] = (),
    ratio: Sequence[float] = (),
    change: Sequence[float] = (),
) -> dict[str, float]:
    """One of ``total`` (products that are added up), ``ratio`` (a over b) and ``change`` (from a to b, a share of a).

    ``digit`` is what one unit of the last stated digit is worth. Rounding and cutting off both stay below one unit.

    >>> round(run(stated=0.4066, digit=0.0001, total=[[0.3, 0.0764], [0.7, 0.5482]])["distance"], 2)
    0.6
    """
    if sum(map(bool, (total, ratio, change))) != 1:
        raise NearfarError("arithmetic takes one of total, ratio and change")
    if total:
        computed = math.fsum(math.prod(term) for term in total)
    elif ratio:
        computed = ratio[0] / ratio[1]
    else:
        computed = change[1] / change[0] - 1
    return {"computed": computed, "distance": abs(computed - stated) / digit}
