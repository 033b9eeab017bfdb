"""An interval against a condition: supported, refuted, or not distinguishable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nearfar.errors import NearfarError, nearest_name

__all__ = ["KINDS", "OPEN", "REFUTED", "SUPPORTED", "Condition", "combine"]

SUPPORTED, REFUTED, OPEN = "supported", "refuted", "not distinguishable"

#: what a condition is called in the ledger, and how many numbers it takes
KINDS = {"greater_than": 1, "less_than": 1, "between": 2, "outside": 2}


@dataclass(frozen=True)
class Condition:
    """What must be true of one quantity.

    ``kind``: "greater_than" or "less_than" a limit, which itself does not count; "between" two limits, which do;
    "outside" is the opposite of "between".

    >>> above = Condition("greater_than", (0.0,))
    >>> above.judge(0.1, 0.3), above.judge(-0.1, 0.3), above.judge(-0.3, 0.0)
    ('supported', 'not distinguishable', 'refuted')
    >>> print(Condition("between", (0.11, 0.18)))
    0.11 to 0.18
    """

    kind: str
    limits: tuple[float, ...]

    @classmethod
    def read(cls, found: Any, where: str) -> Condition:
        """The condition of a ledger, such as ``{between: [0.11, 0.18]}``; ``where`` begins the error."""
        if not isinstance(found, Mapping) or len(found) != 1:
            raise NearfarError(
                f"{where} is {found!r}; write one condition, such as {{greater_than: 0}} or {{between: [0.11, 0.18]}}."
            )
        kind, limits = next(iter(found.items()))
        if kind not in KINDS:
            raise NearfarError(f"{where}: there is no condition '{kind}'; {nearest_name(str(kind), KINDS)}")
        numbers = limits if isinstance(limits, list) else [limits]
        if len(numbers) != KINDS[kind] or not all(map(_is_number, numbers)):
            wanted = "one number" if KINDS[kind] == 1 else "two numbers, such as [0.11, 0.18]"
            raise NearfarError(f"{where}: {kind} takes {wanted}, not {limits!r}.")
        if sorted(numbers) != numbers:
            raise NearfarError(f"{where}: {kind} {numbers} holds nothing; the lower limit comes first.")
        return cls(kind, tuple(map(float, numbers)))

    def judge(self, low: float, high: float) -> str:
        """Whether every, no, or some number from ``low`` to ``high`` fulfils the condition."""
        if math.isnan(low) or math.isnan(high):
            return OPEN
        first, last = self.limits[0], self.limits[-1]
        if self.kind == "greater_than":
            every, none = low > first, high <= first
        elif self.kind == "less_than":
            every, none = high < first, low >= first
        else:
            every, none = first <= low and high <= last, high < first or low > last
            if self.kind == "outside":
                every, none = none, every
        return SUPPORTED if every else REFUTED if none else OPEN

    def __str__(self) -> str:
        first, last = (f"{limit:g}".replace("-", "−") for limit in (self.limits[0], self.limits[-1]))
        words = {"greater_than": f"> {first}", "less_than": f"< {first}", "between": f"{first} to {last}"}
        return words.get(self.kind, f"outside {first} to {last}")


def combine(verdicts: Iterable[str]) -> str:
    """The verdict on all conditions together: one that is refuted refutes, and only all of them support.

    >>> combine(["supported", "not distinguishable"]), combine(["refuted", "not distinguishable"])
    ('not distinguishable', 'refuted')
    """
    found = set(verdicts)
    if REFUTED in found:
        return REFUTED
    return SUPPORTED if found == {SUPPORTED} else OPEN


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
