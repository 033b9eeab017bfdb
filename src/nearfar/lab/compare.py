"""Compare runs: paired differences of arms, each with an interval and a verdict.

Runs are grouped into arms (the same configuration but for the seed) and paired on seeds and items. Arms whose metric,
split, gallery or protocol differ are not compared, and the reason is given. The folds of a cross-validation are joined:
an arm's items are those of all folds, and its seeds are paired within each fold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from nearfar.config.compose import flatten
from nearfar.errors import NearfarError, nearest_name
from nearfar.lab.groups import (
    Arm,
    LossComparison,
    apart,
    arm_parts,
    by_question,
    compare_losses,
    find_runs,
    group_runs,
    load_scores,
)
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
    "FoldDifferences",
    "Mean",
    "compare_arms",
    "compare_runs",
    "find_runs",
    "fold_differences",
    "join_folds",
]


@dataclass(frozen=True)
class FoldDifferences:
    """The paired difference of two arms in each fold, and their mean with the t interval over folds.

    Folds share training items, so that the interval over folds is itself an approximation (Bengio and Grandvalet 2004).
    """

    folds: Mapping[str, Difference]
    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, object]:
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
    return replace(
        estimates[0],
        value=float(weight @ [e.value for e in estimates]),
        low=min(e.low for e in estimates),
        high=max(e.high for e in estimates),
        chance=float(weight @ [e.chance for e in estimates]),
        n=sum(e.n for e in estimates),
        trivial=any(e.trivial for e in estimates),
        protocol=protocol,
        control=any(e.control for e in estimates),
    )


def fold_differences(base: Arm, arm: Arm, metrics: Sequence[str]) -> dict[str, FoldDifferences]:
    """For each metric the differences of ``arm`` from ``base`` fold by fold."""
    seeds = sorted(set(base.runs) & set(arm.runs))
    ends = np.cumsum([0, *base.sizes])
    by_metric = {}
    for metric in metrics:
        ours, theirs = (np.stack([side.per_item[seed][metric] for seed in seeds]) for side in (arm, base))
        folds = {
            name: paired_difference(
                ours[:, start:end],
                theirs[:, start:end],
                metric=metric,
                higher_is_better=_direction(base, metric),
            )
            for name, start, end in zip(base.folds, ends[:-1], ends[1:], strict=True)
        }
        values = [difference.value for difference in folds.values()]
        by_metric[metric] = FoldDifferences(folds, float(np.mean(values)), *few_runs(values))
    return by_metric


@dataclass(frozen=True)
class Mean:
    """The mean of an arm over its seeds, with its interval and the method of that."""

    value: float
    low: float
    high: float
    method: str


@dataclass
class Comparison:
    """The arms, their means, and their paired differences from the baseline.

    ``summary[arm][metric]`` is an arm's mean, ``differences[arm][metric]`` its paired difference from the baseline,
    ``together[arm][metric]`` the verdict that holds for the differences of all results at once (Holm; controls are not
    among them). ``refused`` has the reason why an arm, or "arm: metric", is not compared; ``notes`` what a reader has
    to know; ``losses`` the comparison of the training losses. In a cross-validation, ``over`` is the option by which
    its folds differ, and ``by_fold[arm][metric]`` the differences fold by fold. Of rankings, ``needed[arm][metric]`` is
    the number of queries that would tell the difference (``items_needed``).
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
    losses: dict[str, LossComparison] = field(default_factory=dict)
    over: str | None = None
    by_fold: dict[str, dict[str, FoldDifferences]] = field(default_factory=dict)
    needed: dict[str, dict[str, int | None]] = field(default_factory=dict)

    @cached_property
    def controls(self) -> frozenset[str]:
        """Metrics that an estimate of any arm marks as a control; the monitored metric is a result in any case."""
        estimates = [
            pair for arm in self.arms for by_name in arm.estimates.values() for pair in by_name.items()
        ]
        return frozenset(name for name, estimate in estimates if estimate.control and name != self.monitor)

    def results(self, metrics: Iterable[str]) -> list[str]:
        """Those of ``metrics`` that are no controls."""
        return [name for name in metrics if name not in self.controls]

    @property
    def judged_together(self) -> int:
        """How many differences of results Holm's rule judges; controls do not count."""
        return sum(len(self.results(differences)) for differences in self.differences.values())

    def by_question(self, metrics: Iterable[str]) -> dict[str, list[str]]:
        """Metrics by the question that they answer, one table for each; controls come last in each."""
        metrics, first = list(metrics), next(iter(self.arms[0].estimates.values()))
        known = {name: first[name] for name in metrics if name in first}
        groups = {question: list(rows) for question, rows in by_question(known).items()}
        if rest := [name for name in metrics if name not in first]:
            groups.setdefault("", []).extend(rest)
        return {question: sorted(rows, key=self.controls.__contains__) for question, rows in groups.items()}

    @property
    def worse(self) -> list[str]:
        """The arms that are worse than the baseline by the monitored metric, or could not be compared by it."""
        monitored = {
            arm.label: self.differences.get(arm.label, {}).get(self.monitor)
            for arm in self.arms
            if arm is not self.baseline
        }
        return [label for label, d in monitored.items() if d is None or d.verdict == "worse"]


def _why_not(a: Arm, b: Arm) -> str | None:
    assert a.ids is not None
    assert b.ids is not None
    if len(a.ids) != len(b.ids) or not np.array_equal(a.ids, b.ids):
        sides = ((a, set(a.ids) - set(b.ids)), (b, set(b.ids) - set(a.ids)))
        alone = [f"{len(ids)} only in {arm.label} ({_some(ids)})" for arm, ids in sides if ids]
        return f"different items: {len(a.ids)} and {len(b.ids)} ids that are not the same" + "".join(
            f", {each}" for each in alone
        )
    if not set(a.runs) & set(b.runs):
        return (
            f"no seed in common: {sorted(a.runs)} and {sorted(b.runs)}; train one of them on the other's seeds "
            "(nearfar train -m … seed=…)"
        )
    return None


def _some(ids: set[object]) -> str:
    return ", ".join(sorted(map(str, ids))[:5]) + (", …" if len(ids) > 5 else "")


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
        split = "test" if all("test" in content["splits"] for content in metrics) else "val"
    for arm in arms:
        load_scores(arm, split)
    if over is not None:
        arms = join_folds(arms, over)
    comparison = compare_arms(arms, _baseline(arms, baseline), split, metrics[0]["monitor"], over)
    base = comparison.baseline
    comparison.losses = {arm.label: compare_losses(base, arm) for arm in arms if arm is not base}
    return comparison


def compare_arms(arms: list[Arm], base: Arm, split: str, monitor: str, over: str | None = None) -> Comparison:
    """Means of arms whose scores are loaded, and each one's paired differences from ``base``, judged together."""
    seeds = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
    comparison = Comparison(arms, base, split, monitor, seeds, {}, {}, {}, over=over)
    for arm in arms:
        comparison.summary[arm.label] = _means(arm)
        if arm is not base:
            _compare_with_baseline(comparison, arm)
            if over is not None:
                metrics_of_arm = list(comparison.differences.get(arm.label, {}))
                comparison.by_fold[arm.label] = fold_differences(base, arm, metrics_of_arm)
    results = {
        (label, name): differences[name]
        for label, differences in comparison.differences.items()
        for name in comparison.results(differences)
    }
    for (label, name), verdict in holm(results).items():
        comparison.together.setdefault(label, {})[name] = verdict
    return comparison


def _means(arm: Arm) -> dict[str, Mean]:
    means = {}
    for name in next(iter(arm.per_item.values())):
        scores = np.stack([arm.per_item[seed][name] for seed in sorted(arm.runs)]).astype(np.float64)
        means[name] = Mean(float(scores.mean()), *seeds_interval(scores))
    return means


def _compare_with_baseline(comparison: Comparison, arm: Arm) -> None:
    """Compare one arm with the baseline and write the outcome into ``comparison``."""
    base = comparison.baseline
    if reason := _why_not(base, arm):
        comparison.refused[arm.label] = reason
        return
    common = sorted(set(arm.runs) & set(base.runs))
    for one, other in ((arm, base), (base, arm)):
        alone = sorted(set(one.runs) - set(other.runs))
        note = f"{one.label}: seeds {alone} are left out of the difference, {other.label} has none of them."
        if alone and note not in comparison.notes:
            comparison.notes.append(note)
    if len(common) == 1:
        comparison.notes.append(
            f"{arm.label}: one seed in common with the baseline. The interval is over items only; a different seed may "
            "give a different result."
        )
    if confounded := _other_batch(base, arm):
        comparison.notes.append(confounded)
    # A metric without scores of single items, such as the median rank, has means and no difference.
    paired = set(base.per_item[common[0]]) | set(arm.per_item[common[0]])
    refused = {
        k: v for k, v in _refuse_metrics(base, arm, common).items() if k in paired or k == comparison.monitor
    }
    comparison.refused |= {f"{arm.label}: {name}": reason for name, reason in refused.items()}
    comparison.differences[arm.label] = {
        name: paired_difference(
            np.stack([arm.per_item[seed][name] for seed in common]),
            np.stack([base.per_item[seed][name] for seed in common]),
            metric=name,
            higher_is_better=_direction(base, name),
        )
        for name in base.per_item[common[0]]
        if name in arm.per_item[common[0]] and name not in refused
    }


def _other_batch(base: Arm, arm: Arm) -> str | None:
    """What a reader has to know of arms that differ in their batch and in something else, too."""
    ours, theirs = flatten(arm.config).get("batch_size"), flatten(base.config).get("batch_size")
    others = {part for part in arm.parts if not part.startswith("batch_size=")}
    others ^= {part for part in base.parts if not part.startswith("batch_size=")}
    if ours == theirs or None in (ours, theirs) or not others:
        return None
    return (
        f"{arm.label}: its batches have {ours} rows and those of {base.label} {theirs}, and it differs in something "
        "else, too. A larger batch alone raises scores: compare at one batch_size."
    )


def _direction(arm: Arm, name: str) -> bool | None:
    """Whether higher is better by the arm's estimates; None where none has the metric, and its name decides."""
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
