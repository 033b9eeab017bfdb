"""A comparison in sentences: what the numbers say about samplers, and what was measured that may explain it."""

from __future__ import annotations

from typing import Any

from nearfar.lab.compare import Arm, Comparison
from nearfar.lab.sweep import read_sweep
from nearfar.lab.table import FEW
from nearfar.lab.verdict import run_verdict
from nearfar.lab.words import metric_words

__all__ = ["read_comparison"]

#: what the doctor says of batches that may be why hard ones did not help
OF_BATCHES = ("hardness-depleted", "hardness-not-above-random", "false-negatives", "duplicates")
#: training rows below which random batches of a usual size hold many near neighbours
FEW_ITEMS = 5000


def _plans(arm: Arm) -> list[dict[str, Any]]:
    run = arm.runs[min(arm.runs)]
    return [
        r for r in run.log() if r.get("kind") == "plan" and r.get("hardness") and not r.get("random_phase")
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def read_comparison(comparison: Comparison) -> list[str]:
    """A sweep's verdict, a paragraph for each arm beside the baseline (of many the best), then what to know."""
    paragraphs = []
    monitor = comparison.monitor
    sweep = read_sweep(comparison)
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
        others = comparison.differences[arm.label]
        apart = [m for m, d in others.items() if m != monitor and d.verdict != "not distinguishable"]
        if apart:
            own = "differs by its own interval" if len(apart) == 1 else "differ by their own intervals"
            text += (
                f" {len(apart)} of the {len(others) - 1} other metrics {own}; one in twenty does so by chance, and "
                "they are not independent."
            )
        if comparison.looked_at > 1:
            held = [m for m, v in comparison.together[arm.label].items() if v != "not distinguishable"]
            text += f" Judged together with all {comparison.looked_at} differences looked at (Holm), " + (
                f"{', '.join(map(metric_words, held))} still differ{'s' if len(held) == 1 else ''}."
                if held
                else "none differs."
            )
        plans = _plans(arm)
        if plans and arm.config.get("sampler", {}).get("name") in ("hard", "partition"):
            text += " " + _batches(plans, arm, difference.verdict == "better")
        paragraphs.append(text)
        paragraphs.append(f"{arm.label}: {comparison.losses[arm.label]}.")
    return [*paragraphs, *comparison.notes, *_unhealthy(comparison)]


def _unhealthy(comparison: Comparison) -> list[str]:
    """A line for each run in which the doctor found an error or a warning: its numbers may not be what they seem."""
    lines = []
    for arm in comparison.arms:
        for fold, seed, run in arm.every_run():
            grave = [f["id"] for f in run_verdict(run).findings if f["severity"] != "note"]
            if grave:
                which = f"{arm.label}, {fold}, seed {seed}" if fold else f"{arm.label}, seed {seed}"
                lines.append(f"{which}: the doctor found {', '.join(grave)} (nearfar doctor {run}).")
    return lines


def _batches(plans: list[dict[str, Any]], arm: Arm, gained: bool) -> str:
    hardness = _mean([value for plan in plans for value in plan["hardness"]])
    chance = plans[0]["hardness_random"]
    level = _mean([plan["last_to_first"] for plan in plans if plan.get("last_to_first") is not None] or [1.0])
    text = (
        f"Its batches were {hardness / chance:.1f} times as hard as random ones ({hardness:.1f} of an item's nearest "
        f"neighbours in its batch, random {chance:.1f}), the last tenth of an epoch at {level:.2f} of the first."
    )
    if gained:
        return text
    run = arm.runs[min(arm.runs)]
    judged = run_verdict(run)
    causes = [_cause(found) for found in judged.findings if found["id"] in OF_BATCHES]
    rows = run.read_json("dataset_layout.json").get("splits", {}).get("train", {}).get("rows")
    if rows is not None and rows < FEW_ITEMS:
        causes.append(
            f"few items: {rows} training rows, so that random batches already hold many near neighbours"
        )
    if causes:
        return text + " Measured and in question as causes: " + "; ".join(causes) + "."
    if not judged.judged:
        return text + " Whether they were sound is not known: nearfar doctor has not judged the run."
    return (
        text
        + " The doctor found nothing wrong with them, and items are not few: hardness itself did not help here."
    )


def _cause(finding: dict[str, Any]) -> str:
    """A finding of the doctor in half a sentence, with what it prescribes."""
    words = f"{finding['title'].rstrip('.')} ({finding['text'].rstrip('.')})"
    return words + (f"; try {finding['override']}" if finding["override"] else "")
