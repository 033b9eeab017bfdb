"""What the doctor says: a finding, with its evidence, its likely cause and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SEVERITIES", "Evidence", "Finding", "Remedy", "Severity", "Unjudged"]

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
    evidence: Mapping[str, Any]
    cause: str
    override: str
    advice: str
    then: tuple[str, ...]
    source: str

    def to_dict(self) -> dict[str, Any]:
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
