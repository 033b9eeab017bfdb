"""What ``nearfar verify ddp`` trains: each loss, its arguments from an encoder's outputs, a small uneven batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nearfar import losses
from nearfar.losses.focal import FocalLoss
from nearfar.losses.wasserstein import WassersteinGapLoss

__all__ = ["CASES", "Batch", "Case", "Encoder", "batches", "joined"]

ROWS, FEATURES = 8, 6


class Encoder(nn.Module):
    """Two views through the same layers, a learnable scale and a learnable bias; no dropout, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 8))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def forward(
        self, x: Float[Tensor, "n f"], y: Float[Tensor, "n f"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.layers(x), self.layers(y), self.log_scale.exp(), self.bias * 1.0


@dataclass
class Batch:
    """One rank's rows: two views and everything that some loss wants to know of a row."""

    x: Float[Tensor, "n f"]
    y: Float[Tensor, "n f"]
    labels: Int[Tensor, " n"]
    multi_hot: Float[Tensor, "n l"]
    scores: Float[Tensor, " n"]
    neighbors: Int[Tensor, "n k"]
    alpha: Float[Tensor, "n k"]


def batches(processes: int) -> list[Batch]:
    """The batch of each rank; the last is uneven. Neighbours are positions within the rank."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for rank in range(processes):
        n = ROWS if rank < processes - 1 else ROWS - 3
        x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
        found.append(
            Batch(
                x=x,
                y=x + 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64),
                labels=torch.randint(3, (n,), generator=generator),
                multi_hot=(torch.rand(n, 4, generator=generator) < 0.5).double(),
                scores=torch.rand(n, generator=generator, dtype=torch.float64),
                neighbors=torch.randint(-1, n, (n, 2), generator=generator),
                alpha=torch.rand(n, 2, generator=generator, dtype=torch.float64),
            )
        )
    return found


def joined(parts: Sequence[Batch]) -> Batch:
    """The batches of all ranks as the one that a single process would see."""
    rows: dict[str, Tensor] = {}
    for name in (field.name for field in fields(Batch)):
        rows[name] = torch.cat([getattr(part, name) for part in parts])
    starts = torch.tensor([sum(len(part.x) for part in parts[:i]) for i in range(len(parts))])
    shift = torch.cat([start.expand(len(part.x)) for start, part in zip(starts, parts, strict=True)])
    rows["neighbors"] = torch.where(rows["neighbors"] >= 0, rows["neighbors"] + shift[:, None], -1)
    return Batch(**rows)


@dataclass(frozen=True)
class Case:
    """A loss, and its arguments for a rank's outputs (a, b, scale, bias) and batch.

    ``local``: it can be computed by parts of the rows. ``ring``: there is a ring version. ``shared``: arguments that
    are the same on all ranks.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[[Sequence[Tensor], Batch], dict[str, Any]]
    local: bool = True
    ring: bool = False
    shared: tuple[str, ...] = ()


def _pair(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return {"a": out[0], "b": out[1], "scale": out[2]}


def _clip(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return {"image": out[0], "text": out[1], "logit_scale": out[2]}


def _spatial(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return _clip(out, batch) | {"neighbor_index": batch.neighbors, "neighbor_alpha": batch.alpha}


def _siglip(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return {"a": out[0], "b": out[1], "logit_scale": out[2], "logit_bias": out[3]}


def _scored(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return {"z": out[0], "scores": batch.scores}


def _supcon(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return {"z": out[0], "labels": batch.labels}


def _mined(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return _pair(out, batch) | {"negatives": out[1] * 0.5 - out[0]}


def _memory(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    rows = torch.randn(5, out[1].shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return _pair(out, batch) | {"negatives": (rows, -rows)}


def _groups(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    scores, low = torch.sigmoid(out[0][:, 0]), batch.scores < 0.4
    return {"lower_scores": scores[low], "upper_scores": scores[~low]}


def _classes(out: Sequence[Tensor], batch: Batch) -> dict[str, Any]:
    return {"logits": out[0][:, :6].view(-1, 2, 3), "labels": batch.labels[:, None].expand(-1, 2)}


CASES: dict[str, Case] = {
    "InfoNCELoss": Case(losses.InfoNCELoss, _pair, ring=True),
    "InfoNCELoss, one direction": Case(lambda: losses.InfoNCELoss(symmetric=False), _pair, ring=True),
    "InfoNCELoss, mined negatives": Case(losses.InfoNCELoss, _mined),
    "InfoNCELoss, memory": Case(losses.InfoNCELoss, _memory, shared=("negatives",)),
    "InfoNCELoss, given negatives only": Case(
        lambda: losses.InfoNCELoss(symmetric=False, in_batch=False), _mined
    ),
    "InfoNCELoss, decoupled": Case(lambda: losses.InfoNCELoss(denominator="negatives"), _pair),
    "ClipLoss": Case(losses.ClipLoss, _clip, ring=True),
    "SupConLoss": Case(losses.SupConLoss, _supcon),
    "SupConLoss, two views": Case(
        losses.SupConLoss, lambda out, batch: _supcon(out, batch) | {"other": out[1]}
    ),
    "SupConLoss, each positive alone": Case(
        lambda: losses.SupConLoss(denominator="own", reduction="sum"), _supcon
    ),
    "MultiLabelSupConLoss": Case(
        losses.MultiLabelSupConLoss, lambda out, batch: {"z": out[0], "labels": batch.multi_hot}
    ),
    "SpatialLoss": Case(losses.SpatialLoss, _spatial, local=False),
    "SpatialLoss, no regulariser": Case(lambda: losses.SpatialLoss(temp_reg_weight=0.0), _spatial),
    "SigLipLoss": Case(losses.SigLipLoss, _siglip),
    "AdaptiveScoreContrastiveLoss": Case(losses.AdaptiveScoreContrastiveLoss, _scored, local=False),
    "BidirectionalScoreContrastiveLoss": Case(losses.BidirectionalScoreContrastiveLoss, _scored, local=False),
    "FocalLoss": Case(lambda: FocalLoss(alpha=[1.0, 4.0, 2.0]), _classes, local=False),
    "WassersteinGapLoss": Case(lambda: WassersteinGapLoss(detach_upper=False), _groups, local=False),
}
