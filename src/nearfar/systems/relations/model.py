"""Views of a pair in one space: pixels of both crops, numbers of both boxes and, on request, both names."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.models.dropout import Dropout
from nearfar.systems.relations.dataset import RelationBatch

__all__ = ["RelationModel"]


class RelationModel(nn.Module):
    """A head for each view. Embeddings are not normalised: losses look at directions, and see to that themselves.

    Args:
        numbers: how many numbers describe the boxes: k → 64 → 128 → ``dim``, ReLU, ``spatial_dropout``.
        visual: length of the frozen features of both crops: v → ``hidden`` → ``dim``, ReLU, ``dropout``; None for a
            model that sees no pixels.
        names: length of the vectors of both names: t → ``dim`` → ``dim``; None for none.

    >>> model = RelationModel(numbers=8, visual=1024)
    >>> sum(p.numel() for p in model.visual.parameters())
    656128
    """

    def __init__(
        self,
        numbers: int,
        visual: int | None = None,
        names: int | None = None,
        *,
        hidden: int = 512,
        dim: int = 256,
        dropout: float = 0.4,
        spatial_dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.spatial = _layers((numbers, 64, 128, dim), spatial_dropout)
        self.visual = None if visual is None else _layers((visual, hidden, dim), dropout)
        self.names = None if names is None else _layers((names, dim, dim), dropout)

    @classmethod
    def from_config(cls, config: Any, numbers: int, visual: int | None, names: int | None) -> RelationModel:
        """From the options of the system, by their names."""
        return cls(
            numbers,
            visual,
            names,
            hidden=config.visual_hidden,
            dim=config.embedding_dim,
            dropout=config.visual_dropout,
            spatial_dropout=config.spatial_dropout,
        )

    def forward(self, batch: RelationBatch) -> dict[str, Float[Tensor, "b d"]]:
        """The embeddings of a batch: "spatial" and, where there are, "visual" (0 if unseen), "names", "jittered"."""
        found = {"spatial": self.spatial(batch.numbers)}
        if self.visual is not None:
            if batch.visual is None:
                raise NearfarError("this model looks at pixels, and the batch has none")
            embedded = self.visual(batch.visual)
            found["visual"] = embedded if bool(batch.seen.all()) else embedded * batch.seen[:, None]
        if self.names is not None:
            if batch.names is None:
                raise NearfarError("this model reads names, and the batch has none")
            found["names"] = self.names(batch.names)
        if batch.jittered is not None and self.training:
            found["jittered"] = self.spatial(batch.jittered)
        return found


def _layers(sizes: tuple[int, ...], dropout: float) -> nn.Sequential:
    """Linear maps with ReLU and dropout between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        if i:
            layers += [nn.ReLU(), Dropout(dropout)]
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)
