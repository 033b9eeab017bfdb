"""A run or a comparison in sentences: distance from chance, the doctor's findings, possible causes of a difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from omegaconf import DictConfig

from nearfar.config.samplers import sampler_choices
from nearfar.data.files import Json, read_json
from nearfar.doctor.gain import gain_sentence
from nearfar.lab.compare import Arm, Comparison
from nearfar.lab.curves import PlanRecord, plans_of
from nearfar.lab.sweep import sweep_of
from nearfar.lab.table import FEW
from nearfar.metrics import Estimate
from nearfar.terminal import metric_words, short_number
from nearfar.training.run_folder import RunFolder

__all__ = ["RunVerdict", "ShownFinding", "describe_comparison", "run_verdict"]


ORDER = ("error", "warning", "note")


@dataclass(frozen=True)
class ShownFinding:
    """A finding of ``doctor.json`` as the page shows it: ``text`` is the evidence, ``numbers`` are those behind it."""

    id: str
    severity: str
    title: str
    text: str
    numbers: Mapping[str, float]
    cause: str
    override: str
    advice: str
    then: Sequence[str]
    source: str

    @classmethod
    def read(cls, finding: Json) -> ShownFinding:
        """From ``doctor.json`` of this or an earlier version, whose evidence may be a sentence alone."""
        evidence = finding.get("evidence") or {}
        if not isinstance(evidence, Mapping):
            evidence = {"text": str(evidence)}
        severity = finding.get("severity", "note")
        return cls(
            id=finding.get("id", ""),
            severity=severity if severity in ORDER else "note",
            title=finding.get("title") or finding.get("id", ""),
            text=evidence.get("text") or finding.get("sentence") or "",
            numbers={k: v for k, v in evidence.items() if k != "text" and isinstance(v, int | float)},
            cause=finding.get("cause", ""),
            override=finding.get("override") or "",
            advice=finding.get("advice", ""),
            then=list(finding.get("then") or []),
            source=finding.get("source", ""),
        )


@dataclass(frozen=True)
class RunVerdict:
    """``result`` is a sentence on the monitored metric, ``health`` one on the findings; ``findings`` gravest first.

    ``kind`` is good, bad or unsure, for the colour.
    """

    result: str
    health: str
    kind: str
    findings: list[ShownFinding] = field(default_factory=list)
    judged: bool = False


def _diagnosis(value: object) -> str | None:
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
    if sentence := gain_sentence(metrics):
        result += f" {sentence}."
    path = folder.path / "doctor.json"
    if not folder.has("doctor.json"):
        health = "The doctor has not judged this run (nearfar doctor RUN)."
        return RunVerdict(result, health, "unsure" if above is None else "good" if above else "bad")
    content = read_json(path, _diagnosis)
    written = content.get("findings", []) if isinstance(content, Mapping) else content
    findings = sorted(map(ShownFinding.read, written), key=lambda f: ORDER.index(f.severity))
    grave = [f for f in findings if f.severity != "note"]
    if grave:
        counts = {kind: sum(f.severity == kind for f in grave) for kind in ("error", "warning")}
        numbers = " and ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items() if n)
        health = f"The doctor found {numbers}: " + "; ".join(f.title.rstrip(".") for f in grave) + "."
    else:
        health = "The doctor found no warning and no error."
        unjudged = content.get("unjudged", []) if isinstance(content, Mapping) else []
        if unjudged:
            health += f" {len(unjudged)} rules could not be judged from what this run recorded or has."
    kind = "bad" if above is False or any(f.severity == "error" for f in grave) else "good"
    return RunVerdict(result, health, "unsure" if grave and kind == "good" else kind, findings, True)


def _result(metrics: Json) -> tuple[str, bool | None]:
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
        return start + "It is trivial here: every model scores the same.", None
    chance = short_number(e.chance)
    if e.low <= e.chance <= e.high:
        return (
            start
            + f"Guessing scores {chance}, which the interval covers: nothing shows that the model learned.",
            False,
        )
    if (e.value > e.chance) == e.higher_is_better:
        times = e.value / e.chance if e.chance else float("nan")
        much = f", {times:.0f} times less" if times >= 2 else ""
        return start + f"Guessing scores {chance}{much}.", True
    return start + f"Guessing scores {chance}: this run is worse than guessing.", False


#: findings on batches that may be the reason why hard ones did not help
OF_BATCHES = ("hardness-depleted", "hardness-not-above-random", "false-negatives", "duplicates")
#: training rows below which random batches of a usual size hold many near neighbours
FEW_ITEMS = 5000


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def describe_comparison(comparison: Comparison) -> list[str]:
    """A sweep's verdict, a paragraph for each arm beside the baseline (of many arms: the best), then notes."""
    paragraphs = []
    monitor = comparison.monitor
    sweep = sweep_of(comparison)
    arms = comparison.arms
    if sweep is not None and sweep.best is not None:
        paragraphs.append(sweep.verdict)
        if len(arms) > FEW:
            arms = [sweep.best]
    for arm in arms:
        difference = comparison.differences.get(arm.label, {}).get(monitor)
        if difference is None:
            continue
        interval = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        name = metric_words(monitor)
        base = comparison.baseline.label
        if difference.verdict == "not distinguishable":
            text = f"{arm.label} is not distinguishable from {base} by {name}: {interval} covers 0."
        else:
            text = f"{arm.label} is {difference.verdict} than {base} by {name}: {interval} excludes 0."
        text += f" The interval is over {difference.scope}."
        differences = comparison.differences[arm.label]
        results = comparison.results(differences)
        differing = [m for m, d in differences.items() if d.verdict != "not distinguishable"]
        others = [m for m in results if m != monitor and m in differing]
        if others:
            own = "differs by its own interval" if len(others) == 1 else "differ by their own intervals"
            text += (
                f" {len(others)} of the {len(results) - 1} other metrics {own}; one in twenty does so by chance, and "
                "they are not independent."
            )
        if comparison.judged_together > 1:
            remaining = [m for m, v in comparison.together[arm.label].items() if v != "not distinguishable"]
            text += (
                f" Judged together with all {comparison.judged_together} differences looked at (Holm), "
                + (
                    f"{', '.join(map(metric_words, remaining))} still differ{'s' if len(remaining) == 1 else ''}."
                    if remaining
                    else "none differs."
                )
            )
        controls = [m for m in differences if m in comparison.controls]
        if controls:
            names = ", ".join(metric_words(m) for m in controls if m in differing)
            text += f" Controls are not counted ({len(controls)}): " + (
                f"{names} differ{'' if ',' in names else 's'} by the interval alone."
                if names
                else "none differs."
            )
        plans = [plan for plan in plans_of(arm.runs[min(arm.runs)]) if not plan.get("random_phase")]
        if plans and _composes_hard_batches(arm.config):
            text += " " + _batches(plans, arm, difference.verdict == "better")
        paragraphs.append(text)
        paragraphs.append(f"{arm.label}: {comparison.losses[arm.label]}.")
    return [*paragraphs, *comparison.notes, *_unhealthy(comparison)]


def _unhealthy(comparison: Comparison) -> list[str]:
    """A line for each run in which the doctor found an error or a warning: its numbers may not be what they seem."""
    lines = []
    for arm in comparison.arms:
        for fold, seed, run in arm.every_run():
            grave = [f.id for f in run_verdict(run).findings if f.severity != "note"]
            if grave:
                which = f"{arm.label}, {fold}, seed {seed}" if fold else f"{arm.label}, seed {seed}"
                lines.append(f"{which}: the doctor found {', '.join(grave)} (nearfar doctor {run}).")
    return lines


def _batches(plans: list[PlanRecord], arm: Arm, gained: bool) -> str:
    hardness = _mean([value for plan in plans for value in plan["hardness"]])
    chance = plans[0]["hardness_random"]
    levels = [level for plan in plans if (level := plan.get("last_to_first")) is not None]
    level = _mean(levels or [1.0])
    text = (
        f"Its batches were {hardness / chance:.1f} times as hard as random ones ({hardness:.1f} of an item's nearest "
        f"neighbours in its batch, random {chance:.1f}), the last tenth of an epoch at {level:.2f} of the first."
    )
    if gained:
        return text
    run = arm.runs[min(arm.runs)]
    judged = run_verdict(run)
    causes = [_cause(finding) for finding in judged.findings if finding.id in OF_BATCHES]
    rows = run.read_json("dataset_layout.json").get("splits", {}).get("train", {}).get("rows")
    if rows is not None and rows < FEW_ITEMS:
        causes.append(
            f"few items: {rows} training rows, so that random batches already hold many near neighbours"
        )
    if causes:
        return text + " Measured, and possible causes: " + "; ".join(causes) + "."
    if not judged.judged:
        return text + " Whether the batches were sound is not known: nearfar doctor has not judged the run."
    return (
        text
        + " The doctor found nothing wrong with them, and there are enough items: hardness itself did not help here."
    )


def _cause(finding: ShownFinding) -> str:
    """A finding as half a sentence, with the override that it prescribes."""
    words = f"{finding.title.rstrip('.')} ({finding.text.rstrip('.')})"
    return words + (f"; try {finding.override}" if finding.override else "")


def _composes_hard_batches(config: DictConfig) -> bool:
    sampler = config.get("sampler") or {}
    name = sampler if isinstance(sampler, str) else sampler.get("name")  # a watched run may say it in a word
    choice = sampler_choices(str(config.get("system"))).get(str(name))
    return choice is not None and choice.composes_hard_batches
