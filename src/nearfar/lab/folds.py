"""Cross-validation read as one: arms that were trained and tested on one fold after another, joined fold by fold.

Each fold, such as a held-out section, has its own items and its own models. An arm's items are those of all folds, its
seeds are paired within each; what folds differ by is said beside it, with an interval over folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from nearfar.errors import NearfarError, nearest_name
from nearfar.lab.groups import WITHIN_ARM, Arm, arm_parts
from nearfar.metrics import Difference, Estimate, few_runs, paired_difference, split_hash
from nearfar.training.resume import changed_values, flatten

__all__ = ["FoldReading", "join_folds", "read_folds"]


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
            if all(name == key or name in WITHIN_ARM for name in changed_values(group[0].config, arm.config)):
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
