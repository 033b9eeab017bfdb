"""Rules: what the value of an option may be, in code and in the words of a table; anything else is an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nearfar.errors import NearfarError, nearest_name
from nearfar.schedules import Constant, Linear, Piecewise, Schedule, Step, schedule

__all__ = ["Choice", "Encoding", "Names", "Number", "Rule", "Scheduled", "Switch", "Text", "shown"]


class Rule(Protocol):
    """What a value may be; ``check`` raises ``NearfarError`` for anything else."""

    def check(self, name: str, value: object) -> None: ...


@dataclass(frozen=True)
class Number:
    """A finite number between ``least`` and ``most`` (without the ends themselves where ``inside``).

    >>> Number(1, whole=True).check("epochs", 2.0)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: epochs=2.0: a whole number is needed.
    """

    least: float | None = None
    most: float | None = None
    whole: bool = False
    inside: bool = False
    optional: bool = False

    def check(self, name: str, value: object) -> None:
        if value is None and self.optional:
            return
        kinds = int if self.whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
            wanted = "a whole number" if self.whole else "a finite number"
            raise NearfarError(f"{name}={shown(value)}: {wanted}{' or null' * self.optional} is needed.")
        low = -math.inf if self.least is None else self.least
        high = math.inf if self.most is None else self.most
        if not (low < value < high if self.inside else low <= value <= high):
            raise NearfarError(f"{name}={value} is out of range: {self}.")

    def __str__(self) -> str:
        if self.least is None and self.most is None:
            return "whole" if self.whole else "any number"
        if self.most is None:
            return f"at least {self.least:.10g}"
        low = "any" if self.least is None else f"{self.least:.10g}"
        return f"{low} to {self.most:.10g}" + " without the ends" * self.inside


@dataclass(frozen=True)
class Choice:
    """One of some names.

    >>> Choice(("number", "skip", "replace")).check("exists", "repalce")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: exists=repalce: no such choice; did you mean 'replace'?
    """

    names: Sequence[str]
    optional: bool = False

    def check(self, name: str, value: object) -> None:
        if value is None and self.optional:
            return
        if not isinstance(value, str) or value not in self.names:
            raise NearfarError(
                f"{name}={shown(value)}: no such choice; {nearest_name(str(value), self.names)}"
            )

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclass(frozen=True)
class Switch:
    """True or false."""

    optional: bool = False

    def check(self, name: str, value: object) -> None:
        if not isinstance(value, bool) and not (value is None and self.optional):
            raise NearfarError(f"{name}={shown(value)}: true or false is needed.")

    def __str__(self) -> str:
        return "true, false"


@dataclass(frozen=True)
class Text:
    """Text that is not empty; ``number`` lets a bare number stand for its digits, as in a file called 123."""

    optional: bool = False
    number: bool = False

    def check(self, name: str, value: object) -> None:
        if value is None and self.optional:
            return
        digits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if digits and self.number and isinstance(value, int):
            return
        if not isinstance(value, str):
            quoted = f" Quote a name of digits: {name}='\"{value}\"'." if digits else ""
            raise NearfarError(f"{name}={shown(value)}: text is needed.{quoted}")
        if not value.strip():
            null = f"; {name}=null leaves it out" if self.optional else ""
            raise NearfarError(f"{name} is empty{null}.")

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True)
class Scheduled:
    """A number, or a schedule of numbers over the epochs (``nearfar.schedules``), each between ``least`` and ``most``.

    ``what`` names a value in messages: "a whole number of neighbours".

    >>> Scheduled(0, 1, what="a share of the batch").check("hard_ratio", "0.3 -> 1.6")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: hard_ratio=0.3 -> 1.6: a share of the batch between 0 and 1 is needed.
    """

    least: float = -math.inf
    most: float = math.inf
    whole: bool = False
    what: str = "a number"

    def check(self, name: str, value: object) -> None:
        try:
            values = _named_values(schedule(value))
            inside = all(self.least <= each <= self.most for each in values)
        except (TypeError, ValueError) as error:
            raise NearfarError(f"{name}={value}: {error}") from None
        if not inside:
            ends = (
                f"of at least {self.least:g}"
                if math.isinf(self.most)
                else f"between {self.least:g} and {self.most:g}"
            )
            raise NearfarError(f"{name}={value}: {self.what} {ends} is needed.")
        if self.whole and any(each != int(each) for each in values):
            raise NearfarError(f"{name}={value}: {self.what} is needed.")

    def __str__(self) -> str:
        ends = f"at least {self.least:g}" if math.isinf(self.most) else f"{self.least:g} to {self.most:g}"
        return f"{ends}, or a schedule"


@dataclass(frozen=True)
class Encoding:
    """The encoding of text files; null leaves it to the file."""

    optional: bool = True

    def check(self, name: str, value: object) -> None:
        from nearfar.data.delimited import require_text_encoding

        if value is not None:
            require_text_encoding(str(value), name)

    def __str__(self) -> str:
        return "an encoding that Python knows"


@dataclass(frozen=True)
class Names:
    """One of some names, or a list of them.

    >>> Names(("morgan", "maccs")).check("fingerprints", ["morgn"])
    Traceback (most recent call last):
    nearfar.errors.NearfarError: fingerprints=morgn: there is no such name; did you mean 'morgan'?
    """

    names: Sequence[str]
    optional: bool = False

    def check(self, name: str, value: object) -> None:
        if value is None and self.optional:
            return
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            raise NearfarError(
                f"{name}={shown(value)}: a list of names is needed, such as [{self.names[0]}]."
            )
        if not listed:
            raise NearfarError(f"{name} is empty; known: {', '.join(self.names)}.")
        for each in listed:
            if each not in self.names:
                raise NearfarError(f"{name}={each}: there is no such name; {nearest_name(each, self.names)}")

    def __str__(self) -> str:
        return "one or several of " + ", ".join(self.names)


def _named_values(rule: Schedule) -> tuple[float, ...]:
    """The values that a schedule was given; those between them lie between them."""
    match rule:
        case Constant(value):
            return (float(value),)
        case Linear(start, end):
            return (float(start), float(end))
        case Step(values):
            return tuple(float(value) for value in values)
        case Piecewise(points):
            return tuple(float(value) for _, value in points)
    return ()


def shown(value: object) -> str:
    return "null" if value is None else str(value)
