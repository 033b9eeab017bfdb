"""Patches and expression into one space: an encoder or frozen features with a head, and a network over genes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.models import ProjectionHead

__all__ = ["Standardize", "TissueModel"]


class Standardize(nn.Module):
    """Columns of mean 0 and variance 1, by the mean and standard deviation of the training rows, kept as buffers.

    >>> Standardize(torch.tensor([[0.0, 5.0], [2.0, 5.0]]))(torch.tensor([[2.0, 6.0]]))
    tensor([[1., 1.]])
    """

    def __init__(self, rows: Float[Tensor, "n d"]) -> None:
        super().__init__()
        mean, sd = rows.double().mean(0), rows.double().std(0, correction=0)
        constant = sd <= 1e-6 * mean.abs().clamp(min=1.0)
        self.mean: Tensor
        self.sd: Tensor
        self.register_buffer("mean", mean.float())
        self.register_buffer("sd", torch.where(constant, 1.0, sd).float())

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return (x - self.mean) / self.sd


class TissueModel(nn.Module):
    """Two towers: ``encode_images`` and ``encode_genes`` give (B, d) vectors, not normalised.

    Args:
        genes: what the gene tower reads of the training spots, (n, g): expression, or the embeddings of gene
            sentences. Only their mean and spread are kept.
        images: frozen features of the training patches, (n, f), likewise; None where ``encoder`` reads pixels.
        encoder: a trained image encoder with a ``width`` (`nearfar.models.image`); None with frozen features.
        embedding_dim: d.
        hidden, dropout: of both heads, which have one hidden layer.
        temperature: where the scale 1 / temperature starts to learn.
        max_scale: the largest scale; ``scale()`` is clamped there.

    >>> model = TissueModel(torch.randn(9, 50), images=torch.randn(9, 42), embedding_dim=16)
    >>> model.encode_images(torch.randn(3, 42)).shape, model.encode_genes(torch.randn(3, 50)).shape
    (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    def __init__(
        self,
        genes: Float[Tensor, "n g"],
        *,
        images: Float[Tensor, "n f"] | None = None,
        encoder: nn.Module | None = None,
        embedding_dim: int = 128,
        hidden: int = 256,
        dropout: float = 0.1,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if (images is None) == (encoder is None):
            raise NearfarError(
                "a tissue model reads frozen features or pixels: give images or encoder, not both."
            )
        if temperature * max_scale < 1:
            raise NearfarError(
                f"temperature={temperature} means a scale of {1 / temperature:.4g}, beyond max_scale={max_scale}: "
                "start warmer, or raise max_scale."
            )
        self.encoder = encoder
        width = int(encoder.width) if encoder is not None else images.shape[1]  # type: ignore[union-attr, arg-type]
        self.image_features = nn.Identity() if images is None else Standardize(images)
        self.image = _head(width, hidden, embedding_dim, dropout)
        self.gene_features = Standardize(genes)
        self.gene = _head(genes.shape[1], hidden, embedding_dim, dropout)
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)
        # What does not learn is an option and no weight: other weights, as of a checkpoint, do not bring their own.
        self.fixed_scale = None if learn_temperature else 1.0 / temperature

    def encode_images(self, images: Shaped[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """Pixels (b, 3, h, w), or frozen features (b, f), of a batch."""
        return self.image(self.image_features(images if self.encoder is None else self.encoder(images)))

    def encode_genes(self, genes: Float[Tensor, "b g"]) -> Float[Tensor, "b d"]:
        """Expression, or sentence embeddings, of a batch."""
        return self.gene(self.gene_features(genes))

    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature; the loss clamps it at ``max_scale``."""
        return (
            self.log_scale.exp() if self.fixed_scale is None else self.log_scale.new_tensor(self.fixed_scale)
        )


def _head(width: int, hidden: int, out: int, dropout: float) -> nn.Module:
    return ProjectionHead(width, hidden, out, dropout=dropout, norm="layer", activation="gelu")
