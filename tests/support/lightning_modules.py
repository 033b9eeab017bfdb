"""Lightning modules that tests train."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn

from nearfar.losses import InfoNCELoss


class Encoder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))
        self.loss = InfoNCELoss(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        value: Tensor = self.loss(self(batch[0]), batch[1])
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Noted(L.LightningModule):
    """Keeps which rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.rows = nn.Linear(1, 1), []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.rows.append((self.current_epoch, tuple(batch[0].tolist())))
        value: Tensor = self.net(batch[0].float()[:, None]).mean()
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)
