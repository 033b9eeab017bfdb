"""Targets (who belongs to whom) and the one tiled computation behind every contrastive loss."""

from __future__ import annotations

from nearfar.contrast.few import few_rows
from nearfar.contrast.masks import (
    DenseMask,
    DuplicateMask,
    IndexMask,
    Mask,
    SimilarityMask,
    as_mask,
    checked_mask,
    join_masks,
)
from nearfar.contrast.normalize import embeddings, unit_rows
from nearfar.contrast.one_direction import one_direction_loss
from nearfar.contrast.pairs import few_pairs
from nearfar.contrast.precision import computing_dtype, uncompiled
from nearfar.contrast.query_losses import Sums, check_denominator, check_reduction
from nearfar.contrast.sigmoid import sigmoid_sums
from nearfar.contrast.sigmoid_pairs import few_sigmoid_pairs
from nearfar.contrast.softmax import Extra, NoPositivesWarning, log_sums, softmax_loss
from nearfar.contrast.step import Direction, Step
from nearfar.contrast.sums import Statistics
from nearfar.contrast.targets import Columns, Nobody, OwnPair, SameClass, Target
from nearfar.contrast.weighted_targets import LabelOverlap, SparseWeights, Weights

__all__ = [
    "Columns",
    "DenseMask",
    "Direction",
    "DuplicateMask",
    "Extra",
    "IndexMask",
    "LabelOverlap",
    "Mask",
    "NoPositivesWarning",
    "Nobody",
    "OwnPair",
    "SameClass",
    "SimilarityMask",
    "SparseWeights",
    "Statistics",
    "Step",
    "Sums",
    "Target",
    "Weights",
    "as_mask",
    "check_denominator",
    "check_reduction",
    "checked_mask",
    "computing_dtype",
    "embeddings",
    "few_pairs",
    "few_rows",
    "few_sigmoid_pairs",
    "join_masks",
    "log_sums",
    "one_direction_loss",
    "sigmoid_sums",
    "softmax_loss",
    "uncompiled",
    "unit_rows",
]
