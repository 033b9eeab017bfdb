"""What a report says first of a run: how far above chance it is, and what the doctor found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nearfar.data.files import read_json
from nearfar.lab.words import metric_words, short_number
from nearfar.metrics import Estimate
from nearfar.training.run_folder import RunFolder

__all__ = ["RunVerdict", "run_verdict"]

ORDER = ("error", "warning", "note")


@dataclass(frozen=True)
class RunVerdict:
    """``result`` is a sentence on the monitored metric, ``health`` one on the findings; ``findings`` gravest first.

    ``kind`` is good, bad or unsure, for the colour.
    """

    result: str
    health: str
    kind: str
    findings: list[dict[str, Any]] = field(default_factory=list)
    judged: bool = False


def _diagnosis(value: Any) -> str | None:
    """What is wrong with the content of ``doctor.json``: findings, alone in a list or in a mapping."""
    findings = value.get("findings", []) if isinstance(value, Mapping) else value
    if not isinstance(findings, list) or not all(isinstance(each, Mapping) for each in findings):
        return "holds no list of findings"
    unjudged = value.get("unjudged", []) if isinstance(value, Mapping) else []
    return None if isinstance(unjudged, list) else "holds no list of rules that were not judged"


def run_verdict(folder: RunFolder) -> RunVerdict:
    """The verdict of a finished run from ``metrics.json`` and, where there is one, ``doctor.json``."""
    metrics = folder.read_json("metrics.json")
    result, above = _result(metrics)
    path = folder.path / "doctor.json"
    if not folder.has("doctor.json"):
        health = "The doctor has not judged this run (nearfar doctor RUN)."
        return RunVerdict(result, health, "unsure" if above is None else "good" if above else "bad")
    content = read_json(path, _diagnosis)
    found = content.get("findings", []) if isinstance(content, Mapping) else content
    findings = sorted((_readable(f) for f in found), key=lambda f: ORDER.index(f["severity"]))
    grave = [f for f in findings if f["severity"] != "note"]
    if grave:
        counts = {kind: sum(f["severity"] == kind for f in grave) for kind in ("error", "warning")}
        told = " and ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items() if n)
        health = f"The doctor found {told}: " + "; ".join(f["title"].rstrip(".") for f in grave) + "."
    else:
        health = "The doctor found no warning and no error."
        unjudged = content.get("unjudged", []) if isinstance(content, Mapping) else []
        if unjudged:
            health += f" {len(unjudged)} rules could not be judged from what this run recorded or has."
    kind = "bad" if above is False or any(f["severity"] == "error" for f in grave) else "good"
    return RunVerdict(result, health, "unsure" if grave and kind == "good" else kind, findings, True)


def _result(metrics: Mapping[str, Any]) -> tuple[str, bool | None]:
    splits = metrics["splits"]
    split = "test" if metrics["monitor"] in splits.get("test", {}) else next(iter(splits))
    content = splits[split].get(metrics["monitor"])
    if content is None:
        return f"{metrics['monitor']} was not measured on {split}.", None
    e = Estimate.from_dict(content)
    name = metric_words(metrics["monitor"])
    gallery = f" among {e.protocol['gallery']} candidates" if "gallery" in e.protocol else ""
    numbers = f"{short_number(e.value)}, 95 % interval {short_number(e.low)} to {short_number(e.high)}"
    start = f"{name} on {split} is {numbers} ({e.n} items{gallery}). "
    if e.trivial:
        return start + "It is trivial here: no model could have scored otherwise.", None
    chance = short_number(e.chance)
    if e.low <= e.chance <= e.high:
        return (
            start + f"Guessing scores {chance}, which the interval covers: nothing shows that it learned.",
            False,
        )
    if (e.value > e.chance) == e.higher_is_better:
        times = e.value / e.chance if e.chance else float("nan")
        much = f", {times:.0f} times less" if times >= 2 else ""
        return start + f"Guessing scores {chance}{much}.", True
    return start + f"Guessing scores {chance}: this run is worse than guessing.", False


def _readable(finding: Mapping[str, Any]) -> dict[str, Any]:
    """A finding with all the fields the page shows; evidence as a sentence and numbers by name."""
    evidence = finding.get("evidence") or {}
    if not isinstance(evidence, Mapping):
        evidence = {"text": str(evidence)}
    numbers = {k: v for k, v in evidence.items() if k != "text" and isinstance(v, int | float)}
    severity = finding.get("severity", "note")
    return {
        "id": finding.get("id", ""),
        "severity": severity if severity in ORDER else "note",
        "title": finding.get("title", finding.get("id", "")),
        "text": evidence.get("text") or finding.get("sentence") or "",
        "numbers": numbers,
        "cause": finding.get("cause", ""),
        "override": finding.get("override") or "",
        "advice": finding.get("advice", ""),
        "then": list(finding.get("then") or []),
        "source": finding.get("source", ""),
    }
