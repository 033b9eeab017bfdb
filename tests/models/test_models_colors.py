"""Colour statistics against NumPy, picture by picture."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.errors import NearfarError
from nearfar.models.image.colors import NAMES, color_statistics

RNG = np.random.default_rng(0)


def test_color_statistics_do_not_see_how_a_patch_lies() -> None:
    patches = RNG.integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
    statistics = color_statistics(patches)
    assert statistics.shape == (3, len(NAMES))
    np.testing.assert_allclose(
        statistics, color_statistics(np.rot90(patches, axes=(1, 2))), rtol=2e-5, atol=1e-6
    )
    red = patches[1, ..., 0] / 255
    wanted = [red.mean(), red.std(), *np.quantile(red, [0.05, 0.25, 0.5, 0.75, 0.95])]
    np.testing.assert_allclose(statistics[1, :7], wanted, rtol=1e-5)
    with pytest.raises(NearfarError, match="float64"):
        color_statistics(patches / 255)
