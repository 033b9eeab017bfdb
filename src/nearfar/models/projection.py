"""The head between an encoder and the space in which similarity is taken, and dropout with a generator of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.arguments import any_number, choice, whole_number
from nearfar.errors import NearfarError

__all__ = ["Dropout", "ProjectionHead", "perceptron"]


class Dropout(nn.Module):
    """Zeroes entries with probability ``p`` in training and scales the others by 1 / (1 - p).

    ``p`` is rounded to 256ths: eight entries share one draw of 64 random bits, which on a processor takes a third of
    the time of ``nn.Dropout``. The draws come from torch's generator of the device, as there.

    >>> _ = torch.manual_seed(0)
    >>> round(float((Dropout(0.25)(torch.ones(10_000)) == 0).float().mean()), 2)
    0.25
    >>> Dropout(0.25).eval()(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise NearfarError(f"dropout is {p}, but it is a probability from 0 to below 1")
        self.p = p
        self._zeroed = min(round(p * 256), 255)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self._zeroed:
            return x
        size = math.prod(x.shape)
        bits = torch.empty((size + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        draws = bits.view(torch.uint8)[:size].view(x.shape)
        # Written as 0.0 and 1.0: booleans would take longer to make, and again to multiply.
        kept = torch.ge(draws, self._zeroed, out=torch.empty_like(x))
        return x * kept.mul_(256 / (256 - self._zeroed))

    def extra_repr(self) -> str:
        return f"p={self.p}"


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

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if not isinstance(x, Tensor) or x.ndim == 0 or not x.is_floating_point():
            what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise NearfarError(f"x is {what}; a floating tensor (rows, {self.in_features}) is needed")
        if x.shape[-1] != self.in_features:
            raise NearfarError(
                f"x: the head takes {self.in_features} features, but the input has {x.shape[-1]}"
            )
        return self.layers(x)


def perceptron(sizes: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear maps from each size to the next, with ReLU and `Dropout` between them and nothing after the last.

    >>> [str(layer).split(",")[0] for layer in perceptron((29, 64, 256), 0.3)]
    ['Linear(in_features=29', 'ReLU()', 'Dropout(p=0.3)', 'Linear(in_features=64']
    >>> perceptron((29,))
    Traceback (most recent call last):
    nearfar.errors.NearfarError: sizes are (29,); a perceptron has at least that of its input and that of its output
    """
    sizes = tuple(sizes)
    if len(sizes) < 2:
        raise NearfarError(
            f"sizes are {sizes}; a perceptron has at least that of its input and that of its output"
        )
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        if i:
            layers += [nn.ReLU(), Dropout(dropout)]
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)
