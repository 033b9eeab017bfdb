"""pytorch-metric-learning: losses with its call, ``(embeddings, labels, indices_tuple, ref_emb, ref_labels)``.

Nothing of pytorch-metric-learning is imported: what is alike is the call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nearfar import losses as nearfar_losses
from nearfar.errors import NearfarError

__all__ = ["NTXentLoss", "SupConLoss"]


class _MetricLoss(nn.Module):
    """What both share: labels, mined pairs, a reference set."""

    def __init__(self, loss: nearfar_losses.SupConLoss) -> None:
        super().__init__()
        self.loss: nearfar_losses.SupConLoss = loss

    @property
    def record(self) -> nearfar_losses.Record | None:
        """What the loss saw in its last call (`nearfar.losses.Record`)."""
        return self.loss.record

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            embeddings: (n, d).
            labels: (n,) whole numbers; rows of the same label are positives. Not needed with ``indices_tuple``.
            indices_tuple: pairs (a1, p, a2, n) of a miner: positives are (a1, p), negatives (a2, n), all other pairs
                are left out.
            ref_emb, ref_labels: candidates other than the rows of the batch, (m, d) and (m,).
        """
        if (ref_emb is None) != (ref_labels is None) and indices_tuple is None:
            raise NearfarError("ref_emb and ref_labels go together: give both, or neither.")
        if indices_tuple is not None:
            return self._mined(embeddings, indices_tuple, ref_emb)
        if labels is None:
            raise NearfarError("labels are None: they say who belongs together, unless indices_tuple does.")
        if ref_emb is None:
            return self.loss(embeddings, labels)
        return self._among(embeddings, ref_emb, labels=labels, memory_labels=ref_labels)

    def _among(self, embeddings: Tensor, others: Tensor, **options: Tensor | None) -> Tensor:
        self.loss.in_batch = False
        try:
            return self.loss(embeddings, memory=others, **options)
        finally:
            self.loss.in_batch = True

    def _mined(self, embeddings: Tensor, pairs: tuple[Tensor, ...], others: Tensor | None) -> Tensor:
        if len(pairs) == 3:
            anchors, near, far = pairs
            pairs = (anchors, near, anchors, far)
        if len(pairs) != 4:
            raise NearfarError(
                f"indices_tuple has {len(pairs)} parts: (a1, p, a2, n) of pairs, or (a, p, n) of triplets."
            )
        n, m = len(embeddings), len(embeddings if others is None else others)
        positives = torch.zeros(n, m, dtype=torch.bool, device=embeddings.device)
        kept = positives.clone()
        positives[pairs[0].to(kept.device), pairs[1].to(kept.device)] = True
        kept[pairs[2].to(kept.device), pairs[3].to(kept.device)] = True
        options = {"positives": positives, "mask": ~(kept | positives)}
        return (
            self.loss(embeddings, **options) if others is None else self._among(embeddings, others, **options)
        )


class SupConLoss(_MetricLoss):
    """The supervised contrastive loss (Khosla et al. 2020), called as pytorch-metric-learning calls its own.

    Args:
        temperature: divides the cosines.

    The sum over positives stands outside the logarithm. Rows without a positive are left out of the mean.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> round(SupConLoss(temperature=1.0)(z, torch.tensor([0, 0, 1, 1])).item(), 4)
    0.5514
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__(nearfar_losses.SupConLoss(temperature))


class NTXentLoss(_MetricLoss):
    """NT-Xent with several positives, each told apart from the negatives by itself, as pytorch-metric-learning's.

    Args:
        temperature: divides the cosines.

    Theirs is the mean over positive pairs; so is this one where all rows have as many positives, and otherwise the
    mean over rows of the mean over their pairs.

    >>> z = torch.eye(4).repeat(2, 1)
    >>> round(NTXentLoss(temperature=1.0)(z, torch.arange(4).repeat(2)).item(), 4)
    1.1654
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__(nearfar_losses.SupConLoss(temperature, denominator="own"))
