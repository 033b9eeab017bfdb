"""Targets (who belongs to whom) and the one tiled computation behind every contrastive loss."""

from __future__ import annotations

from nearfar.contrast.dense import dense_own_pairs, dense_sigmoid, dense_softmax
from nearfar.contrast.fused import KernelTime, measure_kernels, use_kernel
from nearfar.contrast.guides import GuideMask, NegativeWeights, guide_threshold
from nearfar.contrast.kernel import sigmoid_sums
from nearfar.contrast.masks import (
    DenseMask,
    DuplicateMask,
    IndexMask,
    Mask,
    PairMask,
    SimilarityMask,
    as_mask,
    checked_mask,
    is_directed,
    is_soft,
    join_masks,
)
from nearfar.contrast.numerics import computing_dtype, embeddings, uncompiled, unit_rows
from nearfar.contrast.one_direction import one_direction_loss
from nearfar.contrast.positives import Rectangle
from nearfar.contrast.running_sums import Direction, Statistics, Step
from nearfar.contrast.softmax import (
    Extra,
    NoPositivesWarning,
    Sums,
    log_sums,
    softmax_loss,
)
from nearfar.contrast.targets import (
    Columns,
    LabelOverlap,
    NoPositives,
    OwnPair,
    SameClass,
    SparseWeights,
    Target,
    Weights,
)

__all__ = [
    "Columns",
    "DenseMask",
    "Direction",
    "DuplicateMask",
    "Extra",
    "GuideMask",
    "IndexMask",
    "KernelTime",
    "LabelOverlap",
    "Mask",
    "NegativeWeights",
    "NoPositives",
    "NoPositivesWarning",
    "OwnPair",
    "PairMask",
    "Rectangle",
    "SameClass",
    "SimilarityMask",
    "SparseWeights",
    "Statistics",
    "Step",
    "Sums",
    "Target",
    "Weights",
    "as_mask",
    "checked_mask",
    "computing_dtype",
    "dense_own_pairs",
    "dense_sigmoid",
    "dense_softmax",
    "embeddings",
    "guide_threshold",
    "is_directed",
    "is_soft",
    "join_masks",
    "log_sums",
    "measure_kernels",
    "one_direction_loss",
    "sigmoid_sums",
    "softmax_loss",
    "uncompiled",
    "unit_rows",
    "use_kernel",
]
