"""open_clip: losses in the place of its ``ClipLoss`` and ``SigLipLoss``, with their call and what they return.

Nothing of open_clip is imported: what is alike is the call.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, distributed, nn

from nearfar import losses as nearfar_losses
from nearfar.errors import NearfarError

__all__ = ["ClipLoss", "SigLipLoss"]


class _OpenClipLoss(nn.Module):
    """What both share: one process, the record, the form that open_clip's training loop reads."""

    def __init__(self, loss: nn.Module, world_size: int) -> None:
        super().__init__()
        if world_size != 1:
            raise NearfarError(
                f"world_size={world_size}: this drop-in contrasts the rows of one process. For several, wrap "
                "nearfar.losses.ClipLoss by nearfar.training (docs/distributed.md)."
            )
        self.loss = loss

    @property
    def record(self) -> Any:
        """What the loss saw in its last call (`nearfar.losses.Record`)."""
        return self.loss.record

    def _value(self, value: Tensor, output_dict: bool) -> Tensor | dict[str, Tensor]:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise NearfarError(
                "several processes are running, and this drop-in contrasts the rows of one. Use nearfar.losses with "
                "nearfar.training (docs/distributed.md)."
            )
        return {"contrastive_loss": value} if output_dict else value


class ClipLoss(_OpenClipLoss):
    """CLIP's loss in both directions (Radford et al. 2021), called as open_clip calls its own.

    Args:
        mask_threshold: leave out pairs of texts with this cosine or more as negatives, by the text features of the
            batch; None: every other row is a negative.
        world_size: 1.

    Features are taken as they are: open_clip's models give rows of unit length. ``logit_scale`` is the scale itself.
    Further options of open_clip's (``local_loss``, ``gather_with_grad``, ``cache_labels``, ``rank``, ``use_horovod``)
    concern several processes, and are taken and not used.

    >>> import torch
    >>> image, text = torch.eye(4), torch.eye(4)
    >>> loss = ClipLoss()
    >>> round(loss(image, text, torch.tensor(1.0)).item(), 4)
    0.7437
    >>> sorted(loss(image, text, torch.tensor(1.0), output_dict=True))
    ['contrastive_loss']
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        mask_threshold: float | None = None,
    ) -> None:
        super().__init__(nearfar_losses.InfoNCELoss(1.0, normalize=False), world_size)
        self.mask_threshold = mask_threshold

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss; ``logit_bias`` shifts all logits alike, and a softmax does not see it."""
        mask: Any = None
        if self.mask_threshold is not None:
            mask = nearfar_losses.SimilarityMask(text_features.detach(), self.mask_threshold)
        return self._value(self.loss(image_features, text_features, mask, logit_scale), output_dict)


class SigLipLoss(_OpenClipLoss):
    """SigLIP's loss (Zhai et al. 2023), called as open_clip calls its own.

    >>> import torch
    >>> loss = SigLipLoss()
    >>> round(loss(torch.eye(4), torch.eye(4), torch.tensor(10.0), torch.tensor(-10.0)).item(), 4)
    0.6933
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__(nearfar_losses.SigLipLoss(normalize=False), world_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        bias = 0.0 if logit_bias is None else logit_bias
        return self._value(self.loss(image_features, text_features, logit_scale, bias), output_dict)
