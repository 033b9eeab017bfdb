"""From signals to findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from nearfar.data.files import Json
from nearfar.doctor.fields import matches
from nearfar.doctor.phases import gain_sentence, monitor
from nearfar.doctor.rule import SEVERITIES, Finding, Unjudged
from nearfar.doctor.rules import RULES
from nearfar.doctor.signals import Signals

__all__ = ["Diagnosis", "diagnose"]

#: fields that any loop can log in a line, with which most is known
EASILY_LOGGED = ("candidates", "val/R@1", "lr", "gradient_norm", "embeddings/mean_cosine")


class Diagnosis(list[Finding]):
    """The findings, the gravest first, and in ``unjudged`` the rules that could not be judged and why.

    A rule in neither has looked and found nothing. ``verdict`` is one line. ``unread`` counts lines of the log that
    are no records; ``assumed`` says what was taken for granted in reading it, such as empty cells of a table;
    ``read_as``, of the log of a different trainer, which of its names were taken for what, and which not understood;
    ``worth_logging``, fields that are easily logged and the rules that could be judged with them;
    ``gain``, in a sentence, what training changed in the monitored metric, where the score before it is known.
    """

    def __init__(
        self,
        findings: Iterable[Finding],
        unjudged: Iterable[Unjudged],
        judged: int,
        unread: int = 0,
        assumed: Iterable[str] = (),
        read_as: Iterable[str] = (),
        gain: str | None = None,
        worth_logging: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        super().__init__(findings)
        self.worth_logging = {name: list(rules) for name, rules in (worth_logging or {}).items()}
        self.gain = gain
        self.unread = unread
        self.assumed = list(assumed)
        self.read_as = list(read_as)
        self.unjudged = list(unjudged)
        self.judged = judged

    @property
    def ids(self) -> list[str]:
        """The ids of what was found."""
        return [finding.id for finding in self]

    def of(self, *severities: str) -> list[Finding]:
        """The findings of some severities."""
        return [finding for finding in self if finding.severity in severities]

    @property
    def healthy(self) -> bool:
        """Whether there is neither a warning nor an error."""
        return not self.of("warning", "error")

    @property
    def verdict(self) -> str:
        """One line: how grave it is, what leads, and how much could be judged."""
        counts = [(len(self.of(severity)), severity) for severity in reversed(SEVERITIES)]
        by_severity = ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts if n)
        names = ", ".join(finding.id for finding in self.of("warning", "error"))
        judged = f"{self.judged} of {self.judged + len(self.unjudged)} rules could be judged"
        if self.unread:
            judged += f"; {self.unread} unreadable line{'s' if self.unread > 1 else ''} of the log left out"
        judged += "".join(f"; {text}" for text in self.assumed)
        if not self.judged:
            return f"nothing is known of this run ({judged})"
        if names:
            return f"{by_severity}: {names} ({judged})"
        return f"no warning, no error{f'; {by_severity}' if by_severity else ''} ({judged})"

    @property
    def lines(self) -> list[str]:
        """What a training prints at its end: the verdict, what training changed, warnings and errors."""
        gain = [f"  {self.gain}"] if self.gain else []
        return [self.verdict, *gain, *(f"  {finding}" for finding in self.of("error", "warning"))]

    def to_dict(self) -> Json:
        """Plain data, as ``doctor.json`` holds it."""
        return {
            "verdict": self.verdict,
            "healthy": self.healthy,
            "gain": self.gain,
            "findings": [finding.to_dict() for finding in self],
            "judged": self.judged,
            "unread": self.unread,
            "assumed": self.assumed,
            "read_as": self.read_as,
            "worth_logging": self.worth_logging,
            "unjudged": [{"id": u.id, "reason": u.reason, "lacks": list(u.lacks)} for u in self.unjudged],
        }


def diagnose(
    signals: object, context: Mapping[str, object] | None = None, names: Mapping[str, str] | None = None
) -> Diagnosis:
    """What is wrong, or remarkably right, with a run.

    ``signals`` is a path (a run folder, or the log of a different trainer, whose names are translated: ``names`` says
    what one means, ``{"loss": "train/contrast"}``), a table (pandas, polars, pyarrow), a list of log records or of
    rows as ``csv.DictReader`` gives them, a mapping of fields to series of one length (a single number is a
    constant), or ``Signals``. An empty cell was not measured; docs/doctor.md says when a NaN is one. ``context``
    states what does not change during the run and goes over what the signals know of it. ``nearfar.doctor.fields``
    and docs/doctor.md list all names; the more fields, the more rules can be judged.

    Raises ``NearfarError`` for other input, series of different lengths, and fields that are not numeric.

    >>> diagnosis = diagnose({"loss": [4.16, 4.15, 4.17, 4.16, 4.15, 4.16, 4.16, 4.15], "candidates": 64})
    >>> diagnosis.ids, diagnosis[0].severity
    (['loss-at-chance'], 'error')
    >>> print(diagnosis[0].evidence["text"])
    Mean loss 4.157 in steps 6 to 8; guessing costs 4.159, taken as ln(candidates) (+0% of the way to the floor).
    >>> "collapse" in [rule.id for rule in diagnosis.unjudged]
    True
    """
    read = Signals.of(signals, context, names)
    findings, unjudged = [], []
    for rule in RULES:
        outcome = rule.judge(read)
        if isinstance(outcome, Finding):
            findings.append(replace(outcome, override="", then=()) if read.foreign else outcome)
        elif outcome is not None:
            unjudged.append(outcome)
    findings.sort(key=lambda finding: -SEVERITIES.index(finding.severity))
    known = read.context | {"splits": read.context.get("metrics")}
    gain = gain_sentence(known) if read.context.get("gain") else None
    judged = len(RULES) - len(unjudged)
    read_as = list(read.read_as)
    if read_as and len(read.named("val/*")) > 1:
        read_as.append(f"metric that matters: {monitor(read).name} (a different one by --map monitor=NAME)")
    return Diagnosis(findings, unjudged, judged, read.unread, read.assumed, read_as, gain,
                     _worth_logging(read, unjudged))  # fmt: skip


def _worth_logging(signals: Signals, unjudged: Iterable[Unjudged]) -> dict[str, list[str]]:
    """Of the fields that are easily logged and are not there, the rules that each alone would let judge."""
    lacking = [RULES[rule.id] for rule in unjudged if rule.lacks]
    gained = {}
    for name in EASILY_LOGGED:
        rules = [
            rule.id
            for rule in lacking
            if any(
                all(signals.has(field) or matches(field, name) for field in fields) for fields in rule.needs
            )
        ]
        if rules:
            gained[name] = rules
    return gained
