"""Compare runs honestly.

Runs are grouped into arms (the same configuration but for the seed), arms are paired on seeds and items, and
every difference comes with an interval and a verdict. Two arms whose metric, split or gallery differ are not
compared: the reason is given instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import NearfarError, nearest_name
from nearfar.metrics import Difference, Estimate, comparable, paired_difference
from nearfar.training.resume import NOT_PART_OF_A_RUN, changed_values, flatten
from nearfar.training.run_folder import RunFolder

__all__ = ["Arm", "Comparison", "compare_runs", "find_runs"]

#: keys by which runs of one arm may differ
WITHIN_ARM = ("seed", "needs_init_from", "trainer.threads", "trainer.workers", "trainer.log_every")


@dataclass
class Arm:
    """Runs that differ in their seed alone; ``parts`` are what sets them apart from the other arms."""

    parts: list[str]
    runs: dict[int, RunFolder]
    config: Any
    estimates: dict[int, dict[str, Estimate]] = field(default_factory=dict)
    per_item: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    ids: np.ndarray | None = None

    @property
    def label(self) -> str:
        """``sampler=hard, lr=0.1``, or the run's name where there is one arm only."""
        return ", ".join(self.parts) or self.runs[min(self.runs)].name


@dataclass
class Comparison:
    """What was compared with what, and what came of it."""

    arms: list[Arm]
    baseline: Arm
    split: str
    seeds: list[int]
    summary: dict[str, dict[str, Difference]]  # arm → metric → mean over seeds with interval (against zero)
    differences: dict[str, dict[str, Difference]]  # arm → metric → difference from the baseline
    refused: dict[str, str]  # arm → why it cannot be compared


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Finished runs among ``paths`` and below them, in order of their names; unfinished ones are an error."""
    folders: list[RunFolder] = []
    for path in paths:
        if not path.exists():
            raise NearfarError(f"{path}: no such run.")
        if (path / "config.yaml").exists():
            found = [path]
        else:
            found = sorted(config.parent for config in path.rglob("config.yaml"))
            # A run's own folder may hold other config.yaml files, such as those of a logger.
            found = [run for run in found if not any(other in run.parents for other in found)]
        if not found:
            raise NearfarError(f"{path}: neither a run nor a folder of runs (no config.yaml in it).")
        folders += [RunFolder(run) for run in found]
    unfinished = [str(folder) for folder in folders if not folder.finished]
    if unfinished:
        raise NearfarError(
            "not finished: "
            + ", ".join(unfinished)
            + ". Go on with: nearfar train resume_from=RUN, or leave them out."
        )
    if len(folders) < 2:
        raise NearfarError(f"a comparison needs at least two runs; found {len(folders)}.")
    return folders


def _group(folders: Sequence[RunFolder]) -> list[Arm]:
    arms: list[Arm] = []
    for folder in folders:
        config = folder.config()
        for arm in arms:
            if all(key in WITHIN_ARM for key in changed_values(arm.config, config)):
                if config.seed in arm.runs:
                    raise NearfarError(
                        f"{folder} and {arm.runs[config.seed]} are the same configuration and seed: leave one out."
                    )
                arm.runs[config.seed] = folder
                break
        else:
            arms.append(Arm([], {config.seed: folder}, config))
    for arm, parts in zip(arms, _parts([flatten(arm.config) for arm in arms]), strict=True):
        arm.parts = parts
    return arms


def _parts(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each configuration what sets it apart from the others, as ``key=value``.

    A group is called by its name alone (``sampler=hard``, ``text_encoder=ngram``): its options follow from that, and
    are told only where configurations of the same name differ in them.

    >>> _parts([{"sampler.name": "hard", "sampler.order": "level"}, {"sampler.name": "random"}])
    [['sampler=hard'], ['sampler=random']]
    """
    keys = sorted(
        {key for c in configs for key in c if any(other.get(key) != c.get(key) for other in configs)}
    )
    keys = [k for k in keys if k not in WITHIN_ARM and k.split(".")[0] not in NOT_PART_OF_A_RUN]
    named = {k.split(".")[0]: k for k in keys if k.endswith((".name", ".kind"))}
    keys.sort(key=lambda k: (k.split(".")[0], k not in named.values(), k))
    found = []
    for config in configs:
        parts = []
        for key in keys:
            group = key.split(".")[0]
            name = named.get(group)
            if name == key:
                parts.append(f"{group}={_value(config.get(key))}")
                continue
            peers = [c for c in configs if name is None or c.get(name) == config.get(name)]
            if any(peer.get(key) != config.get(key) for peer in peers):
                parts.append(f"{key}={_value(config.get(key))}")
        found.append(parts)
    return found


def _value(value: Any) -> str:
    """As it is written on the command line: ``[3,5]``, ``null``, ``true``."""
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _load(arm: Arm, split: str) -> None:
    for seed, folder in sorted(arm.runs.items()):
        metrics = folder.read_json("metrics.json")["splits"]
        if split not in metrics:
            raise NearfarError(f"{folder} has no split '{split}', only {', '.join(metrics)}.")
        arm.estimates[seed] = {name: Estimate.from_dict(value) for name, value in metrics[split].items()}
        with np.load(folder.path / "per_item.npz") as arrays:
            prefix = f"{split}/"
            ids = arrays[prefix + "ids"]
            arm.per_item[seed] = {
                key[len(prefix) :]: arrays[key]
                for key in arrays.files
                if key.startswith(prefix) and key != prefix + "ids"
            }
        first = next(iter(arm.estimates))
        if arm.ids is None:
            arm.ids = ids
        if not np.array_equal(arm.ids, ids) or _hashes(arm, seed) != _hashes(arm, first):
            raise NearfarError(
                f"{folder} was evaluated on other items than {arm.runs[first]}: their data changed between these "
                "seeds of one configuration. Leave one out, or train it anew."
            )


def _hashes(arm: Arm, seed: int) -> set[Any]:
    """The splits that a run's estimates say they were measured on."""
    return {estimate.protocol.get("split") for estimate in arm.estimates[seed].values()}


def _why_not(a: Arm, b: Arm) -> str | None:
    assert a.ids is not None
    assert b.ids is not None
    if len(a.ids) != len(b.ids) or not np.array_equal(a.ids, b.ids):
        return f"other items: {len(a.ids)} and {len(b.ids)} ids that are not the same"
    if not set(a.runs) & set(b.runs):
        return f"no seed in common: {sorted(a.runs)} and {sorted(b.runs)}"
    return None


def _refuse_metrics(a: Arm, b: Arm) -> dict[str, str]:
    """Metrics that these two arms have in common and that cannot be compared, with the reason."""
    first, second = next(iter(a.estimates.values())), next(iter(b.estimates.values()))
    reasons = {name: comparable(first[name], second[name]) for name in first if name in second}
    return {name: reason for name, reason in reasons.items() if reason}


def compare_runs(paths: Sequence[Path], baseline: str | None = None, split: str | None = None) -> Comparison:
    """Group the runs below ``paths`` into arms and compare each with the baseline arm.

    Raises ``NearfarError`` for runs that are unfinished or of different systems, and for an unknown baseline.
    """
    arms = _group(find_runs(paths))
    systems = {arm.config.system for arm in arms}
    if len(systems) > 1:
        raise NearfarError(f"runs of different systems cannot be compared: {', '.join(sorted(systems))}.")
    if split is None:
        every = [folder.read_json("metrics.json")["splits"] for arm in arms for folder in arm.runs.values()]
        split = "test" if all("test" in splits for splits in every) else "val"
    for arm in arms:
        _load(arm, split)
    base = _baseline(arms, baseline)
    seeds = sorted(set.intersection(*(set(arm.runs) for arm in arms)))
    summary: dict[str, dict[str, Difference]] = {}
    differences: dict[str, dict[str, Difference]] = {}
    refused: dict[str, str] = {}
    for arm in arms:
        summary[arm.label] = {}
        for name in next(iter(arm.per_item.values())):
            scores = np.stack([arm.per_item[seed][name] for seed in sorted(arm.runs)])
            summary[arm.label][name] = paired_difference(scores, np.zeros_like(scores))
        if arm is base:
            continue
        reason = _why_not(base, arm)
        if reason:
            refused[arm.label] = reason
            continue
        common = sorted(set(arm.runs) & set(base.runs))
        not_these = _refuse_metrics(base, arm)
        refused |= {f"{arm.label}: {name}": why for name, why in not_these.items()}
        differences[arm.label] = {
            name: paired_difference(
                np.stack([arm.per_item[seed][name] for seed in common]),
                np.stack([base.per_item[seed][name] for seed in common]),
            )
            for name in next(iter(base.per_item.values()))
            if name in next(iter(arm.per_item.values())) and name not in not_these
        }
    return Comparison(arms, base, split, seeds, summary, differences, refused)


def _squeezed(label: str) -> str:
    return re.sub(r"[\s'\"]", "", label)


def _baseline(arms: list[Arm], wanted: str | None) -> Arm:
    if wanted is None:
        random = [arm for arm in arms if flatten(arm.config).get("sampler.name") == "random"]
        return random[0] if random else arms[0]
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
