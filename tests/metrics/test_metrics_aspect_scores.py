"""Decisions of aspects and their scores: thresholds, weights of rare polarities, the misleading headline."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.data.reviews.labels import LabelScheme
from nearfar.metrics.aspect_scores import HEADLINE, Decision, choose_decision, polarity_weights, score_split


@pytest.mark.slow
def test_thresholds_are_the_best_of_their_kind() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((800, 2)) < (0.5, 0.2)).astype(int) * 3
    score = np.clip(0.25 * (truth > 0) + rng.beta(2, 4, size=truth.shape), 0.001, 0.999)
    probabilities = np.stack([1 - score, 0 * score, 0 * score, score], axis=-1)
    scheme = LabelScheme.of(["a", "b"], truth)
    by_kind = {kind: choose_decision(kind, truth, probabilities, "val") for kind in ("none", "one", "aspect")}
    values = {
        kind: score_split(truth, d.codes(probabilities), scheme, bootstrap=0).estimates
        for kind, d in by_kind.items()
    }
    micro = {kind: v["aspect/F1_micro"].value for kind, v in values.items()}
    macro = {kind: v["aspect/F1_macro"].value for kind, v in values.items()}
    best = max(
        score_split(truth, Decision("one", (t, t)).codes(probabilities), scheme, bootstrap=0)
        .estimates["aspect/F1_micro"]
        .value
        for t in np.arange(0.1, 0.9, 0.01)
    )
    assert best - 0.01 < micro["one"] <= best
    assert micro["none"] < micro["one"]
    assert macro["aspect"] >= macro["one"] - 0.005
    assert by_kind["none"].chosen_on == ""
    rare = truth.copy()
    rare[20:, 1] = 0
    decision = choose_decision("aspect", rare, probabilities, "val")
    assert decision.thresholds[1] == choose_decision("one", rare, probabilities, "val").thresholds[0]


def test_rare_polarities_get_their_due() -> None:
    weights = polarity_weights(np.array([[90, 10, 0]]), 1.0)
    decision = Decision.plain(1, weights)
    assert decision.codes(np.array([[[0.1, 0.6, 0.3, 0.0]]])).item() == 2
    assert Decision.plain(1).codes(np.array([[[0.1, 0.6, 0.3, 0.0]]])).item() == 1
    assert polarity_weights(np.array([[1, 2, 3]]), 0.0) is None


def test_the_constant_stands_beside_the_misleading_headline() -> None:
    rng = np.random.default_rng(0)
    truth = np.where(rng.random((500, 4)) < 0.15, rng.choice([1, 3], size=(500, 4)), 0)
    scheme = LabelScheme.of(list("abcd"), truth)
    nothing = score_split(truth, np.zeros_like(truth), scheme, bootstrap=0).estimates
    assert nothing[HEADLINE].value == nothing[HEADLINE].chance > 0.75
    assert nothing["sentiment/F1_micro"].value == 0.0
