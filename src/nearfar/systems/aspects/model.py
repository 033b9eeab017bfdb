"""One encoder, an attention and a head for each aspect, and a projection for the contrastive term."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.models import ProjectionHead
from nearfar.models.dropout import Dropout
from nearfar.models.text.tokens import TokenBatch

__all__ = ["AspectAttention", "AspectModel"]


class AspectAttention(nn.Module):
    """One query per aspect over the states of the tokens (label-wise attention, Mullenbach et al. 2018, CAML).

    Called with states (b, t, d) and mask (b, t) it gives (b, A, d): what the text says of each aspect.

    >>> attention = AspectAttention(aspects=2, width=4)
    >>> attention(torch.ones(1, 3, 4), torch.tensor([[True, True, False]])).shape
    torch.Size([1, 2, 4])
    """

    def __init__(self, aspects: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(aspects, width) * width**-0.5)

    def forward(self, states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b a d"]:
        scores = states @ self.queries.T
        weights = scores.masked_fill(~mask[..., None], float("-inf")).softmax(dim=1)
        return weights.transpose(1, 2) @ states


class AspectModel(nn.Module):
    """``encode`` gives (b, A, d), a review as one vector for each aspect; all else starts from there.

    Args:
        encoder: a module with ``width`` = d that turns a `TokenBatch` into states (b, t, d) and a pooled vector.
        aspects, classes: how many.
        projection_dim: length of the vectors that are contrasted; 0 where nothing is contrasted.
        dropout: before the heads.
    """

    def __init__(
        self,
        encoder: nn.Module,
        aspects: int,
        classes: int,
        *,
        projection_dim: int = 128,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        width: Any = encoder.width
        self.encoder = encoder
        self.attention = AspectAttention(aspects, width)
        self.dropout = Dropout(dropout)
        self.weight = nn.Parameter(torch.randn(aspects, classes, width) * 0.5 * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(aspects, classes))
        self.projection = (
            ProjectionHead(aspects * width, projection_dim, projection_dim, norm="layer")
            if projection_dim
            else None
        )

    def heads(self) -> list[nn.Parameter]:
        """All weights but the encoder's."""
        own = {id(p) for p in self.encoder.parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def encode(self, tokens: TokenBatch) -> Float[Tensor, "b a d"]:
        """A review as one vector for each aspect."""
        states = self.encoder(tokens)[0]
        return self.attention(states, tokens.mask)

    def classify(self, aspects: Float[Tensor, "b a d"]) -> Float[Tensor, "b a c"]:
        """Logits of the classes of each aspect."""
        return torch.einsum("bad,acd->bac", self.dropout(aspects), self.weight) + self.bias

    def project(self, aspects: Float[Tensor, "b a d"]) -> Float[Tensor, "b p"] | None:
        """What is contrasted, not normalised; None without a contrastive term."""
        return None if self.projection is None else self.projection(aspects.flatten(1))
