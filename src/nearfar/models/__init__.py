"""Heads and encoders that several systems share."""

from __future__ import annotations

from nearfar.models.projection import ProjectionHead

__all__ = ["ProjectionHead"]
