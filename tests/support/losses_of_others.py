"""Losses of several processes as people write them, right and wrong; processes import them from here."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn as dist_nn
import torch.nn.functional as F
from torch import Tensor

from nearfar.integrations import open_clip
from nearfar.losses import InfoNCELoss, SupConLoss
from nearfar.training.distributed import DistributedLoss


def own_rows_alone(a: Tensor, b: Tensor) -> Tensor:
    return InfoNCELoss(0.1)(a, b)


def nearfar_gather(a: Tensor, b: Tensor) -> Tensor:
    return DistributedLoss(InfoNCELoss(0.1))(a, b)


def nearfar_labels(a: Tensor, labels: Tensor) -> Tensor:
    return DistributedLoss(SupConLoss(0.1))(a, labels)


def with_scale(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return DistributedLoss(InfoNCELoss(0.1))(a, b, scale=scale)


def _even(x: Tensor, grad: bool) -> Tensor:
    """All rows, padded to the longest part and cut again."""
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(x)))
    most = int(max(sizes))
    padded = F.pad(x, (0, 0, 0, most - len(x)))
    if grad:
        parts = list(dist_nn.all_gather(padded))
    else:
        parts = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(parts, padded.detach())
        parts[dist.get_rank()] = padded
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def gather_without_gradient(a: Tensor, b: Tensor) -> Tensor:
    return InfoNCELoss(0.1)(_even(a, False), _even(b, False))


def gather_with_gradient(a: Tensor, b: Tensor) -> Tensor:
    return InfoNCELoss(0.1)(_even(a, True), _even(b, True))


def fails(a: Tensor, b: Tensor) -> Tensor:
    raise ValueError("shapes do not fit")


def open_clip_softmax(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """As open_clip's training calls it, with likely false negatives left out."""
    loss = open_clip.ClipLoss(
        local_loss=True, gather_with_grad=True, world_size=dist.get_world_size(), mask_threshold=0.99
    )
    return loss(F.normalize(a, dim=1), F.normalize(b, dim=1), scale, output_dict=True)["contrastive_loss"]


def open_clip_sigmoid(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    loss = open_clip.SigLipLoss(world_size=dist.get_world_size())
    return loss(F.normalize(a, dim=1), F.normalize(b, dim=1), scale, torch.tensor(-1.0, dtype=torch.float64))


def open_clip_of_one(a: Tensor, b: Tensor) -> Tensor:
    return open_clip.ClipLoss()(a, b, 1.0)


def sentence_pairs(a: Tensor, b: Tensor) -> Tensor:
    """Embeddings in place of a model: the second column is the positive, the third a negative."""
    from nearfar.integrations.sentence_transformers import InfoNCELoss as SentenceLoss

    loss = SentenceLoss(torch.nn.Identity(), 0.1, gather_across_devices=True)
    return loss.compute_loss_from_embeddings([a, b, b.flip(0) + 0.5])
