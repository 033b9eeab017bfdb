"""The losses as pure functions of tensors; ``nearfar.losses`` wraps each in a module that keeps a record."""

from __future__ import annotations

from nearfar.losses.distillation import distillation, margin_mse
from nearfar.losses.focal import focal_alpha, focal_loss
from nearfar.losses.info_nce import clip, info_nce
from nearfar.losses.score_contrastive import adaptive_score_contrastive, bidirectional_score_contrastive
from nearfar.losses.siglip import siglip
from nearfar.losses.spatial import spatial
from nearfar.losses.supcon import multi_label_supcon, supcon
from nearfar.losses.wasserstein import wasserstein_gap

__all__ = [
    "adaptive_score_contrastive",
    "bidirectional_score_contrastive",
    "clip",
    "distillation",
    "focal_alpha",
    "focal_loss",
    "info_nce",
    "margin_mse",
    "multi_label_supcon",
    "siglip",
    "spatial",
    "supcon",
    "wasserstein_gap",
]
