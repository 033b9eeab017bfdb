"""Losses as modules: they take embeddings, return a 0-d tensor, and keep a record of the last step."""

from __future__ import annotations

from nearfar.losses.info_nce import InfoNCELoss
from nearfar.losses.masks import duplicate_mask, false_negative_mask
from nearfar.losses.record import Record

__all__ = ["InfoNCELoss", "Record", "duplicate_mask", "false_negative_mask"]
