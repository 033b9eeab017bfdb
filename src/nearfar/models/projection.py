"""The head between an encoder and the space in which similarity is taken."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.arguments import any_number, choice, whole_number
from nearfar.errors import NearfarError

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
            if whole_number(name, size) < 1:
                raise NearfarError(f"{name} is {size}, but a layer has at least one unit")
        in_features, hidden, out_features = int(in_features), int(hidden), int(out_features)
        if not 0.0 <= any_number("dropout", dropout) < 1.0:
            raise NearfarError(f"dropout is {dropout}, but it is a probability from 0 to below 1")
        if norm is not None:
            choice("norm", norm, _NORMS)
        choice("activation", activation, _ACTIVATIONS)
        middle = [_NORMS[norm](hidden)] if norm is not None else []
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden),
            *middle,
            _ACTIVATIONS[activation](),
            nn.Dropout(float(dropout)),
            nn.Linear(hidden, out_features),
        )
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        if not isinstance(x, Tensor) or x.ndim == 0 or not x.is_floating_point():
            what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise NearfarError(f"x is {what}; a floating tensor (rows, {self.in_features}) is needed")
        if x.shape[-1] != self.in_features:
            raise NearfarError(
                f"x: the head takes {self.in_features} features, but the input has {x.shape[-1]}"
            )
        return self.layers(x)
