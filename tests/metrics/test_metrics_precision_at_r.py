"""MAP@R against a loop over queries, ties against the mean over all orders, chance against random orders."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.metrics import map_at_r
from nearfar.metrics.precision_at_r import average_precision_at_r

GENERATOR = torch.Generator().manual_seed(0)


def precision_at_r(right: list[bool], r: int) -> float:
    return sum(sum(right[: i + 1]) / (i + 1) for i in range(r) if right[i]) / r


def relevant_to(labels: torch.Tensor, i: int) -> list[bool]:
    if labels.ndim == 1:
        return [bool(labels[i] == other) and int(labels[i]) >= 0 for other in labels]
    return [bool((labels[i] & other).any()) for other in labels]


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_against_a_loop(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearfar.metrics.precision_at_r._TILE", 200)  # several tiles, the last one smaller
    rows = torch.randn(45, 6, generator=GENERATOR)
    labels = torch.randint(0, 6, (45,), generator=GENERATOR)
    labels[:2] = torch.tensor([-1, 17])
    if several:
        labels = (torch.rand(45, 7, generator=GENERATOR) < 0.2).long()
    scores, chances = average_precision_at_r(rows, labels)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    for i in range(45):
        others = [j for j in range(45) if j != i]
        right = relevant_to(labels, i)
        r = sum(right[j] for j in others)
        if not r:
            assert np.isnan(scores[i])
            assert np.isnan(chances[i])
            continue
        order = sorted(others, key=lambda j: -float(unit[i] @ unit[j]))
        assert scores[i] == pytest.approx(precision_at_r([right[j] for j in order], r))
        drawn = [
            precision_at_r([right[j] for j in np.random.default_rng(k).permutation(others)], r)
            for k in range(40)
        ]
        assert chances[i] == pytest.approx(np.mean(drawn), abs=6 * np.std(drawn) / np.sqrt(40) + 0.03)
    estimate = map_at_r(rows, labels, split="x")
    assert estimate.value == pytest.approx(np.nanmean(scores))
    assert estimate.low < estimate.value < estimate.high
    assert estimate.n == int((~np.isnan(scores)).sum())
    assert estimate.protocol["without_relevant"] == 45 - estimate.n


def test_ties_count_by_expectation() -> None:
    """Seven items at three directions: the mean over every order of the tied ones."""
    rows = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [0, 1]])
    labels = torch.tensor([0, 0, 1, 0, 0, 1, 0])
    scores, _ = average_precision_at_r(rows, labels)
    for i in range(7):
        r = int((labels == labels[i]).sum()) - 1
        levels: dict[float, list[int]] = {}
        for j in range(7):
            if j != i:
                levels.setdefault(round(float(rows[i] @ rows[j]), 5), []).append(j)
        values, groups = [], [levels[level] for level in sorted(levels, reverse=True)]
        orders = [[]]
        for group in groups:
            orders = [[*head, *tail] for head in orders for tail in permutations(group)]
        for order in orders:
            values.append(precision_at_r([bool(labels[j] == labels[i]) for j in order], r))
        assert scores[i] == pytest.approx(np.mean(values), abs=1e-6)
    collapsed, chance = average_precision_at_r(torch.ones(7, 2), labels)
    np.testing.assert_allclose(collapsed, chance, rtol=1e-6)


def test_wrong_arguments() -> None:
    rows = torch.randn(4, 2)
    for labels, message in (
        (torch.zeros(3, dtype=torch.int64), r"\(3,\) for 4 rows of embeddings"),
        (torch.arange(4), "no two items"),
        ([0, 0, 1, 1], "pass a tensor"),
    ):
        with pytest.raises(NearfarError, match=message):
            map_at_r(rows, labels)
    with pytest.raises(NearfarError, match="not finite"):
        map_at_r(rows * torch.nan, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(NearfarError, match="rows"):
        map_at_r(rows[0], torch.zeros(4, dtype=torch.int64))
