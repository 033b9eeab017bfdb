"""What a loss saw in its last step: the numbers by which a run is judged while it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Record"]


@dataclass(frozen=True)
class Record:
    """Means over the rows of a step, and over both directions where there are two.

    ``candidates``: rows each query chose from, its partner included. ``positives_per_row``, and
    ``rows_without_positives``, which are left out of the loss. ``p_positive``: mean probability given to the
    positives. ``hardest_share``: how much of the push away from negatives goes to the hardest one (1: all of
    it; 1 / number of negatives: spread evenly; 0 where there is no negative). ``uniform_level``: the loss of
    guessing, mean ln(candidates). ``floor``: the least the loss can reach. ``scale``: 1 / temperature.
    """

    candidates: float
    positives_per_row: float
    rows_without_positives: float
    p_positive: float
    hardest_share: float
    uniform_level: float
    floor: float
    scale: float

    def to_dict(self) -> dict[str, float]:
        """The fields as a mapping, as the log of a run takes them."""
        return asdict(self)
