"""The generator of perturbations: bounded, of the picture's size, with a gradient from the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nearfar.models.perturbation import PerturbationGenerator, perturbed


# -- generator -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("height", "width", "levels"), [(32, 32, 3), (30, 45, 3), (17, 9, 4), (8, 8, 1)])
def test_a_perturbation_is_bounded_and_has_the_pictures_size(height: int, width: int, levels: int) -> None:
    torch.manual_seed(0)
    generator = PerturbationGenerator(8, levels)
    pixels = torch.rand(2, 3, height, width)
    assert torch.equal(generator(pixels, 0.1), torch.zeros_like(pixels)), "nothing is changed before training"
    nn.init.normal_(generator.end.weight, std=100.0)
    delta = generator(pixels, 0.1)
    assert delta.shape == pixels.shape
    assert 0.0999 < float(delta.detach().abs().max()) <= 0.1 + 1e-8
    changed = perturbed(pixels, delta)
    assert 0.0 <= float(changed.detach().min()) <= float(changed.detach().max()) <= 1.0
    alone = generator(pixels[:1], 0.1)
    torch.testing.assert_close(alone, delta[:1], rtol=0, atol=1e-3)  # it depends on no batch


def test_the_first_step_has_a_gradient() -> None:
    generator = PerturbationGenerator(8, 2)
    perturbed(torch.full((1, 3, 8, 8), 0.5), generator(torch.rand(1, 3, 8, 8), 0.1)).sum().backward()
    assert generator.end.weight.grad is not None
    assert float(generator.end.weight.grad.abs().sum()) > 0
