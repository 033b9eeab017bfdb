"""What a loss saw in its last step: the numbers by which a run is judged while it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from nearfar.contrast.step import Step

__all__ = ["Record"]


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
