"""A small network over molecular fingerprints."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError

__all__ = ["FingerprintEncoder"]


class FingerprintEncoder(nn.Module):
    """Fingerprints (counts, bits or squashed descriptors) to vectors by a multilayer perceptron.

    Args:
        in_dim: length of a fingerprint.
        hidden: width of the hidden layers.
        out_dim: length of a molecule's vector.
        layers: linear layers, at least 1.
        dropout: after every hidden layer.
        input_dropout: share of the substructures hidden from the network in every step.

    Counts enter as sign(x) · log(1 + |x|), so that a chain of forty atoms does not drown the rest; bits are
    only scaled. Input dropout hides substructures at random, so that no single one may carry a molecule: on a
    few thousand molecules it helps in both directions of retrieval (docs/experiments/molecules.md).

    >>> encoder = FingerprintEncoder(2048, hidden=64, out_dim=16)
    >>> encoder(torch.ones(3, 2048)).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        in_dim: int,
        hidden: int = 1024,
        out_dim: int = 512,
        layers: int = 2,
        dropout: float = 0.4,
        input_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise NearfarError(f"FingerprintEncoder: layers must be at least 1, got {layers}.")
        for name, p in (("dropout", dropout), ("input_dropout", input_dropout)):
            if not 0 <= p < 1:
                raise NearfarError(f"FingerprintEncoder: {name} is a probability from 0 to below 1, got {p}.")
        modules: list[nn.Module] = [nn.Dropout(input_dropout)]
        width = in_dim
        for _ in range(layers - 1):
            modules += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Dropout(dropout)]
            width = hidden
        self.in_dim = in_dim
        self.network = nn.Sequential(*modules, nn.Linear(width, out_dim))

    def forward(self, fingerprint: Float[Tensor, "molecules in"]) -> Float[Tensor, "molecules out"]:
        if fingerprint.shape[-1] != self.in_dim:
            raise NearfarError(
                f"The fingerprint encoder takes {self.in_dim} numbers per molecule, not "
                f"{fingerprint.shape[-1]}; the model was made for other fingerprint options."
            )
        return self.network(torch.sign(fingerprint) * torch.log1p(fingerprint.abs()))
