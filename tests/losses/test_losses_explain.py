"""A batch explained, against explicit loops and against the losses themselves."""

from __future__ import annotations

import math

import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.losses import DuplicateMask, InfoNCELoss, SimilarityMask, SupConLoss, explain_batch


def rows(n: int, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_probabilities_are_those_of_the_loss() -> None:
    a, b = rows(12), rows(12, seed=1)
    ids = torch.tensor([0, 1, 2, 0, 4, 5, 6, 7, 8, 1, 10, 11])
    explained = explain_batch(a, b, temperature=0.1, masks={"same text": DuplicateMask(ids)}, k=12)
    loss = InfoNCELoss(0.1, symmetric=False)
    value = loss(a, b, mask=DuplicateMask(ids))
    own = torch.tensor([-math.log(row.p_positive) for row in explained])
    assert float(own.mean()) == pytest.approx(float(value), abs=1e-5)
    for row in explained:
        assert row.masked == int((ids == ids[row.position]).sum()) - 1
        assert row.candidates == 12 - row.masked
        assert [other.why for other in row.left_out] == ["same text"] * row.masked
        similarities = [other.similarity for other in row.negatives]
        assert similarities == sorted(similarities, reverse=True)
        total = sum(other.probability for other in (*row.positives, *row.negatives))
        assert total == pytest.approx(1.0, abs=1e-5)


def test_rows_of_a_class_without_keys() -> None:
    x, labels = rows(9), torch.tensor([0, 0, 1, 1, 1, 2, -1, -1, 0])
    explained = explain_batch(x, labels=labels, temperature=0.5, k=9)
    unit = torch.nn.functional.normalize(x, dim=1)
    for i, row in enumerate(explained):
        same = [j for j in range(9) if j != i and labels[j] == labels[i] and labels[i] >= 0]
        assert sorted(other.position for other in row.positives) == same
        assert all(other.position != i for other in (*row.positives, *row.negatives, *row.left_out))
        assert row.candidates == 8
        for other in row.negatives:
            assert other.similarity == pytest.approx(float(unit[i] @ unit[other.position]), abs=1e-6)
    assert explained.notes == ("3 rows have no positive",)
    SupConLoss(0.5)(x, labels)  # takes the same arguments


@pytest.mark.slow
def test_suspects_are_marked() -> None:
    reference = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0]])
    similarities = torch.tensor([[0.9, 0.2, 0.1], [0.0, 0.5, 0.6], [0.3, 0.2, 0.8]])
    explained = explain_batch(
        similarities=similarities,
        suspect={"alike before": SimilarityMask(reference, 0.9)},
        shown=["a", "b", "c"],
        k=2,
    )
    assert [[(o.position, o.why) for o in row.negatives] for row in explained] == [
        [(1, "alike before"), (2, "")],
        [(2, "nearer than the positive"), (0, "alike before")],
        [(0, ""), (1, "")],
    ]
    assert explained.likely_false == 3
    assert len(explain_batch(similarities=similarities, margin=0.6, k=2)[0].likely_false) == 0
    assert len(explain_batch(similarities=similarities, margin=0.75, k=2)[0].likely_false) == 1
    text = str(explained)
    assert "row 0  a: 3 candidates, 0 left out" in text
    assert "- " in text
    shown = explain_batch(similarities=similarities, shown=["<b>", "x", "y"])._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give queries"),
        ({"queries": rows(3), "keys": rows(4)}, "give labels or positives"),
        ({"queries": rows(3)}, "give labels or positives"),
        ({"queries": rows(3), "keys": rows(3, 5)}, "cannot be compared"),
        ({"queries": rows(3), "keys": rows(3), "temperature": 0.0}, "temperature"),
        ({"queries": rows(3), "keys": rows(3), "rows": [3]}, "rows: 3 is not there"),
        ({"queries": rows(3), "keys": rows(3), "shown": ["a"]}, "1 texts for 3 rows"),
        ({"queries": rows(3), "keys": rows(3), "positives": torch.eye(2, dtype=torch.bool)}, "3 × 3"),
        (
            {"queries": rows(3), "keys": rows(3), "masks": {"x": torch.eye(4, dtype=torch.bool)}},
            "the mask 'x'",
        ),
        ({"queries": rows(3), "labels": torch.tensor([1, 2])}, "labels and key_labels"),
    ],
)
def test_mistakes(given: dict[str, object], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        explain_batch(**given)  # type: ignore[arg-type]
