"""The head between an encoder and the space in which similarity is taken."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError, nearest_name

__all__ = ["ProjectionHead"]

_NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class ProjectionHead(nn.Module):
    """A two-layer perceptron ``in_features → hidden → out_features`` (SimCLR, Chen et al. 2020).

    ``norm`` ("layer", "batch" or ``None``) acts after the first layer, then ``activation`` ("relu", "gelu",
    "silu", "tanh") and ``dropout``. The output is not normalised: the losses and metrics do that themselves.

    >>> import torch
    >>> head = ProjectionHead(256, 512, 128)
    >>> head(torch.zeros(32, 256)).shape
    torch.Size([32, 128])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        *,
        dropout: float = 0.0,
        norm: str | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("hidden", hidden), ("out_features", out_features)):
            if size < 1:
                raise NearfarError(f"{name} is {size}, but a layer has at least one unit")
        if not 0.0 <= dropout < 1.0:
            raise NearfarError(f"dropout is {dropout}, but it is a probability from 0 to below 1")
        if norm is not None and norm not in _NORMS:
            raise NearfarError(f"norm is {norm!r}: {nearest_name(norm, _NORMS)}, or None")
        if activation not in _ACTIVATIONS:
            raise NearfarError(f"activation is {activation!r}: {nearest_name(activation, _ACTIVATIONS)}")
        middle = [_NORMS[norm](hidden)] if norm is not None else []
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden),
            *middle,
            _ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            nn.Linear(hidden, out_features),
        )
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        if x.shape[-1] != self.in_features:
            raise NearfarError(f"the head takes {self.in_features} features, but the input has {x.shape[-1]}")
        return self.layers(x)
