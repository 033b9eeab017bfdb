"""A rule (the fields it needs, what it looks for in them, what to do about it) and a finding with its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex, overload

from nearfar.data.files import Json
from nearfar.doctor.signals import Signals
from nearfar.errors import NearfarError, nearest_name

__all__ = [
    "SEVERITIES",
    "Evidence",
    "Finding",
    "Remedy",
    "Rule",
    "RuleBook",
    "Severity",
    "TooLittle",
    "Unjudged",
]


Severity = Literal["note", "warning", "error"]
#: from the least to the most urgent
SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")


@dataclass(frozen=True)
class Evidence:
    """What a rule found: a sentence with numbers and where they were seen, and the numbers by name.

    ``severity`` and ``title`` replace those of the rule where the numbers make the case lighter, graver or special.
    """

    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    severity: Severity | None = None
    title: str | None = None


@dataclass(frozen=True)
class Unjudged:
    """A rule that could not be judged: which fields the log lacks (one of the alternatives), or why they do not do."""

    id: str
    reason: str
    lacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True)
class Remedy:
    """What to try: ``override`` for ``nearfar train``, ``then`` further ones in order, ``advice`` in words."""

    override: str = ""
    advice: str = ""
    then: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing found in a run.

    ``evidence`` holds the numbers it rests on and, under ``text``, a sentence with them. ``override`` is what to add to
    ``nearfar train`` (``"hard_ratio=0.4"``; several are divided by spaces), "" where no option mends it; ``then``
    names what to try after it, in order. ``advice`` says the same, or what an override cannot do, in words.
    ``source`` is the paper or the reason behind the rule.

    >>> finding = Finding("target-inert", "warning", "The target is inert.", {"text": "1 % of the rows …"}, "…",
    ...                   "sampler=spatial", "Bring neighbours into the batch.", (), "…")
    >>> print(finding)
    warning target-inert: The target is inert. 1 % of the rows … Try: sampler=spatial
    """

    id: str
    severity: Severity
    title: str
    evidence: Mapping[str, object]
    cause: str
    override: str
    advice: str
    then: tuple[str, ...]
    source: str

    def to_dict(self) -> Json:
        """Plain data, as ``doctor.json`` holds it."""
        return {
            "id": self.id,
            "severity": self.severity,
            "title": self.title,
            "evidence": dict(self.evidence),
            "cause": self.cause,
            "override": self.override,
            "advice": self.advice,
            "then": list(self.then),
            "source": self.source,
        }

    def __str__(self) -> str:
        remedy = f"Try: {self.override}" if self.override else self.advice
        return f"{self.severity} {self.id}: {self.title} {self.evidence.get('text', '')} {remedy}".strip()


class TooLittle(Exception):
    """The fields are there, but do not suffice for a judgement; the text says why."""


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong (or right) with a run.

    ``needs``: alternatives, each a tuple of fields (``*`` stands for any name) that suffices for a judgement. ``look``
    takes the signals and returns ``Evidence``, or None where all is well, or raises ``TooLittle``. ``remedy`` computes
    what to try from the signals. ``looks_at`` and ``threshold`` say in words what the code does, for the
    documentation.
    """

    id: str
    severity: Severity
    title: str
    needs: tuple[tuple[str, ...], ...]
    look: Callable[[Signals], Evidence | None]
    looks_at: str
    threshold: str
    cause: str
    remedy: Callable[[Signals], Remedy]
    source: str

    def judge(self, signals: Signals) -> Finding | Unjudged | None:
        """The finding, None where there is nothing to say, or what was missing for saying either."""
        missing: list[list[str]] = [[f for f in fields if not signals.has(f)] for fields in self.needs]
        if all(missing):
            fewest = min(len(fields) for fields in missing)
            lacks = tuple(next(fields for fields in missing if len(fields) == fewest))
            return Unjudged(self.id, f"lacks {', '.join(lacks)}", lacks)
        try:
            evidence = self.look(signals)
        except TooLittle as reason:
            return Unjudged(self.id, str(reason))
        if evidence is None:
            return None
        remedy = self.remedy(signals)
        return Finding(
            id=self.id,
            severity=evidence.severity or self.severity,
            title=evidence.title or self.title,
            evidence={"text": evidence.text, **evidence.numbers},
            cause=self.cause,
            override=remedy.override,
            advice=remedy.advice,
            then=remedy.then,
            source=self.source,
        )


class RuleBook(tuple[Rule, ...]):
    """All rules in order; one is also found, and asked for, by its id.

    >>> from nearfar.doctor import RULES
    >>> RULES["target-inert"].severity, "target-inert" in RULES, RULES[0].id
    ('warning', True, 'non-finite-loss')
    """

    def __new__(cls, rules: Iterable[Rule]) -> RuleBook:
        book = super().__new__(cls, tuple(rules))
        ids = [rule.id for rule in book]
        assert len(set(ids)) == len(ids), "two rules of one id"
        return book

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids in order."""
        return tuple(rule.id for rule in self)

    def __contains__(self, item: object) -> bool:
        return item in self.ids if isinstance(item, str) else super().__contains__(item)

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> Rule: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Rule, ...]: ...
    def __getitem__(self, key: SupportsIndex | str | slice) -> Rule | tuple[Rule, ...]:
        if not isinstance(key, str):
            return super().__getitem__(key)
        for rule in self:
            if rule.id == key:
                return rule
        raise NearfarError(f"there is no rule '{key}'; {nearest_name(key, self.ids)}")
