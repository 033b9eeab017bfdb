"""Compare runs honestly.

Runs are grouped into arms (the same configuration but for the seed), arms are paired on seeds and items, and every
difference comes with an interval and a verdict. Two arms whose metric, split, gallery or protocol differ are not
compared: the reason is given instead. The folds of a cross-validation are joined: an arm's items are those of all
folds, its seeds are paired within each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from nearfar.config.compose import flatten
from nearfar.errors import NearfarError, nearest_name
from nearfar.lab.groups import Arm, apart, arm_parts, find_runs, group_runs, load_scores
from nearfar.lab.loss_comparison import LossReading, read_losses
from nearfar.lab.words import by_question
from nearfar.metrics import (
    Difference,
    Estimate,
    comparable,
    few_runs,
    holm,
    paired_difference,
    seeds_interval,
    split_hash,
)

__all__ = [
    "Arm",
    "Comparison",
    "FoldReading",
    "Mean",
    "compare_runs",
    "find_runs",
    "join_folds",
    "read_folds",
]


@dataclass(frozen=True)
class FoldReading:
    """The paired difference of two arms in each fold, and their mean with the t interval over folds.

    Folds share training items, so that the interval over folds is itself an approximation (Bengio and Grandvalet 2004).
    """

    folds: Mapping[str, Difference]
    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "folds": {name: difference.to_dict() for name, difference in self.folds.items()},
        }


def join_folds(arms: Sequence[Arm], key: str) -> list[Arm]:
    """Arms whose configurations differ in ``key`` alone as one arm, with the items of all its folds.

    Scores must be loaded. Only seeds that every fold of an arm has are kept, and metrics that every fold has.

    Raises ``NearfarError`` where no run has the key, or where arms have different folds.
    """
    if not any(key in flatten(arm.config) for arm in arms):
        raise NearfarError(
            f"--over {key}: no run has this option; {nearest_name(key, flatten(arms[0].config))}"
        )
    groups: list[list[Arm]] = []
    for arm in arms:
        for group in groups:
            if set(apart([flatten(group[0].config), flatten(arm.config)])) <= {key}:
                group.append(arm)
                break
        else:
            groups.append([arm])
    joined = [_joined(sorted(group, key=lambda arm: _fold(arm, key)), key) for group in groups]
    for arm, parts in zip(joined, arm_parts([arm.config for arm in joined]), strict=True):
        arm.parts = parts
    for arm in joined[1:]:
        if arm.folds.keys() != joined[0].folds.keys():
            raise NearfarError(
                f"--over {key}: {arm.label} has the folds {', '.join(arm.folds)}, and {joined[0].label} "
                f"{', '.join(joined[0].folds)}. Train what is missing, or leave the others out."
            )
    return joined


def _fold(arm: Arm, key: str) -> str:
    value = OmegaConf.select(arm.config, key)
    return (
        "+".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def _joined(arms: Sequence[Arm], key: str) -> Arm:
    seeds = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
    if not seeds:
        raise NearfarError(f"--over {key}: the folds of {arms[0].label} have no seed in common.")
    one = Arm([], {seed: arms[0].runs[seed] for seed in seeds}, arms[0].config)
    one.folds = {_fold(arm, key): {seed: arm.runs[seed] for seed in seeds} for arm in arms}
    names = list(one.folds)
    every = [arm for arm in arms if arm.ids is not None]
    assert len(every) == len(arms)
    one.ids = np.array([f"{name}: {item}" for name, arm in zip(names, arms, strict=True) for item in arm.ids])  # type: ignore[union-attr]
    one.sizes = [len(arm.ids) for arm in arms]  # type: ignore[arg-type]
    for seed in seeds:
        kept = [name for name in arms[0].per_item[seed] if all(name in arm.per_item[seed] for arm in arms)]
        one.per_item[seed] = {
            name: np.concatenate([arm.per_item[seed][name] for arm in arms]) for name in kept
        }
        shared = [
            name for name in arms[0].estimates[seed] if all(name in arm.estimates[seed] for arm in arms)
        ]
        one.estimates[seed] = {name: _pooled([arm.estimates[seed][name] for arm in arms]) for name in shared}
    return one


def _pooled(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate for all folds, each item counted once; its interval is the widest, and its gallery a range."""
    weight = np.array([estimate.n for estimate in estimates], float) / sum(e.n for e in estimates)
    galleries = sorted({e.protocol["gallery"] for e in estimates if "gallery" in e.protocol})
    protocol = dict(estimates[0].protocol) | {
        "split": split_hash(str(e.protocol.get("split")) for e in estimates)
    }
    if galleries:
        protocol["gallery"] = galleries[0] if len(galleries) == 1 else f"{galleries[0]}–{galleries[-1]}"
    return Estimate(
        float(weight @ [e.value for e in estimates]),
        min(e.low for e in estimates),
        max(e.high for e in estimates),
        float(weight @ [e.chance for e in estimates]),
        sum(e.n for e in estimates),
        any(e.trivial for e in estimates),
        estimates[0].metric,
        protocol,
    )


def read_folds(base: Arm, arm: Arm, metrics: Sequence[str]) -> dict[str, FoldReading]:
    """For each metric the differences of ``arm`` from ``base`` fold by fold."""
    seeds = sorted(set(base.runs) & set(arm.runs))
    ends = np.cumsum([0, *base.sizes])
    readings = {}
    for metric in metrics:
        ours, theirs = (np.stack([side.per_item[seed][metric] for seed in seeds]) for side in (arm, base))
        found = {
            name: paired_difference(ours[:, start:end], theirs[:, start:end], metric=metric)
            for name, start, end in zip(base.folds, ends[:-1], ends[1:], strict=True)
        }
        values = [difference.value for difference in found.values()]
        readings[metric] = FoldReading(found, float(np.mean(values)), *few_runs(values))
    return readings


@dataclass(frozen=True)
class Mean:
    """The mean of an arm over its seeds, with its interval and the method of that."""

    value: float
    low: float
    high: float
    method: str


@dataclass
class Comparison:
    """What was compared with what, and what came of it.

    ``summary[arm][metric]`` is an arm's mean, ``differences[arm][metric]`` its paired difference from the baseline,
    ``together[arm][metric]`` the verdict that holds for all differences at once (Holm); ``refused`` says of an arm, or
    of "arm: metric", why it is not compared; ``notes`` what a reader has to know; ``losses`` what can be said
    of the training losses. Of a cross-validation, ``over`` is the option by which its folds differ, and
    ``by_fold[arm][metric]`` the differences fold by fold.
    """

    arms: list[Arm]
    baseline: Arm
    split: str
    monitor: str
    seeds: list[int]
    summary: dict[str, dict[str, Mean]]
    differences: dict[str, dict[str, Difference]]
    refused: dict[str, str]
    together: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    losses: dict[str, LossReading] = field(default_factory=dict)
    over: str | None = None
    by_fold: dict[str, dict[str, FoldReading]] = field(default_factory=dict)

    @property
    def looked_at(self) -> int:
        """How many differences were judged."""
        return sum(len(found) for found in self.differences.values())

    def by_question(self, metrics: Iterable[str]) -> dict[str, list[str]]:
        """Metrics by the question that they answer: numbers of different questions stand in no table together."""
        metrics, first = list(metrics), next(iter(self.arms[0].estimates.values()))
        known = {name: first[name] for name in metrics if name in first}
        found = {question: list(rows) for question, rows in by_question(known).items()}
        if rest := [name for name in metrics if name not in first]:
            found.setdefault("", []).extend(rest)
        return found

    @property
    def worse(self) -> list[str]:
        """The arms that are worse than the baseline by the monitored metric, or could not be compared by it."""
        return [
            arm.label
            for arm in self.arms
            if arm is not self.baseline
            and (
                (found := self.differences.get(arm.label, {}).get(self.monitor)) is None
                or found.verdict == "worse"
            )
        ]


def _why_not(a: Arm, b: Arm) -> str | None:
    assert a.ids is not None
    assert b.ids is not None
    if len(a.ids) != len(b.ids) or not np.array_equal(a.ids, b.ids):
        return f"other items: {len(a.ids)} and {len(b.ids)} ids that are not the same"
    if not set(a.runs) & set(b.runs):
        return (
            f"no seed in common: {sorted(a.runs)} and {sorted(b.runs)}; train one of them on the other's seeds "
            "(nearfar train -m … seed=…)"
        )
    return None


def _refuse_metrics(a: Arm, b: Arm, common: Sequence[int]) -> dict[str, str]:
    """Metrics of either arm that cannot be compared in every seed they have in common, with the reason."""
    reasons: dict[str, str] = {}
    for seed in common:
        first, second = a.estimates[seed], b.estimates[seed]
        for name in {**first, **second}:
            if name not in first or name not in second:
                missing = a if name not in first else b
                reasons.setdefault(name, f"not measured in {missing.label}")
            elif reason := comparable(first[name], second[name]):
                reasons.setdefault(name, reason)
        for name in {**a.per_item[seed], **b.per_item[seed]}:
            if name not in first and name not in second:
                reasons.setdefault(name, "has scores but no estimate that says how they were measured")
            elif name not in a.per_item[seed] or name not in b.per_item[seed]:
                reasons.setdefault(name, "has no score for every item in both arms")
    return reasons


def compare_runs(
    paths: Sequence[Path], baseline: str | None = None, split: str | None = None, over: str | None = None
) -> Comparison:
    """Group the runs below ``paths`` into arms and compare each with the baseline arm.

    ``over`` names the option by which the folds of a cross-validation differ, such as ``data.hold_out``: runs that
    differ in it (and in their seed) alone are one arm.

    Raises ``NearfarError`` for runs that are unfinished or of different systems, and for an unknown baseline.
    """
    arms = group_runs(find_runs(paths))
    systems = {arm.config.system for arm in arms}
    if len(systems) > 1:
        raise NearfarError(f"runs of different systems cannot be compared: {', '.join(sorted(systems))}.")
    metrics = [folder.read_json("metrics.json") for arm in arms for folder in arm.runs.values()]
    if split is None:
        split = "test" if all("test" in found["splits"] for found in metrics) else "val"
    for arm in arms:
        load_scores(arm, split)
    if over is not None:
        arms = join_folds(arms, over)
    base = _baseline(arms, baseline)
    seeds = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
    made = Comparison(arms, base, split, metrics[0]["monitor"], seeds, {}, {}, {}, over=over)
    for arm in arms:
        made.summary[arm.label] = _means(arm)
        if arm is not base:
            _against(made, arm)
            if over is not None:
                made.by_fold[arm.label] = read_folds(base, arm, list(made.differences.get(arm.label, {})))
    flat = {(arm, name): d for arm, found in made.differences.items() for name, d in found.items()}
    for (label, name), verdict in holm(flat).items():
        made.together.setdefault(label, {})[name] = verdict
    made.losses = {arm.label: read_losses(base, arm) for arm in arms if arm is not base}
    return made


def _means(arm: Arm) -> dict[str, Mean]:
    means = {}
    for name in next(iter(arm.per_item.values())):
        scores = np.stack([arm.per_item[seed][name] for seed in sorted(arm.runs)]).astype(np.float64)
        means[name] = Mean(float(scores.mean()), *seeds_interval(scores))
    return means


def _against(made: Comparison, arm: Arm) -> None:
    """Compare one arm with the baseline and write the outcome into ``made``."""
    base = made.baseline
    if reason := _why_not(base, arm):
        made.refused[arm.label] = reason
        return
    common = sorted(set(arm.runs) & set(base.runs))
    for one, other in ((arm, base), (base, arm)):
        alone = sorted(set(one.runs) - set(other.runs))
        note = f"{one.label}: seeds {alone} are left out of the difference, {other.label} has none of them."
        if alone and note not in made.notes:
            made.notes.append(note)
    if len(common) == 1:
        made.notes.append(
            f"{arm.label}: one seed in common with the baseline. The interval is over items only; another seed may "
            "fall otherwise."
        )
    # A metric without scores of single items, such as the median rank, is shown by its arms and has no difference.
    paired = set(base.per_item[common[0]]) | set(arm.per_item[common[0]])
    not_these = {
        k: v for k, v in _refuse_metrics(base, arm, common).items() if k in paired or k == made.monitor
    }
    made.refused |= {f"{arm.label}: {name}": why for name, why in not_these.items()}
    made.differences[arm.label] = {
        name: paired_difference(
            np.stack([arm.per_item[seed][name] for seed in common]),
            np.stack([base.per_item[seed][name] for seed in common]),
            metric=name,
            higher_is_better=_direction(base, name),
        )
        for name in base.per_item[common[0]]
        if name in arm.per_item[common[0]] and name not in not_these
    }


def _direction(arm: Arm, name: str) -> bool | None:
    """What the arm's estimates say of a metric; None, for its name to say it, where none of them has it."""
    estimate = next(iter(arm.estimates.values())).get(name)
    return None if estimate is None else estimate.higher_is_better


def _squeezed(label: str) -> str:
    return re.sub(r"[\s'\"]", "", label)


def _baseline(arms: list[Arm], wanted: str | None) -> Arm:
    if wanted is None:
        single = [arm for arm in arms if not arm.config.get("ensemble")] or arms
        random = [arm for arm in single if flatten(arm.config).get("sampler.name") == "random"]
        return random[0] if random else single[0]
    sought = _squeezed(wanted)
    matches = [arm for arm in arms if sought in map(_squeezed, arm.parts)] or [
        arm for arm in arms if sought == _squeezed(arm.label)
    ]
    if len(matches) != 1:
        labels = [arm.label for arm in arms]
        if matches:
            raise NearfarError(
                f"baseline '{wanted}' fits several arms: {'; '.join(m.label for m in matches)}."
            )
        raise NearfarError(f"no arm is called '{wanted}': {nearest_name(wanted, labels)}")
    return matches[0]
