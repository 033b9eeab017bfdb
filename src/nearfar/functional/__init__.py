"""The losses as pure functions of tensors; ``nearfar.losses`` wraps each in a module that keeps a record."""

from __future__ import annotations

from nearfar.functional.focal import focal_alpha, focal_loss
from nearfar.functional.info_nce import clip, info_nce
from nearfar.functional.multi_label_supcon import multi_label_supcon
from nearfar.functional.score_contrastive import adaptive_score_contrastive, bidirectional_score_contrastive
from nearfar.functional.siglip import siglip
from nearfar.functional.spatial import spatial
from nearfar.functional.supcon import supcon
from nearfar.functional.wasserstein import wasserstein_gap

__all__ = [
    "adaptive_score_contrastive",
    "bidirectional_score_contrastive",
    "clip",
    "focal_alpha",
    "focal_loss",
    "info_nce",
    "multi_label_supcon",
    "siglip",
    "spatial",
    "supcon",
    "wasserstein_gap",
]
