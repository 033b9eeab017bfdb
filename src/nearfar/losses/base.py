"""What the losses have in common: the record of the last call, read off the device only when it is asked for."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from nearfar.contrast import Step

__all__ = ["ContrastiveLoss", "NoNegativesWarning", "Record"]


@dataclass(frozen=True)
class Record:
    """Means over the rows of a step, and over both directions where there are two.

    ``candidates``: rows each query chose from, its positives included. ``positives_per_row``, ``positives_min``, and
    ``rows_without_positives``, which are left out of the loss. ``p_positive``: mean of exp(-loss), the probability
    given to the positive; of several, their geometric mean (sum outside the logarithm) or all of it (sum inside; of
    weighted ones, the mean weight of what is drawn).
    ``hardest_share``: how much of the push away from negatives goes to the hardest one (1: all of it; 1 / number of
    negatives: spread evenly; 0 where there is no negative). ``uniform_level``: the loss of guessing, when all
    candidates score alike. ``floor``: the least the loss can reach. ``scale``: 1 / temperature, as it was used.
    ``finite``: false where the loss is infinite or not a number. ``rows_without_negatives``: rows that nobody is pushed
    away from, since a mask leaves out all others or all are positives.

    ``extra`` holds further numbers of a certain loss; ``to_dict`` puts them beside the others.
    """

    candidates: float
    positives_per_row: float
    positives_min: float
    rows_without_positives: float
    p_positive: float
    hardest_share: float
    uniform_level: float
    floor: float
    scale: float
    finite: bool = True
    extra: dict[str, float] = field(default_factory=dict)
    rows_without_negatives: float = 0.0

    @classmethod
    def of(cls, step: Step, **extra: float) -> Record:
        """Read a step off its device."""
        *numbers, alone, finite = step.numbers().tolist()
        return cls(*numbers, bool(finite), extra, alone)  # type: ignore[call-arg]

    def to_dict(self) -> dict[str, float]:
        """The fields as a mapping, as the log of a run takes them."""
        fields = asdict(self)
        return fields | fields.pop("extra")


class NoNegativesWarning(UserWarning):
    """A mask leaves rows of a batch no negative: they take part in the loss and teach nothing."""


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
        self._masked = False  # whether a mask was given in the last call
        self._looked = self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A call that fails leaves no record, least of all that of the call before.
        self._step, self._masked = None, False
        value = super().__call__(*args, **kwargs)
        if self._masked and not self._looked and isinstance(value, Tensor) and value.device.type == "cpu":
            self._looked = True  # once; later, and on a device, whoever reads the record hears of it
            self._warn_of(self._read(), 3)
        return value

    @property
    def record(self) -> Record | None:
        found = self._read()
        self._warn_of(found, 3)
        return found

    def _read(self) -> Record | None:
        return None if self._step is None else Record.of(self._step, **self._extra())

    def _warn_of(self, found: Record | None, level: int) -> None:
        """Say once that a mask leaves rows without a negative."""
        if self._masked and found is not None and found.rows_without_negatives and not self._warned:
            self._warned = True
            warnings.warn(
                f"mask leaves {found.rows_without_negatives:g} rows of a batch no negative: their loss says nothing, "
                "and nothing is learned from them. Leave out fewer pairs (a higher threshold), or take larger or more "
                "varied batches; record.rows_without_negatives counts such rows in every step",
                NoNegativesWarning,
                stacklevel=level,
            )

    def _extra(self) -> dict[str, float]:
        """Numbers of this loss alone."""
        return {}
