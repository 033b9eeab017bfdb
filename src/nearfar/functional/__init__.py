"""The losses as pure functions of tensors; ``nearfar.losses`` wraps each in a module that keeps a record."""

from __future__ import annotations

from nearfar.functional.nce import info_nce

__all__ = ["info_nce"]
