"""Imports that a run makes late, made once for all children of the server they are forked from (``processes``)."""

from nearfar.training.fabric import versions_by_metadata

with versions_by_metadata():
    import lightning_fabric  # noqa: F401
