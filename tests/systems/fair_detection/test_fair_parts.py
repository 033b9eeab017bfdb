"""Parts of the fair-detection system: generator, schedules, scenes, losses of a batch, gap and verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nearfar.config.compose import compose_config
from nearfar.errors import NearfarError
from nearfar.losses import AdaptiveScoreContrastiveLoss, WassersteinGapLoss
from nearfar.metrics.detection import Change, detection_change
from nearfar.models.detection import Detector, DetectorOutput, Target
from nearfar.models.perturbation import FairModel, perturbed
from nearfar.systems import check_config
from nearfar.systems.fair_detection.evaluation import gap_verdict
from nearfar.systems.fair_detection.frozen import FairObjective, chosen, picture_scores, shuffled
from nearfar.systems.fair_detection.options import epsilon_schedule, term_weights
from nearfar.systems.fair_detection.report import panel
from tiny_detection import GROUPS, evidence


def config(*overrides: str) -> Any:
    return check_config(compose_config(["experiment=fair_detection", *overrides]))


@pytest.mark.slow
def test_the_notes_names_of_the_shares_stand_for_them() -> None:
    named = config("top_k_percent=0.3", "bottom_k_percent=0.2")
    assert (named.top_fraction, named.bottom_fraction) == (0.3, 0.2)
    own = config("top_fraction=0.3", "bottom_fraction=0.2")
    assert repr(FairObjective(own).contrastive) == repr(FairObjective(named).contrastive)
    assert repr(FairObjective(own).contrastive) != repr(FairObjective(config()).contrastive)


# -- schedules -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_bound_rises_is_held_and_falls() -> None:
    rule = epsilon_schedule(config())
    expected = {0: 0.05, 4: 0.075, 8: 0.10, 13: 0.10, 14: 0.10, 22: 0.095, 30: 0.09, 99: 0.09}
    assert {epoch: round(rule(epoch), 6) for epoch in expected} == expected
    assert epsilon_schedule(config("warmup_epochs=0", "hold_epochs=0", "cooldown_epochs=0"))(5) == 0.10


@pytest.mark.slow
def test_weights_of_the_losses() -> None:
    weights = FairObjective(config()).sum.weights
    assert weights(0, 30) == pytest.approx({"contrastive": 1 / 3, "wasserstein": 0.2, "detection": 0.5})
    assert weights(2, 30)["contrastive"] == 1.0
    assert weights(29, 30)["detection"] == pytest.approx(0.6)
    alone = FairObjective(config("control=wasserstein")).sum.weights(29, 30)
    assert alone == {"contrastive": 0.0, "wasserstein": 0.2, "detection": 0.0}
    assert term_weights(config("contrastive_warmup_epochs=0"))["contrastive"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epsilon=2"], "epsilon=2 is out of range"),
        (["batch_size=3"], "batch_size=3 has no room"),
        (["control=contrastive", "lambda_contrastive=0"], "every loss that it keeps has weight 0"),
        (["control=nothing"], "no such choice"),
        (["bootstrap=20"], "at least 100 resamples"),
        (["head_norm=group"], "no such choice"),
        (["data.dir=.", "data.group_key=null"], "data.group_key=null"),
        (["data.scenes.faint_share=1.0"], "data.scenes.faint_share=1.0 is out of range"),
    ],
)
def test_wrong_options_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(NearfarError, match=message):
        config(*overrides)


# -- losses of a batch ---------------------------------------------------------------------------------------
class Brightness(Detector):
    """Finds the whole picture, the surer the brighter it is: what closes its gap is known."""

    def __init__(self) -> None:
        super().__init__(("person",), 4, "brightness")
        self.slope = nn.Parameter(torch.tensor(20.0))

    def forward(self, pixels: torch.Tensor) -> DetectorOutput:
        mean = pixels.mean((1, 2, 3))
        logit = self.slope * (mean - 0.4)
        logits = torch.stack([logit, torch.zeros_like(logit)], dim=-1)[:, None]
        boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(pixels), 1, 4)
        features = torch.stack([mean, 1 - mean, mean**2, torch.ones_like(mean)], dim=-1)[:, None]
        return DetectorOutput(logits, boxes, features)


def whole(n: int) -> list[Target]:
    return [Target(torch.zeros(1, dtype=torch.long), torch.tensor([[0.5, 0.5, 1.0, 1.0]]))] * n


@pytest.mark.slow
def test_values_are_those_of_the_losses() -> None:
    torch.manual_seed(0)
    detector = Brightness().freeze()
    model = FairModel(4, channels=8, levels=1, head_norm="layer", head_hidden=8, head_dim=4, queue=0)
    pixels, lower = torch.rand(7, 3, 8, 8), torch.tensor([1, 0, 1, 0, 1, 0, 0])
    output = detector(pixels)
    objective = FairObjective(config())
    losses = objective(model, detector, output, whole(7), lower)
    scores = torch.stack([p[0, 0] for p in output.logits.softmax(-1)])
    torch.testing.assert_close(losses.scores, scores)
    expected = {
        "contrastive": AdaptiveScoreContrastiveLoss()(model.head(output.features[:, 0]), scores),
        "wasserstein": WassersteinGapLoss()(scores[lower == 1], scores[lower == 0]),
        "detection": detector.set_loss(output, whole(7)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses.values[name], value, msg=name)
    order = scores.argsort()
    assert sorted(objective.anchors(scores).tolist()) == sorted(order[:2].tolist())
    record = objective.record()
    assert (record["n_anchor"], record["n_positive"]) == (2.0, 2.0)
    assert record["middle_share"] == pytest.approx(3 / 7)
    gap = scores[order[-2:]].mean() - scores[order[:2]].mean()
    assert record["score_gap"] == pytest.approx(gap.item(), abs=1e-6)


def test_the_score_is_a_mean_over_matched_queries() -> None:
    logits = torch.tensor([[[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]]])
    target = Target(torch.tensor([0, 1]), torch.tensor([[0.7, 0.7, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]]))
    output = DetectorOutput(logits, boxes, torch.zeros(1, 3, 4))
    matches = Brightness().match(output, [target])
    p = logits.softmax(-1)
    assert picture_scores(output, [target], matches).item() == pytest.approx(
        (p[0, 1, 0] + p[0, 0, 1]).item() / 2
    )


@pytest.mark.slow
@pytest.mark.parametrize("control", ["full", "wasserstein"])
def test_training_closes_a_gap_that_it_can_close(control: str) -> None:
    torch.manual_seed(0)
    detector = Brightness().freeze()
    options = config(f"control={control}")
    objective = FairObjective(options)
    model = FairModel(4, channels=8, levels=2, head_norm="layer", head_hidden=16, head_dim=8)
    model.epsilon.fill_(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    lower = torch.tensor([1, 1, 1, 0, 0, 0, 0])
    level = torch.where(lower == 1, 0.38, 0.48)[:, None, None, None]
    gaps = []
    for _ in range(60):
        pixels = (level + 0.02 * torch.randn(7, 3, 8, 8)).clamp(0, 1)
        output = detector(perturbed(pixels, model.perturbation(pixels)))
        losses = objective(model, detector, output, whole(7), lower)
        loss = objective.sum(losses.values, position=5, total=30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scores = losses.scores.detach()
        gaps.append(float(scores[lower == 0].mean() - scores[lower == 1].mean()))
    assert gaps[0] > 0.3
    assert np.mean(gaps[-5:]) < 0.6 * gaps[0]
    assert detector.slope.grad is None, "the detector is frozen"


def test_a_shuffled_perturbation_has_the_same_size() -> None:
    delta = torch.randn(3, 16, 16)
    moved = shuffled(delta, torch.Generator().manual_seed(0))
    assert not torch.equal(moved, delta)
    assert torch.equal(moved.flatten(1).sort(dim=1).values, delta.flatten(1).sort(dim=1).values)


# -- gap and verdict -----------------------------------------------------------------------------------------
def verdict(before: Any, after: Any) -> tuple[bool, str]:
    from nearfar.metrics.detection import detection_estimates

    changes = detection_change(before, after, "AP", resamples=400)
    clean, _ = detection_estimates(before, resamples=400)
    return gap_verdict(changes, clean["AP/gap"], GROUPS)


@pytest.mark.slow
def test_verdicts() -> None:
    start = evidence(200, 0.4, 0.9)
    reached, words = verdict(start, evidence(200, 0.7, 0.9))
    assert reached
    assert words.startswith("Reached")
    reached, words = verdict(start, evidence(200, 0.4, 0.5))
    assert not reached
    assert "clear scores lower than on clean pictures" in words
    reached, words = verdict(start, start)
    assert not reached
    assert words.startswith("The change of the gap is not distinguishable")
    reached, words = verdict(start, evidence(200, 0.15, 0.9))
    assert not reached
    assert words.startswith("The gap grew")
    reached, words = verdict(evidence(200, 0.8, 0.9), evidence(200, 0.95, 0.1))
    assert not reached
    assert words.startswith("The gap turned over and grew")
    reached, words = verdict(start, evidence(200, 0.93, 0.9))
    assert reached, "a gap that is closed and a little more: the interval of its size would cover 0"
    level = evidence(200, 0.6, 0.6)
    assert "and so is the gap itself on clean pictures" in verdict(level, level)[1]


def test_a_small_gain_is_no_goal() -> None:
    def change(before: float, after: float, half: float) -> Change:
        value = after - before
        return Change(before, after, value, value - half, value + half, value / before)

    changes = {
        "gap size": change(0.2, 0.18, 0.01),
        "AP/gap": change(0.2, 0.18, 0.01),
        "common mode": change(0.5, 0.52, 0.01),
        "AP/faint": change(0.4, 0.43, 0.01),
        "AP/clear": change(0.6, 0.61, 0.01),
    }
    from nearfar.metrics import Estimate

    clean = Estimate(0.2, 0.1, 0.3, 0.0, 100, False, "AP/gap", {})
    reached, words = gap_verdict(changes, clean, GROUPS)
    assert not reached
    assert "by less than 15%" in words
    changes["AP/gap"] = change(0.2, 0.18, 0.03)
    assert "what changed is common to both groups" in gap_verdict(changes, clean, GROUPS)[1]


# -- pictures ------------------------------------------------------------------------------------------------
def test_pictures_of_both_groups() -> None:
    groups = np.array([0] * 50 + [1] * 3)
    positions = chosen(groups, 4, seed=0)
    assert len(set(positions)) == 4
    assert sorted(groups[positions].tolist()) == [0, 0, 1, 1]
    assert len(chosen(groups, 20, seed=0)) == 20
    clean = np.full((20, 20, 3), 100, np.uint8)
    rows = np.array([[0.1, 0.1, 0.5, 0.5, 0.9, 0.0]])
    picture = panel(clean, clean / 255 + 0.05, rows[:, :4], rows, rows, 0.1, "a picture")
    assert picture.source.startswith("data:image/jpeg")
