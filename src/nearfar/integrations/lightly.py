"""lightly: losses in the place of its ``NTXentLoss`` and ``SupConLoss``.

Nothing of lightly is imported: what is alike is the call.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from nearfar import losses as nearfar_losses
from nearfar.errors import NearfarError

__all__ = ["NTXentLoss", "SupConLoss"]


class NTXentLoss(nn.Module):
    """NT-Xent of two views of a batch (SimCLR, Chen et al. 2020), called as lightly calls its own.

    Args:
        temperature: divides the cosines.
        memory_bank_size: 0; MoCo's queue is `nearfar.losses.CrossBatchMemory` with `nearfar.losses.InfoNCELoss`.
        gather_distributed: False; see docs/distributed.md for several processes.

    Each of the 2 n rows picks its other view among the 2 n − 1 other rows. Floor 0; guessing gives ln(2 n − 1).

    >>> loss = NTXentLoss(temperature=1.0)
    >>> round(loss(torch.eye(4), torch.eye(4)).item(), 4)
    1.1654
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        if memory_bank_size not in (0, (0, 0)):
            raise NearfarError(
                f"memory_bank_size={memory_bank_size}: this drop-in keeps no rows of earlier batches. Use "
                "nearfar.losses.CrossBatchMemory with nearfar.losses.InfoNCELoss(symmetric=False)."
            )
        _check_alone(gather_distributed)
        self.temperature = temperature
        self.loss = nearfar_losses.SupConLoss(temperature)

    @property
    def record(self) -> nearfar_losses.Record | None:
        """What the loss saw in its last call (`nearfar.losses.Record`)."""
        return self.loss.record

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if out0.shape != out1.shape:
            raise NearfarError(
                f"out0 is {tuple(out0.shape)} and out1 {tuple(out1.shape)}: they are two views of the same rows."
            )
        labels = torch.arange(len(out0), device=out0.device).repeat(2)
        return self.loss(torch.cat([out0, out1]), labels)


class SupConLoss(nn.Module):
    """The supervised contrastive loss of several views (Khosla et al. 2020), called as lightly calls its own.

    Args:
        temperature: divides the cosines.
        gather_distributed: False.

    ``features`` are (rows, views, d); without ``labels``, the views of a row are each other's only positives.

    >>> loss = SupConLoss(temperature=1.0)
    >>> round(loss(torch.stack([torch.eye(4), torch.eye(4)], 1)).item(), 4)
    1.1654
    """

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = False) -> None:
        super().__init__()
        _check_alone(gather_distributed)
        self.temperature = temperature
        self.loss = nearfar_losses.SupConLoss(temperature)

    @property
    def record(self) -> nearfar_losses.Record | None:
        """What the loss saw in its last call (`nearfar.losses.Record`)."""
        return self.loss.record

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        if features.ndim != 3:
            raise NearfarError(f"features are {tuple(features.shape)}: (rows, views, d) is needed.")
        rows, views = features.shape[:2]
        own = torch.arange(rows, device=features.device) if labels is None else labels.reshape(-1)
        if len(own) != rows:
            raise NearfarError(f"{len(own)} labels for {rows} rows of features.")
        return self.loss(features.transpose(0, 1).flatten(0, 1), own.repeat(views))


def _check_alone(gather: bool) -> None:
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if gather and several:
        raise NearfarError(
            "gather_distributed=True: this drop-in contrasts the rows of one process. Use nearfar.losses.SupConLoss "
            "with nearfar.training (docs/distributed.md)."
        )
