"""Schedules as tables of values, and the ways of writing them down."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml

from nearfar.errors import NearfarError
from nearfar.schedules import (
    Constant,
    Linear,
    Piecewise,
    Step,
    learning_rate_factor,
    schedule,
)


def table(spec, total, integer=False):
    curve = schedule(spec, integer=integer)
    return [curve(epoch, total) for epoch in range(total)]


def test_specifications():
    assert table(0.5, 3) == [0.5] * 3
    assert table("0.5", 2) == [0.5, 0.5]
    assert table("0.3 -> 0.6 -> 0.8", 6) == [0.3, 0.3, 0.6, 0.6, 0.8, 0.8]
    assert table("step 0.3→0.6", 4) == [0.3, 0.3, 0.6, 0.6]
    assert table("linear 0.3 -> 0.8", 6) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert table("-1e-1 -> 2", 2) == [-0.1, 2.0]
    assert table({"kind": "linear", "start": 1, "end": 0}, 3) == [1, 0.5, 0]
    assert table({"kind": "step", "values": [1, 2]}, 2) == [1, 2]
    points = {"kind": "piecewise", "points": [[1, 0.0], [3, 1.0]], "interpolation": "linear"}
    assert table(points, 5) == [0, 0, 0.5, 1, 1]
    assert schedule(Constant(2.0)) == Constant(2.0)


def test_whole_numbers():
    values = table("linear 100 -> 30", 8, integer=True)
    assert values == [100, 90, 80, 70, 60, 50, 40, 30]
    assert all(isinstance(value, int) for value in values)
    assert table("linear 0 -> 1", 3) == [0, 0.5, 1]
    assert table(2.5, 1, integer=True) == [3]


def test_numbers_of_yaml_numpy_and_torch_are_numbers():
    """YAML 1.1 reads 1e-4 as a text, and OmegaConf hands it on as one."""
    spec = yaml.safe_load("{kind: linear, start: 1e-4, end: 1.0e-3}")
    assert isinstance(spec["start"], str)
    assert table(spec, 2) == [1e-4, 1e-3]
    assert table("1e-4", 1) == table(np.float64(1e-4), 1) == [1e-4]
    assert table({"kind": "step", "values": ["1e-4", 2, np.int64(3)]}, 3) == [1e-4, 2, 3]
    assert table({"kind": "piecewise", "points": [["0", "1e-3"], [2, torch.tensor(3)]]}, 3)[-1] == 3
    assert table(torch.tensor(0.5), 1) == table(np.array(0.5), 1) == [0.5]
    assert Constant("1e-4") == Constant(1e-4)
    assert learning_rate_factor("linear", warmup="1e-1")(9, 100) == 1.0
    assert Linear(0, 1)(np.int64(1), np.float64(3)) == 0.5


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 50])
def test_steps_share_the_run_and_lines_reach_their_end(total):
    values = table("1 -> 2 -> 3", total)
    assert values == sorted(values)
    shares = [values.count(v) for v in (1, 2, 3)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1
    assert table("linear 0 -> 1", total)[-1] == (1.0 if total > 1 else 0.0)
    assert Linear(0, 1)(total + 5, total) == (1.0 if total > 1 else 0.0)
    assert Step((1, 2))(total + 5, total) == 2


def test_the_position_may_be_a_fraction_and_nothing_is_remembered():
    curve = schedule({"kind": "piecewise", "points": [(0, 0), (4, 2)]})
    assert [curve(x) for x in (3.5, 0.25, 3.5)] == [1.75, 0.125, 1.75]
    assert Linear(0, 1)(0.5, 3) == 0.25
    assert Piecewise([(0, 1), (2, 5)], "step")(2) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosnie 0.1", "'cosnie' is no kind"),
        ("liner 0.3 -> 0.8", "did you mean 'linear'"),
        ("0.3 -> x", "'x' is no number"),
        ("0.3 ->", "no number"),
        ("", "no number"),
        (math.nan, "no schedule"),
        (True, "no schedule"),
        (np.True_, "no schedule"),
        (math.inf, "no schedule"),
        ("1 -> inf", "'inf' is no number"),
        ("nan", "nan"),
        (float, "no schedule"),
        ({"kind": "constant", "value": math.nan}, "value is nan"),
        ({"kind": "constant", "value": True}, "value is True"),
        ({"kind": "constant", "value": None}, "value is None"),
        ({"kind": "linear", "start": 0, "end": "x"}, "end is 'x'"),
        ({"kind": "step", "values": "12"}, "values is '12'"),
        ({"kind": "step", "values": 3}, "values is 3"),
        ({"kind": "step", "values": [1, math.inf]}, "values is inf"),
        ({"kind": "piecewise", "points": [0, 1]}, "points is 0"),
        ({"kind": "piecewise", "points": [[0, 1, 2]]}, "a pair"),
        ({"kind": "piecewise", "points": [[0, math.nan]]}, "points is nan"),
        (None, "no schedule"),
        ("linear 0.3", "from one number to another"),
        ("constant 1 -> 2", "one number"),
        ({"kind": "peicewise"}, "did you mean 'piecewise'"),
        ({"kind": "linear", "begin": 1}, "does not take"),
        ({"kind": "step", "values": []}, "no values"),
        ({"kind": "piecewise", "points": [[5, 1], [5, 2]]}, "must rise"),
        ({"kind": "piecewise", "points": []}, "no points"),
        ({"kind": "piecewise", "points": [[0, 1]], "interpolation": "liner"}, "did you mean 'linear'"),
    ],
)
def test_bad_specifications(spec, message):
    with pytest.raises(NearfarError, match=message):
        schedule(spec)


def test_bad_positions():
    with pytest.raises(NearfarError, match="needs the length"):
        Linear(0, 1)(2)
    with pytest.raises(NearfarError, match="starts at epoch 0"):
        Constant(1)(-1)
    with pytest.raises(NearfarError, match="more than 0"):
        Step((1, 2))(0, 0)


def test_learning_rate_factors():
    flat = learning_rate_factor()
    assert [flat(s, 10) for s in (0, 5, 10)] == [1.0] * 3
    line = learning_rate_factor("linear", warmup=0.2, final=0.1)
    assert [line(s, 10) for s in (0, 1, 2, 6, 10, 12)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    cosine = learning_rate_factor("cosine")
    values = [cosine(s, 100) for s in range(101)]
    assert values[0] == 1.0
    assert values[50] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0, abs=1e-15)
    assert values == sorted(values, reverse=True)
    assert learning_rate_factor("cosine", warmup=0.5)(0, 1) == 1.0
    with pytest.raises(NearfarError, match="did you mean 'cosine'"):
        learning_rate_factor("cosin")
    with pytest.raises(NearfarError, match="share"):
        learning_rate_factor(warmup=1.0)


@pytest.mark.parametrize("epoch", [2, np.float32(2), np.int64(2), torch.tensor(2)])
def test_a_value_is_a_plain_number_whatever_the_epoch_is(epoch: float) -> None:
    for rule in (Linear(0.0, 1.0), Step((0.1, 0.2)), Piecewise([(0, 0.0), (9, 1.0)]), Constant(0.5)):
        value = rule(epoch, 10)
        assert type(value) is float
        assert value == rule(2.0, 10.0)
