"""The temperature that turns scores into probabilities."""

from __future__ import annotations

import numpy as np

from nearfar.metrics.classification import fitted_temperature, probabilities


def test_the_temperature_is_the_best_of_a_grid() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 200)
    scores = rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[label]
    scores[:, 2] = -np.inf

    def loss(temperature: float) -> float:
        known = label != 2
        return float(
            -np.log(probabilities(scores[known], temperature)[np.arange(known.sum()), label[known]]).mean()
        )

    fitted = fitted_temperature(scores, label)
    assert loss(fitted) <= min(loss(each) for each in np.geomspace(0.05, 15, 200)) + 1e-9
    assert fitted_temperature(scores[:0], label[:0]) == 1
