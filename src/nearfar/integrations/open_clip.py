"""open_clip: losses in the place of its ``ClipLoss`` and ``SigLipLoss``, with their call and what they return.

Nothing of open_clip is imported: what is alike is the call.
"""

from __future__ import annotations

from torch import Tensor, nn

from nearfar import losses as nearfar_losses
from nearfar.arguments import whole_number
from nearfar.errors import NearfarError
from nearfar.training.distributed import DistributedLoss
from nearfar.training.gather import gather
from nearfar.training.gather import world_size as processes

__all__ = ["ClipLoss", "SigLipLoss"]


class _OpenClipLoss(nn.Module):
    """What both share: the rows of several processes, the record, the form that open_clip's training loop reads."""

    def __init__(self, loss: nn.Module, world_size: int, local_loss: bool, gather_with_grad: bool) -> None:
        super().__init__()
        self.loss, self.world_size = loss, whole_number("world_size", world_size, 1)
        self.call: nn.Module = (
            loss if world_size == 1 else DistributedLoss(loss, local_loss, gather_with_grad)
        )

    @property
    def record(self) -> nearfar_losses.Record | None:
        """What the loss saw in its last call (`nearfar.losses.Record`)."""
        return getattr(self.loss, "record", None)

    def _check_processes(self) -> None:
        if (running := processes()) != self.world_size:
            raise NearfarError(
                f"world_size={self.world_size}, and {running} processes work together: give their number, as "
                "open_clip.loss.create_loss does."
            )

    def _value(self, value: Tensor, output_dict: bool) -> Tensor | dict[str, Tensor]:
        return {"contrastive_loss": value} if output_dict else value


class ClipLoss(_OpenClipLoss):
    """CLIP's loss in both directions (Radford et al. 2021), called as open_clip calls its own.

    Args:
        mask_threshold: leave out pairs of texts with this cosine or more as negatives, by the text features of the
            batch; None: every other row is a negative.
        world_size: the processes that train together under DistributedDataParallel; each row is then contrasted with
            those of all (`nearfar.training.distributed.DistributedLoss`).
        local_loss, gather_with_grad: of several processes, as in open_clip: each computes the part of its own rows;
            gradients reach the rows of the others. Without ``gather_with_grad``, open_clip's default, they are not
            those of one process with the whole batch.

    Features are taken as they are: open_clip's models give rows of unit length. ``logit_scale`` is the scale itself.
    ``cache_labels`` and ``rank`` are taken and not needed; Horovod is not supported.

    Raises:
        NearfarError: ``use_horovod``; a ``world_size`` that is not the number of processes.

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
        if use_horovod:
            raise NearfarError(
                "use_horovod=True: several processes work together by torch.distributed alone."
            )
        loss = nearfar_losses.InfoNCELoss(1.0, normalize=False)
        super().__init__(loss, world_size, local_loss, gather_with_grad)
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
        self._check_processes()
        mask: nearfar_losses.SimilarityMask | None = None
        if self.mask_threshold is not None:
            texts = text_features.detach()
            whole = texts if self.world_size == 1 else gather(texts, with_grad=False)
            mask = nearfar_losses.SimilarityMask(whole, self.mask_threshold)
        return self._value(self.call(image_features, text_features, mask, logit_scale), output_dict)


class SigLipLoss(_OpenClipLoss):
    """SigLIP's loss (Zhai et al. 2023), called as open_clip calls its own.

    Of several processes (``world_size``) each computes the part of its own rows against all, and gradients are those of
    one process with the whole batch; ``dist_impl`` is taken and not needed.

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
        super().__init__(nearfar_losses.SigLipLoss(normalize=False), world_size, True, True)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        self._check_processes()
        bias = 0.0 if logit_bias is None else logit_bias
        return self._value(self.call(image_features, text_features, logit_scale, bias), output_dict)
