"""A run, a comparison or a sweep in sentences: distance from chance, findings, the bias of the best of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from omegaconf import DictConfig

from nearfar.config.compose import flatten
from nearfar.config.samplers import sampler_choices
from nearfar.data.files import Json, read_json
from nearfar.doctor.phases import gain_sentence
from nearfar.lab.compare import Comparison
from nearfar.lab.curves import PlanRecord, plans_of
from nearfar.lab.groups import Arm
from nearfar.lab.table import FEW
from nearfar.metrics import Estimate
from nearfar.metrics.intervals import normal_quantile
from nearfar.terminal import metric_words, short_number
from nearfar.training.run_folder import RunFolder

__all__ = [
    "Cell",
    "RunVerdict",
    "Sheet",
    "ShownFinding",
    "Sweep",
    "describe_comparison",
    "expected_lead",
    "run_verdict",
    "sweep_of",
]


#: with fewer arms than this, nothing was swept
LEAST = 3


@dataclass(frozen=True)
class Cell:
    """One arm of a sweep and its values on the axes, as they are written on the command line."""

    arm: Arm
    values: dict[str, str]


@dataclass(frozen=True)
class Sheet:
    """Cells that differ in one or two numeric axes alone; ``title`` says what they have in common.

    ``y`` is None where one axis varies.
    """

    title: str
    x: str
    y: str | None
    cells: dict[tuple[float, float], Arm]


@dataclass(frozen=True)
class Sweep:
    """``best`` is the best arm beside the baseline, chosen on the split ``chosen_on``; ``verdict`` says it in words."""

    axes: list[str]
    cells: list[Cell]
    sheets: list[Sheet]
    best: Arm | None
    chosen_on: str
    verdict: str


def expected_lead(arms: int, error: float) -> float:
    """By how much the best of ``arms`` leads the truth if all are equal and each has this standard ``error``.

    Blom's (1958) approximation of the largest of so many normal numbers.

    >>> round(expected_lead(12, 0.01), 4), expected_lead(1, 0.01)
    (0.0164, 0.0)
    """
    return error * normal_quantile((arms - 0.375) / (arms + 0.25)) if arms > 1 else 0.0


def sweep_of(comparison: Comparison) -> Sweep | None:
    """The arms of a comparison as a sweep, or None where there are fewer than three."""
    arms = comparison.arms
    if len(arms) < LEAST or not arms[0].config:  # rankings of other tools have no options
        return None
    values = {arm.label: dict(part.split("=", 1) for part in arm.parts) for arm in arms}
    axes = list(dict.fromkeys(key for arm in arms for key in values[arm.label]))
    cells = [Cell(arm, {axis: values[arm.label].get(axis, "") for axis in axes}) for arm in arms]
    best, chosen_on = _best(comparison)
    verdict = _verdict(comparison, best, chosen_on) if best is not None else ""
    return Sweep(axes, cells, _sheets(arms, axes), best, chosen_on, verdict)


def _sheets(arms: Sequence[Arm], axes: Sequence[str]) -> list[Sheet]:
    configs = {arm.label: flatten(arm.config) for arm in arms}
    numbers: dict[str, set[float]] = {}
    for axis in axes:
        column = [configs[arm.label].get(axis) for arm in arms]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
            numbers[axis] = {float(value) for value in column if value is not None}
    across = sorted((a for a in numbers if len(numbers[a]) > 1), key=lambda a: -len(numbers[a]))[:2]
    groups: dict[tuple[str, ...], list[Arm]] = {}
    for arm in arms:
        common = tuple(part for part in arm.parts if part.split("=", 1)[0] not in across)
        groups.setdefault(common, []).append(arm)
    sheets = []
    for common, members in groups.items():
        varying = [a for a in across if len({configs[m.label][a] for m in members}) > 1]
        if not varying:
            continue
        x, y = varying[0], varying[1] if len(varying) > 1 else None
        cells = {}
        for member in members:
            own = configs[member.label]
            cells[float(own[x]), float(own[y]) if y else 0.0] = member
        sheets.append(Sheet(", ".join(common), x, y, cells))
    return sheets


def _best(comparison: Comparison) -> tuple[Arm | None, str]:
    """Chosen on validation where the comparison is on test: the test figure is then not biased by the choice."""
    others = [
        arm
        for arm in comparison.arms
        if arm is not comparison.baseline and comparison.monitor in comparison.differences.get(arm.label, {})
    ]
    if not others:
        return None, comparison.split
    splits = [run.read_json("metrics.json")["splits"] for arm in comparison.arms for run in arm.runs.values()]
    chosen_on = (
        "val" if all(comparison.monitor in each.get("val", {}) for each in splits) else comparison.split
    )

    def score(arm: Arm) -> float:
        every = [run.read_json("metrics.json")["splits"][chosen_on] for run in arm.runs.values()]
        return float(np.mean([float(metrics[comparison.monitor]["value"]) for metrics in every]))

    return max(others, key=score), chosen_on


def _verdict(comparison: Comparison, best: Arm, chosen_on: str) -> str:
    name, base = metric_words(comparison.monitor), comparison.baseline.label
    monitored = {
        arm: differences[comparison.monitor]
        for arm, differences in comparison.differences.items()
        if comparison.monitor in differences
    }
    d, count = monitored[best.label], len(monitored)
    text = (
        f"Best of {count} beside {base}, by {name} on {chosen_on}: {best.label}. On {comparison.split} it is "
        f"{d.verdict if d.verdict == 'not distinguishable' else d.verdict + ' than the baseline'}"
        f"{' from the baseline' if d.verdict == 'not distinguishable' else ''}: {d.value:+.3f} "
        f"[{d.low:+.3f}, {d.high:+.3f}]."
    )
    if count == 1:
        return text
    if chosen_on != comparison.split:
        return text + (
            f" It was chosen on {chosen_on}, so the items of {comparison.split} did not favour it; its seeds may have: "
            "train it and the baseline on new seeds to be sure."
        )
    error = float(np.median([(each.high - each.low) / 2 for each in monitored.values()])) / 1.96
    lead = expected_lead(count, error)
    together = comparison.together[best.label][comparison.monitor]
    return text + (
        f" It was chosen on the split it is judged by: the best of {count} equal arms leads by about {lead:.3f} by "
        f"chance. With all differences judged together (Holm) it is {together}. Evaluate it on a different split or on "
        "new seeds before you trust the number."
    )


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
