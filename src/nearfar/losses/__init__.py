"""Losses as modules: they take embeddings, return a 0-d tensor, and keep a record of the last step."""

from __future__ import annotations

from nearfar.contrast import DuplicateMask, IndexMask, NoPositivesWarning, SimilarityMask
from nearfar.losses.base import ContrastiveLoss
from nearfar.losses.info_nce import ClipLoss, InfoNCELoss
from nearfar.losses.masks import duplicate_mask, false_negative_mask
from nearfar.losses.record import Record
from nearfar.losses.score_contrastive import AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss
from nearfar.losses.siglip import SigLipLoss
from nearfar.losses.spatial import SpatialLoss
from nearfar.losses.supcon import MultiLabelSupConLoss, SupConLoss

__all__ = [
    "AdaptiveScoreContrastiveLoss",
    "BidirectionalScoreContrastiveLoss",
    "ClipLoss",
    "ContrastiveLoss",
    "DuplicateMask",
    "IndexMask",
    "InfoNCELoss",
    "MultiLabelSupConLoss",
    "NoPositivesWarning",
    "Record",
    "SigLipLoss",
    "SimilarityMask",
    "SpatialLoss",
    "SupConLoss",
    "duplicate_mask",
    "false_negative_mask",
]
