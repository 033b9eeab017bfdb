"""Did training help: every system's run states the scores before its first step and what training changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.doctor import diagnose
from nearfar.lab.report import write_report
from nearfar.metrics import Estimate, paired_difference
from nearfar.training.evaluation import gains
from nearfar.training.run_folder import RunFolder
from nearfar.training.system import Evaluation
from tiny_runs import SMALL, train


def of(scores: Any, name: str = "R@1", ids: Any = None, **more: Any) -> Evaluation:
    """An evaluation of one metric with a score of every item."""
    values = np.asarray(scores, dtype=np.float64)
    more = {"low": float(values.mean()) - 0.1, "high": float(values.mean()) + 0.1} | more
    estimate = Estimate(
        float(values.mean()),
        chance=0.01,
        n=len(values),
        trivial=False,
        metric=name,
        protocol={"split": "a"},
        **more,
    )
    return Evaluation("val", {name: estimate}, ids or [str(i) for i in range(len(values))], {name: values})


def test_the_gain_is_the_paired_difference_of_the_same_items() -> None:
    rng = np.random.default_rng(0)
    start, now = rng.random(200), rng.random(200) + 0.2
    facts = gains({"val": of(now)}, {"val": of(start)})
    expected = paired_difference(now, start, metric="R@1")
    gain = facts["gain"]["val"]["R@1"]
    assert (gain["value"], gain["low"], gain["high"], gain["verdict"]) == (
        expected.value,
        expected.low,
        expected.high,
        "better",
    )
    assert gain["paired"] is True
    assert gain["n"] == 200
    assert facts["before_training"]["val"]["R@1"]["value"] == start.mean()


def test_which_way_is_better_is_what_the_estimate_says() -> None:
    start, now = np.full(50, 20.0) + np.arange(50) % 3, np.full(50, 10.0) + np.arange(50) % 2
    facts = gains(
        {"val": of(now, "cost", higher_is_better=False)}, {"val": of(start, "cost", higher_is_better=False)}
    )
    assert facts["gain"]["val"]["cost"]["verdict"] == "better"


def test_without_scores_of_the_same_items_the_interval_is_cautious() -> None:
    now, start = of(np.ones(50) * 0.6), of(np.ones(50) * 0.2)
    start.ids = [f"other {i}" for i in range(50)]
    gain = gains({"val": now}, {"val": start})["gain"]["val"]["R@1"]
    assert gain["paired"] is False
    assert gain["low"] == pytest.approx(0.4 - np.hypot(0.1, 0.1))
    bad = of(np.r_[np.nan, np.ones(49)], low=0.1, high=0.2)
    assert gains({"val": now}, {"val": bad})["gain"]["val"] == {}, (
        "what is not a number is compared with nothing"
    )


def test_controls_and_splits_that_nobody_evaluated_are_left_out() -> None:
    control = of(np.ones(9), control=True)
    assert gains({"val": control}, {"val": control})["gain"]["val"] == {}
    assert gains({"val": of(np.ones(9))}, {}) == {}
    assert gains({"val": of(np.ones(9))}, {"test": of(np.ones(9))}) == {}


@pytest.mark.slow
@pytest.mark.usefixtures("module_cache")
@pytest.mark.parametrize("system", SMALL)
def test_every_system_says_what_training_changed(system: str, tmp_path: Path) -> None:
    run = RunFolder(train(system, tmp_path))
    metrics = run.read_json("metrics.json")
    split = "test" if "test" in metrics["splits"] else "val"
    monitor = metrics["monitor"]
    before, now = metrics["before_training"][split], metrics["splits"][split]
    results = {name for name, each in now.items() if not each["control"]}
    assert set(before) == results, "the same metrics, by the same procedure"
    gain = metrics["gain"][split][monitor]
    assert gain["paired"] is True
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert gain["value"] == pytest.approx(now[monitor]["value"] - before[monitor]["value"], abs=1e-6)
    assert before[monitor]["protocol"].get("split") == now[monitor]["protocol"].get("split")
    sentence = diagnose(run.path).gain
    assert sentence is not None
    assert json.loads((run.path / "doctor.json").read_text())["gain"] == sentence
    page = write_report(run).read_text()
    assert "changed by training" in page
    first = next(iter(run.log()))
    assert (first["kind"], first["step"]) == ("start", 0)
    assert monitor in first["val"]


@pytest.mark.slow
@pytest.mark.usefixtures("module_cache")
def test_it_can_be_left_out_and_changes_no_weight(tmp_path: Path) -> None:
    runs = [
        RunFolder(train("molecules", tmp_path, f"trainer.evaluate_start={flag}", name=name))
        for flag, name in (("true", "judged"), ("false", "plain"))
    ]
    judged, plain = (run.read_json("metrics.json") for run in runs)
    assert judged["splits"] == plain["splits"]
    assert "gain" not in plain
    assert diagnose(runs[1].path).gain is None
    assert [record["kind"] for record in runs[0].log() if record["kind"] == "start"] == ["start"]
    assert not [record for record in runs[1].log() if record["kind"] == "start"]
