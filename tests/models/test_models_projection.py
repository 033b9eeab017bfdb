"""The projection head: sizes, options, errors."""

from __future__ import annotations

import pytest
import torch

from nearfar.errors import NearfarError
from nearfar.models import ProjectionHead


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_shapes_and_gradients(norm, activation):
    torch.manual_seed(0)
    head = ProjectionHead(6, 10, 4, norm=norm, activation=activation, dropout=0.1)
    head(torch.randn(5, 6)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters() if p.ndim > 1)


def test_is_linear_then_relu_then_linear():
    torch.manual_seed(0)
    head = ProjectionHead(3, 5, 2).eval()
    x = torch.randn(4, 3)
    first, last = (layer for layer in head.layers if isinstance(layer, torch.nn.Linear))
    expected = (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "bach"}, "did you mean 'batch'"),
        ({"activation": "rellu"}, "did you mean 'relu'"),
        ({"dropout": 1.0}, "probability"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(NearfarError, match=message):
        ProjectionHead(3, 5, 2, **options)
    with pytest.raises(NearfarError, match="hidden is 0"):
        ProjectionHead(3, 0, 2)
    with pytest.raises(NearfarError, match="takes 3 features"):
        ProjectionHead(3, 5, 2)(torch.ones(1, 4))
