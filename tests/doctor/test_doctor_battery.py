"""The doctor against logs as users write them: every planted fault is named, and the healthy stay without warnings and
errors.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from doctor_battery import PLANTED, Folder, healthy
from doctor_runs import NAMED
from nearfar.doctor import Diagnosis, diagnose

pytestmark = pytest.mark.slow  # real runs


def judge(log: Any, context: dict[str, Any], tmp_path: Path) -> Diagnosis:
    return diagnose(log.write(tmp_path / "run") if isinstance(log, Folder) else log, context or None)


@pytest.mark.parametrize("at", range(len(PLANTED)), ids=[f"{rule}: {guise}" for rule, guise, _, _ in PLANTED])
def test_a_planted_fault_is_named(at: int, tmp_path: Path) -> None:
    rule, _, log, context = PLANTED[at]
    found = judge(log, context, tmp_path)
    assert rule in found.ids, (found.ids, [str(u) for u in found.unjudged if u.id == rule])


@pytest.mark.parametrize("kind", healthy(0))
def test_the_healthy_stay_without_warnings_and_errors(kind: str, tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        log, context = healthy(seed)[kind]
        found = judge(log, context, tmp_path / str(seed))
        assert found.healthy, [str(finding) for finding in found]


def test_every_promised_fault_comes_in_two_guises() -> None:
    guises = Counter(rule for rule, _, _, _ in PLANTED)
    assert all(guises[rule] >= 2 for rule in NAMED), [rule for rule in NAMED if guises[rule] < 2]


# -- what the findings say ------------------------------------------------------------------------------------
def test_a_loss_that_never_moved_is_told_from_one_that_diverged() -> None:
    frozen = diagnose({"loss": [4.46, 4.49, 4.47, 4.5, 4.48, 4.47, 4.48, 4.49], "candidates": 64})[0]
    assert frozen.id == "loss-above-chance"
    assert frozen.title.endswith("has not moved since the start.")
    assert "overfit one batch" in frozen.advice
    assert "0.321 nats less" in frozen.evidence["text"]
    diverged = diagnose({"loss": [3.0, 2.5, 4.9, 5.3, 5.6, 5.7, 5.8, 5.7], "candidates": 64, "lr": 0.003})[0]
    assert diverged.id == "loss-above-chance"
    assert diverged.override == "lr=0.001"
    assert "moved" not in diverged.title
    still = diagnose({"loss": [4.48] * 8, "candidates": 64, "lr": 1e-9})[0]
    assert still.override == "lr=0.001"


def test_chance_is_no_baseline_to_be_reported_beside_it() -> None:
    chance = diagnose({"metrics": {"test": {"MRR": {"value": 0.03, "chance": 0.031}}}})[0]
    assert chance.title == "The metric that matters is at chance."
    assert "macro" not in chance.advice
    constant = diagnose({"metrics": {"test": {"F1": 0.8}}, "baselines": {"F1": 0.803}})[0]
    assert "macro F1" in constant.advice


def test_a_collapse_at_an_extreme_temperature_is_its_work() -> None:
    for temperature in (0.001, 1.0):
        found = diagnose({"variance": 0.01}, {"temperature": temperature, "lr": 1e-3})
        assert [f.override for f in found if f.id == "collapse"] == ["temperature=0.07"]
    assert diagnose({"variance": 0.01}, {"temperature": 0.07, "lr": 3e-3})[0].override == "lr=0.001"
