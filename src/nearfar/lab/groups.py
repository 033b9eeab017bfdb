"""Runs on disk grouped into arms (the same configuration but for the seed), estimates by their question, losses by what
they measure.

A loss is a number of nats against a number of candidates. With different candidates, floor, temperature or composition
of the batches it is a different quantity, and the lower one is not the better one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from nearfar.config.compose import flatten
from nearfar.config.registry import role_of
from nearfar.data.files import DAMAGED, Json
from nearfar.errors import NearfarError
from nearfar.metrics import Estimate, few_runs
from nearfar.training.run_folder import RunFolder

__all__ = [
    "Arm",
    "LossComparison",
    "apart",
    "arm_parts",
    "by_question",
    "compare_losses",
    "find_runs",
    "group_runs",
    "load_scores",
]


@dataclass
class Arm:
    """Runs that differ in their seed alone; ``parts`` are what sets them apart from the other arms.

    A ranking of a different tool (``nearfar.lab.rankings``) is an arm without runs on disk and without configuration.

    In a cross-validation (``nearfar.lab.compare``), ``folds`` holds the runs of each fold and ``sizes`` the number of
    its items; ``runs`` are then those of the first.
    """

    parts: list[str]
    runs: dict[int, RunFolder]
    config: DictConfig
    estimates: dict[int, dict[str, Estimate]] = field(default_factory=dict)
    per_item: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    ids: np.ndarray | None = None
    folds: dict[str, dict[int, RunFolder]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    @property
    def label(self) -> str:
        """``sampler=hard, lr=0.1``, or the run's name where there is one arm only."""
        return ", ".join(self.parts) or self.runs[min(self.runs)].name

    def every_run(self) -> list[tuple[str, int, RunFolder]]:
        """(fold, seed, run) of all runs; the fold is empty where there are none."""
        folds = self.folds or {"": self.runs}
        return [(fold, seed, run) for fold, runs in folds.items() for seed, run in sorted(runs.items())]


def find_runs(paths: Sequence[Path]) -> list[RunFolder]:
    """Finished runs among ``paths`` and below them, in order of their names; unfinished ones are an error."""
    folders: list[RunFolder] = []
    for path in paths:
        if not path.exists():
            raise NearfarError(f"{path}: no such run.")
        if (path / "config.yaml").exists():
            runs = [path]
        else:
            runs = sorted(config.parent for config in path.rglob("config.yaml"))
            # A run's own folder may hold other config.yaml files, such as those of a logger.
            runs = [run for run in runs if not any(other in run.parents for other in runs)]
        if not runs:
            hint = "" if path.is_dir() else "; a file that ranks documents is compared with --qrels FILE"
            raise NearfarError(f"{path}: neither a run nor a folder of runs (no config.yaml in it){hint}.")
        folders += [RunFolder(run) for run in runs]
    unfinished = [str(folder) for folder in folders if not folder.finished]
    if unfinished:
        raise NearfarError(
            "not finished: "
            + ", ".join(unfinished)
            + ". Go on with: nearfar train resume_from=RUN, or leave them out."
        )
    if len(folders) < 2:
        raise NearfarError(f"a comparison needs at least two runs, not {len(folders)}.")
    return folders


def group_runs(folders: Sequence[RunFolder]) -> list[Arm]:
    """Arms in the order of their first runs; one seed of one configuration twice is an error."""
    arms: list[Arm] = []
    for folder in folders:
        config = folder.config()
        for arm in arms:
            if not apart([flatten(arm.config), flatten(config)]):
                if config.seed in arm.runs:
                    raise NearfarError(
                        f"{folder} and {arm.runs[config.seed]} are the same configuration and seed: leave one out."
                    )
                arm.runs[config.seed] = folder
                break
        else:
            arms.append(Arm([], {config.seed: folder}, config))
    for arm, parts in zip(arms, arm_parts([arm.config for arm in arms]), strict=True):
        arm.parts = parts
    return arms


def arm_parts(configs: Sequence[DictConfig]) -> list[list[str]]:
    """For the configuration of each arm what sets it apart from the others, as ``key=value``."""
    return _parts([flatten(config) for config in configs])


def apart(configs: Sequence[Mapping[str, object]]) -> list[str]:
    """The keys in which flat configurations differ, without those by which runs of one arm may, such as a seed.

    >>> apart([{"lr": 0.1, "seed": 0}, {"lr": 0.2, "seed": 1}])
    ['lr']
    """
    keys = sorted(
        {key for c in configs for key in c if any(other.get(key) != c.get(key) for other in configs)}
    )
    system = str(configs[0].get("system")) if configs else None
    return [key for key in keys if role_of(key, system) not in ("repeat", "place")]


def _parts(configs: Sequence[Mapping[str, object]]) -> list[list[str]]:
    """For each configuration what sets it apart from the others, as ``key=value``.

    A group is called by its name alone (``sampler=hard``, ``text_encoder=ngram``): its options follow from that, and
    are named only where configurations of the same name differ in them.

    >>> _parts([{"sampler.name": "hard", "sampler.order": "level"}, {"sampler.name": "random"}])
    [['sampler=hard'], ['sampler=random']]
    """
    keys = apart(configs)
    named = {k.split(".")[0]: k for k in keys if k.endswith((".name", ".kind"))}
    keys.sort(key=lambda k: (k.split(".")[0], k not in named.values(), k))
    every = []
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
        every.append(parts)
    return every


def _value(value: object) -> str:
    """As it is written on the command line: ``[3,5]``, ``null``, ``true``."""
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def load_scores(arm: Arm, split: str) -> None:
    """Read estimates and the scores of every item into ``arm``; seeds on different items are an error."""
    for seed, folder in sorted(arm.runs.items()):
        metrics = folder.read_json("metrics.json")["splits"]
        if split not in metrics:
            raise NearfarError(f"{folder} has no split '{split}', only {', '.join(metrics)}.")
        arm.estimates[seed] = {name: Estimate.from_dict(value) for name, value in metrics[split].items()}
        arrays, prefix = folder.read_arrays("per_item.npz"), f"{split}/"
        if prefix + "ids" not in arrays:
            raise NearfarError(f"{folder.path / 'per_item.npz'}: it has no ids of split '{split}'. {DAMAGED}")
        ids = arrays[prefix + "ids"]
        arm.per_item[seed] = {
            key[len(prefix) :]: array
            for key, array in arrays.items()
            if key.startswith(prefix) and key != prefix + "ids"
        }
        for name, scores in arm.per_item[seed].items():
            if scores.ndim < 1 or len(scores) != len(ids) or scores.dtype.kind not in "fiub":
                form = f"{scores.dtype} {scores.shape} for {len(ids)} items"
                raise NearfarError(f"{folder.path / 'per_item.npz'}: {name} is {form}. {DAMAGED}")
        first = next(iter(arm.estimates))
        if arm.ids is None:
            arm.ids = ids
        if not np.array_equal(arm.ids, ids) or _hashes(arm, seed) != _hashes(arm, first):
            raise NearfarError(
                f"{folder} was evaluated on different items from {arm.runs[first]}: their data changed between these "
                "seeds of one configuration. Leave one out, or train it anew."
            )


def _hashes(arm: Arm, seed: int) -> set[object]:
    """The splits that a run's estimates were measured on."""
    return {estimate.protocol.get("split") for estimate in arm.estimates[seed].values()}


def by_question(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Estimate]]:
    """Estimates by the question that their protocol states, "" where it states none.

    Numbers that answer different questions, such as a probe's accuracy and pair retrieval, are not shown in one table.
    """
    groups: dict[str, dict[str, Estimate]] = {}
    for name, estimate in estimates.items():
        groups.setdefault(str(estimate.protocol.get("question", "")), {})[name] = estimate
    return groups


#: levels that a step records of its loss, and their names in a sentence
LEVELS = {
    "candidates": "number of candidates",
    "uniform_level": "level of guessing",
    "floor": "floor",
    "scale": "temperature",
}
#: how far levels may differ that are means over a batch
CLOSE = 0.01


@dataclass(frozen=True)
class LossComparison:
    """Mean training losses of the last epoch, and why their difference means nothing (or its interval over seeds)."""

    base: float | None
    arm: float | None
    reason: str | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.base is None or self.arm is None:
            return f"training losses are not compared: {self.reason}"
        both = f"training losses {self.arm:.3f} and {self.base:.3f}"
        if self.reason:
            return f"{both} are not compared: {self.reason}"
        if self.low is None:
            return f"{both}: difference {self.arm - self.base:+.3f}, one seed, so without interval"
        return (
            f"{both}: difference {self.arm - self.base:+.3f} [{self.low:+.3f}, {self.high:+.3f}] over seeds"
        )


def compare_losses(base: Arm, arm: Arm) -> LossComparison:
    """The losses of ``arm`` beside those of ``base``, over the seeds they have in common."""
    common = sorted(set(base.runs) & set(arm.runs))
    if not common:
        return LossComparison(None, None, "no seed in common")
    first, second = ([_last(side.runs[seed]) for seed in common] for side in (base, arm))
    if any(loss is None for loss, _ in [*first, *second]):
        return LossComparison(None, None, "a run has no finished epoch in its log")
    ours, theirs = (np.array([loss for loss, _ in side], dtype=float) for side in (second, first))
    reason = _why_not(base, arm, first[0][1], second[0][1])
    bounds: tuple[float | None, float | None] = (None, None)
    if reason is None and len(common) > 1:
        bounds = few_runs(ours - theirs)
    return LossComparison(float(theirs.mean()), float(ours.mean()), reason, *bounds)


def _last(run: RunFolder) -> tuple[float | None, Json]:
    """The mean loss of the last epoch and the record of the last logged step."""
    loss, step = None, {}
    for record in run.log():
        if record.get("kind") == "epoch" and record.get("train_loss") is not None:
            loss = float(record["train_loss"])
        elif record.get("kind") == "step":
            step = record
    return loss, step


def _why_not(base: Arm, arm: Arm, first: Json, second: Json) -> str | None:
    a, b = flatten(base.config), flatten(arm.config)
    # The sampler first: its options follow from it.
    for key in sorted(set(a) | set(b), key=lambda key: (not key.startswith("sampler"), key)):
        if a.get(key) == b.get(key):
            continue
        role = role_of(key, a.get("system"))
        if role == "loss":
            return f"different loss ({key}: {b.get(key)} and {a.get(key)})"
        if role == "batches":
            return f"batches composed differently ({key}: {b.get(key)} and {a.get(key)})"
    for name, words in LEVELS.items():
        x, y = first.get(name), second.get(name)
        if (x is None) != (y is None):
            return f"only one of them states its {words}"
        if x is not None and y is not None and abs(x - y) > CLOSE * max(abs(x), abs(y)):
            return f"different {words}: {y:.4g} and {x:.4g}"
    return None
