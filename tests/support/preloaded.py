"""Imports that a run makes late, made once for all children of the server they are forked from (``processes``)."""

from nearfar.training.fabric import _without_torchmetrics

with _without_torchmetrics():
    import lightning_fabric  # noqa: F401
