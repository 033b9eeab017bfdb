"""Compare runs honestly.

Runs are grouped into arms (the same configuration but for the seed), arms are paired on seeds and items, and
every difference comes with an interval and a verdict. Two arms whose metric, split or gallery differ are not
compared: the reason is given instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import NearfarError, nearest_name
from nearfar.metrics import Difference, Estimate, comparable, paired_difference
from nearfar.training.resume import changed_values, flatten
from nearfar.training.run_folder import RunFolder, write_atomically

__all__ = ["Arm", "Comparison", "compare_runs", "find_runs", "write_comparison"]

#: keys by which runs of one arm may differ
WITHIN_ARM = ("seed", "overrides", "trainer.threads", "trainer.workers", "trainer.log_every")


@dataclass
class Arm:
    """Runs that differ in their seed alone."""

    label: str
    runs: dict[int, RunFolder]
    config: Any
    estimates: dict[int, dict[str, Estimate]] = field(default_factory=dict)
    per_item: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    ids: np.ndarray | None = None


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
        configs = (
            [path / "config.yaml"] if (path / "config.yaml").exists() else sorted(path.rglob("config.yaml"))
        )
        if not configs:
            raise NearfarError(f"{path}: neither a run nor a folder of runs (no config.yaml in it).")
        folders += [RunFolder(config.parent) for config in configs]
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
            if not [
                key
                for key in changed_values(arm.config, config)
                if key not in WITHIN_ARM and "overrides" not in key
            ]:
                if config.seed in arm.runs:
                    raise NearfarError(
                        f"{folder} and {arm.runs[config.seed]} are the same configuration and seed: leave one out."
                    )
                arm.runs[config.seed] = folder
                break
        else:
            arms.append(Arm("", {config.seed: folder}, config))
    flat = [flatten(arm.config) for arm in arms]
    keys = sorted({key for f in flat for key in f if any(g.get(key) != f.get(key) for g in flat)})
    keys = [
        k
        for k in keys
        if k not in WITHIN_ARM and k.split(".")[0] not in ("overrides", "name", "runs_dir", "exists")
    ]
    # The options of a sampler follow from which sampler it is: name them only where samplers agree.
    named = [k[: -len(".name")] for k in keys if k.endswith(".name")]
    keys = [k for k in keys if k.endswith(".name") or k.split(".")[0] not in named]
    for arm, values in zip(arms, flat, strict=True):
        parts = [f"{key.removesuffix('.name')}={values.get(key)}" for key in keys]
        arm.label = ", ".join(parts) or arm.runs[next(iter(arm.runs))].name
    return arms


def _load(arm: Arm, split: str) -> None:
    for seed, folder in sorted(arm.runs.items()):
        metrics = folder.read_json("metrics.json")["splits"]
        if split not in metrics:
            raise NearfarError(f"{folder} has no split '{split}', only {', '.join(metrics)}.")
        arm.estimates[seed] = {name: Estimate.from_dict(value) for name, value in metrics[split].items()}
        with np.load(folder.path / "per_item.npz") as arrays:
            prefix = f"{split}/"
            arm.ids = arrays[prefix + "ids"]
            arm.per_item[seed] = {
                key[len(prefix) :]: arrays[key]
                for key in arrays.files
                if key.startswith(prefix) and key != prefix + "ids"
            }


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


def _baseline(arms: list[Arm], wanted: str | None) -> Arm:
    if wanted is None:
        random = [arm for arm in arms if flatten(arm.config).get("sampler.name") == "random"]
        return random[0] if random else arms[0]
    matches = [arm for arm in arms if wanted in arm.label.split(", ")] or [
        arm for arm in arms if wanted == arm.label
    ]
    if len(matches) != 1:
        labels = [arm.label for arm in arms]
        if matches:
            raise NearfarError(
                f"baseline '{wanted}' fits several arms: {'; '.join(m.label for m in matches)}."
            )
        raise NearfarError(f"no arm is called '{wanted}': {nearest_name(wanted, labels)}")
    return matches[0]


def write_comparison(comparison: Comparison, output: Path | None = None) -> Path:
    """Write the comparison's ``report.html`` and ``comparison.json``; returns the path of the former."""
    import json
    import os

    from nearfar.lab.report import comparison_page

    folders = [str(run.path.resolve()) for arm in comparison.arms for run in arm.runs.values()]
    common = Path(os.path.commonpath(folders))
    path = output or common / "report.html"
    if path.is_dir():
        path = path / "report.html"
    if output is None and (common / "config.yaml").exists():
        path = common / "comparison.html"  # one run lies inside the other: its own report stays
    content = {
        "split": comparison.split,
        "baseline": comparison.baseline.label,
        "arms": {arm.label: {str(s): str(r) for s, r in arm.runs.items()} for arm in comparison.arms},
        "differences": {
            a: {m: d.to_dict() for m, d in ds.items()} for a, ds in comparison.differences.items()
        },
        "refused": comparison.refused,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(path.with_name("comparison.json"), lambda file: file.write(text.encode()))
    page = comparison_page(comparison)
    write_atomically(path, lambda file: file.write(page.encode()))
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
