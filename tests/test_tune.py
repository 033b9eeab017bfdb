"""What a search draws, and what it makes of trials of an earlier call; searches themselves run in tests/test_ray.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nearfar import tune
from nearfar.config.compose import compose_config
from nearfar.config.options import to_dict
from nearfar.errors import NearfarError
from nearfar.systems import check_config
from nearfar.training.run_folder import RunFolder

distributions = pytest.importorskip("optuna").distributions


def drawn(*overrides: str) -> dict[str, Any]:
    return tune.search_space(["experiment=molecules", *overrides])[1]


@pytest.mark.parametrize("text", ["lr=tag(log,interval(0,1))", "lr=interval(1,0)", "lr=glob(*)"])
def test_what_nothing_can_be_drawn_from_is_refused(text: str) -> None:
    with pytest.raises(NearfarError, match=r"is nothing to draw from .*from the smaller end to the larger"):
        tune._distribution(drawn(text)["lr"])


def test_values_of_a_record_are_the_choices_that_were_drawn() -> None:
    space = drawn("data.train='a,b',c", "lr=interval(0.1,0.2)", "epochs=range(1,4)")
    typed = tune._typed({"data.train": "a,b", "lr": "0.15", "epochs": "2"}, space)
    assert typed == {"data.train": "'a,b'", "lr": 0.15, "epochs": "2"}
    for key, value in typed.items():
        assert tune._distribution(space[key])._contains(
            tune._distribution(space[key]).to_internal_repr(value)
        )
    assert tune._is_drawn({"data.train": "c", "lr": "0.2", "epochs": "3"}, space)
    for wrong in ({"data.train": "d"}, {"lr": "0.3"}, {"lr": "x"}, {"epochs": "4"}):
        assert not tune._is_drawn({"data.train": "c", "lr": "0.2", "epochs": "3"} | wrong, space)


def test_a_search_that_goes_on_draws_what_was_not_drawn_yet() -> None:
    """After the trials that were cut off; the same seed would draw the first trials again."""
    pytest.importorskip("ray")
    space = drawn("lr=tag(log,interval(1e-4,1e-2))", "sampler=hard,random")
    first = tune._searcher(space, "max", 0, [], [])
    tried = [first.suggest(str(number)) for number in range(3)]
    known, cut_off = (
        [
            tune.Candidate(
                "run", {key: str(value) for key, value in values.items()}, reached, 5, pruned=False
            )
            for values in some
        ]
        for some, reached in ((tried[:2], 0.5), (tried[2:], None))
    )
    again = tune._searcher(space, "max", 0, known, cut_off)
    following = [again.suggest(str(number)) for number in range(3)]
    assert following[0] == tried[2]
    assert not {values["lr"] for values in following[1:]} & {values["lr"] for values in tried}


@pytest.mark.parametrize(
    ("last", "error", "prune", "expected"),
    [
        ({"objective": 0.9, "epoch": 5, "whole": True}, None, False, (0.9, False, None)),
        ({"objective": 0.9, "epoch": 3}, None, True, (0.9, True, None)),
        ({"objective": 0.9, "epoch": 3}, None, False, (None, False, None)),  # stopped with the search
        ({"objective": 0.9, "epoch": 3}, RuntimeError("died\nlost"), False, (None, False, "lost")),
        ({"objective": 0.9, "epoch": 3}, RuntimeError(""), True, (None, False, "RuntimeError")),
        ({}, None, False, (None, False, None)),
    ],
)
def test_only_a_trial_that_ended_has_a_value(last: Any, error: Any, prune: bool, expected: Any) -> None:
    result: Any = SimpleNamespace(metrics=last, error=error, config={"lr": 1})
    trial = tune._candidate(result, prune)
    assert (trial.objective, trial.pruned, trial.error) == expected
    assert trial.cut_off == (expected == (None, False, None))


@pytest.mark.slow
def test_trials_of_a_different_search_are_refused(tmp_path: Path) -> None:
    """A value that was reached with other epochs, or a different sampler, says nothing about these."""
    home = RunFolder(tmp_path / "tune")
    fixed = ["experiment=molecules", f"runs_dir={tmp_path}", "epochs=5"]
    space = drawn("lr=interval(0.01,0.2)")

    def trial(lr: str, *more: str) -> None:
        overrides, name = tune._trial_of([*fixed, *more], {"lr": lr}, "tune")
        config = check_config(compose_config(overrides))
        config.overrides = overrides
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))

    trial("0.1")
    known, cut_off = tune._earlier(home, fixed, space, "tune")
    assert (known, [each.values for each in cut_off]) == ([], [{"lr": "0.1"}])
    trial("0.5")  # outside of what is drawn now
    assert len(tune._earlier(home, fixed, space, "tune")[1]) == 1
    trial("0.15", "epochs=40", "sampler=hard")
    with pytest.raises(NearfarError, match=r"an earlier search differ in epochs, .*name=…"):
        tune._earlier(home, fixed, space, "tune")
