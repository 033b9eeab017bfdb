"""InfoNCE as a module; ``nearfar.functional.info_nce`` is the function behind it."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.functional.nce import info_nce_with_record
from nearfar.losses.record import Record

__all__ = ["InfoNCELoss"]


class InfoNCELoss(nn.Module):
    """Pull ``a[i]`` and ``b[i]`` together and push all other pairs of the batch apart.

    ``temperature`` divides the cosines (0.001 and up; smaller looks only at the hardest negatives),
    ``symmetric`` averages both directions, ``normalize=False`` takes dot products of the embeddings as they
    are.

    Called with two (B, D) matrices it returns a 0-d tensor. ``mask`` (B, B) leaves pairs out, see
    ``nearfar.losses.false_negative_mask``; ``scale`` replaces 1 / temperature and may be a tensor that
    learns. ``record`` then holds the ``Record`` of that call (``None`` before the first).

    Range 0 to infinity; guessing gives ``record.uniform_level``, the floor is 0. Losses of batches of
    different size or mask have different levels and are not comparable.

    >>> import torch
    >>> loss = InfoNCELoss(temperature=0.1)
    >>> value = loss(torch.eye(8), torch.eye(8))
    >>> loss.record.candidates, round(loss.record.uniform_level, 3), value.item() < 0.001
    (8.0, 2.079, True)
    """

    def __init__(self, temperature: float = 0.07, symmetric: bool = True, normalize: bool = True) -> None:
        super().__init__()
        if not temperature > 0:
            raise NearfarError(f"temperature is {temperature}, but it must be above 0; 0.05 to 0.1 is usual")
        self.temperature = float(temperature)
        self.symmetric = symmetric
        self.normalize = normalize
        self._seen: Tensor | None = None

    @property
    def record(self) -> Record | None:
        """The record of the last call. Reading it waits for the device; a step that nobody asks does not."""
        return None if self._seen is None else Record(*self._seen.tolist())

    def forward(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "m d"],
        mask: Bool[Tensor, "n m"] | None = None,
        scale: float | Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        loss, self._seen = info_nce_with_record(
            a, b, self.temperature, scale, self.symmetric, self.normalize, mask
        )
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, symmetric={self.symmetric}, normalize={self.normalize}"
