"""What the losses have in common: the record of the last call, read off the device only when somebody asks."""

from __future__ import annotations

from typing import Any

from torch import nn

from nearfar.contrast import Step
from nearfar.losses.record import Record

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(nn.Module):
    """A loss without weights of its own that remembers what it saw last.

    ``record`` is the ``Record`` of the last call, None before the first. Reading it waits for the device; a step that
    nobody asks about does not.
    """

    #: names of arguments that hold positions in the batch (they shift when batches of several processes are joined)
    positions: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._step: Step | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._step = None  # a call that fails leaves no record, least of all that of the call before
        return super().__call__(*args, **kwargs)

    @property
    def record(self) -> Record | None:
        return None if self._step is None else Record.of(self._step, **self._extra())

    def _extra(self) -> dict[str, float]:
        """Numbers of this loss alone."""
        return {}
