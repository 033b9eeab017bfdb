"""How much of a gap is closed, and groups put in order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nearfar.metrics.detection import gap_closed, ordered
from tiny_detection import GROUPS, detections, evidence


# -- gap and verdict -----------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("faint", "clear", "sign"),
    [(0.4, 0.9, 0), (0.7, 0.9, 1), (0.4, 0.5, 0), (0.45, 0.95, 0), (0.1, 0.9, -1)],
    ids=["nothing", "the group behind rises", "the group ahead falls", "both rise", "the group behind falls"],
)
def test_what_counts_as_closing_a_gap(faint: float, clear: float, sign: int) -> None:
    n = 120
    before, after = evidence(n, 0.4, 0.9), evidence(n, faint, clear)
    estimate, items = gap_closed(before, after, resamples=200)
    a, b = ({k: float(v[0]) for k, v in e.statistics().items()} for e in (before, after))
    by_hand = abs(a["AP/gap"]) - abs(b["AP/gap"])
    by_hand -= sum(max(0.0, a[f"AP/{g}"] - b[f"AP/{g}"]) for g in GROUPS)
    assert estimate.value == pytest.approx(by_hand)
    assert items.mean() == pytest.approx(by_hand)
    assert estimate.low <= estimate.value <= estimate.high
    if sign:
        assert sign * estimate.value > 0.05
        assert sign * (estimate.low if sign > 0 else estimate.high) > 0
    elif faint == 0.4:
        assert estimate.value <= 1e-12


def test_groups_are_put_in_order() -> None:
    _, true = detections(4, np.ones(4))
    assert true.group is not None
    turned = ordered(replace(true, group=np.array([0, 1, -1, 0])), ("clear", "faint"), GROUPS)
    assert turned.group is not None
    assert turned.group.tolist() == [1, 0, -1, 1]
