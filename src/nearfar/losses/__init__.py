"""Losses as modules: they take embeddings, return a 0-d tensor, and keep a record of the last step."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NoReturn

from nearfar.contrast import (
    DuplicateMask,
    GuideMask,
    IndexMask,
    NegativeWeights,
    NoPositivesWarning,
    PairMask,
    Rectangle,
    SimilarityMask,
    Target,
)
from nearfar.errors import NearfarError
from nearfar.losses.arguments import duplicate_mask, false_negative_mask
from nearfar.losses.base import ContrastiveLoss, LossTraits, NoNegativesWarning, Record, Requires
from nearfar.losses.distillation import DistillationLoss, MarginMSELoss
from nearfar.losses.explain import BatchExplanation, explain_batch
from nearfar.losses.focal import FocalLoss, FocalRecord
from nearfar.losses.info_nce import ClipLoss, InfoNCELoss
from nearfar.losses.matryoshka import MatryoshkaLoss
from nearfar.losses.memory import CrossBatchMemory
from nearfar.losses.objective import GradientShares, Objective, ObjectiveRecord
from nearfar.losses.score_contrastive import AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss
from nearfar.losses.siglip import SigLipLoss
from nearfar.losses.spatial import SpatialLoss
from nearfar.losses.supcon import MultiLabelSupConLoss, SupConLoss
from nearfar.losses.target import target_loss
from nearfar.losses.views import ViewContext, ViewLoss
from nearfar.losses.wasserstein import WassersteinGapLoss, WassersteinRecord

__all__ = [
    "AdaptiveScoreContrastiveLoss",
    "BatchExplanation",
    "BidirectionalScoreContrastiveLoss",
    "ClipLoss",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "DistillationLoss",
    "DuplicateMask",
    "FocalLoss",
    "FocalRecord",
    "GradientShares",
    "GuideMask",
    "IndexMask",
    "InfoNCELoss",
    "LossTraits",
    "MarginMSELoss",
    "MatryoshkaLoss",
    "MultiLabelSupConLoss",
    "NegativeWeights",
    "NoNegativesWarning",
    "NoPositivesWarning",
    "Objective",
    "ObjectiveRecord",
    "PairMask",
    "Record",
    "Rectangle",
    "Requires",
    "SigLipLoss",
    "SimilarityMask",
    "SpatialLoss",
    "SupConLoss",
    "Target",
    "ViewContext",
    "ViewLoss",
    "WassersteinGapLoss",
    "WassersteinRecord",
    "duplicate_mask",
    "explain_batch",
    "false_negative_mask",
    "target_loss",
]


class _File(ModuleType):
    """A file of losses that has the name of the function in it: who calls the file is told where the function is."""

    def __call__(self, *_: object, **__: object) -> NoReturn:
        name = self.__name__.rpartition(".")[2]
        raise NearfarError(
            f"{self.__name__} is a file: the function is nearfar.functional.{name} (from nearfar.functional import "
            f"{name}), and nearfar.losses has it as a module with a record."
        )


for _name in ("distillation", "info_nce", "siglip", "spatial", "supcon"):
    sys.modules[f"{__name__}.{_name}"].__class__ = _File
