"""Several runs as one: an ensemble averages outputs, cross-validation judges the test sets of all folds together.

An ensemble chooses its thresholds anew and is a run folder itself; folds put every item in one test set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from nearfar.config.compose import compose_config, flatten, merge_overrides
from nearfar.data.files import Json, make_folder
from nearfar.errors import NearfarError
from nearfar.lab.groups import apart, find_runs
from nearfar.lab.report import write_report
from nearfar.metrics import Estimate
from nearfar.systems import build_system, reevaluator
from nearfar.training.checkpoint import Checkpoint, find_checkpoint
from nearfar.training.evaluation import outputs_of
from nearfar.training.fit import write_diagnosis, write_results
from nearfar.training.run_folder import RunFolder, environment
from nearfar.training.state import initial_model, load_weights
from nearfar.training.system import Evaluation, System

__all__ = ["CrossValidation", "cross_validate", "write_ensemble"]


Say = Callable[[str], None]


def write_ensemble(runs: Sequence[Path], output: Path | None = None, say: Say = lambda _: None) -> RunFolder:
    """Average the outputs of ``runs`` (folders of runs count as their runs) and write them as a run of its own.

    Every member reads its data and its best checkpoint again. What is chosen on validation, such as thresholds, is
    chosen for the average. The configuration is that of the first member, with the members under ``ensemble`` and,
    where members differ, a list of their values: to ``nearfar compare`` it is an arm of its own.

    Raises ``NearfarError`` for fewer than two runs, other systems or data than the first one's, and for a system whose
    outputs cannot be averaged.
    """
    folders = find_runs(runs)
    kind, data = _same(folders)
    members = [str(folder.path) for folder in folders]
    place = (
        output or Path(os.path.commonpath([folder.path.resolve().parent for folder in folders])) / "ensemble"
    )
    if (place / "config.yaml").exists() or (place / "metrics.json").exists():
        raise NearfarError(f"{place} is a run already: give a different folder with --output.")
    target = RunFolder(place)
    target.check_own()
    first: System | None = None
    collected: dict[str, list[dict[str, Tensor]]] = {}
    beside: list[dict[str, Tensor]] = []
    for folder in folders:
        system = build_system(folder.config(), saved=True)
        if not system.defines("average"):
            raise NearfarError(f"system '{kind}' does not say how its outputs are averaged.")
        system.prepare(lambda _: None)
        if (now := system.layout()["data_hash"]) != data:
            raise NearfarError(
                f"{folder}: its data has changed since (hash {data}, now {now}); train it anew, or leave it out."
            )
        say(f"{folder.name} …")
        for split, outputs in _outputs(system, folder).items():
            collected.setdefault(split, []).append(outputs)
        beside.append(system.beside_outputs())
        first = first or system
    assert first is not None
    first.average_beside(beside)
    averaged = {split: first.average(every) for split, every in collected.items()}
    first.calibrate(lambda split: averaged[split], say)
    reported: dict[str, dict[str, Tensor]] = {
        split: averaged[split] for split in ("val", "test") if split in averaged
    }
    results: dict[str, Evaluation] = {
        split: first.evaluate(outputs, split, final=True) for split, outputs in reported.items()
    }
    make_folder(target.path)
    target.write_text("config.yaml", OmegaConf.to_yaml(_config(folders, members), resolve=True))
    target.write_json("environment.json", environment())
    target.write_json("dataset_layout.json", first.layout())
    write_results(target, first, results, reported, _about(folders))
    write_diagnosis(target, say)
    write_report(target)
    return target


def _same(folders: Sequence[RunFolder]) -> tuple[str, str]:
    """The system and the hash of the data that all runs have in common."""
    first = folders[0]
    kind, data = first.config().system, first.read_json("dataset_layout.json")["data_hash"]
    for folder in folders[1:]:
        if folder.config().system != kind:
            raise NearfarError(f"{folder} is a run of '{folder.config().system}', {first} of '{kind}'.")
        if folder.read_json("dataset_layout.json")["data_hash"] != data:
            raise NearfarError(
                f"{folder} and {first} were trained on different data: they cannot be averaged."
            )
    for folder in folders:
        if folder.read_json("metrics.json").get("members"):
            raise NearfarError(f"{folder} is an ensemble itself: name its members instead.")
    return str(kind), str(data)


def _outputs(system: System, folder: RunFolder) -> dict[str, dict[str, Tensor]]:
    """Outputs of every split but train, by the run's best checkpoint."""
    config = system.config
    model = initial_model(system, config.seed)
    path = find_checkpoint(folder.path, prefer="best")
    load_weights(model, Checkpoint.load(path), system, str(path))
    splits = [split for split in system.layout()["splits"] if split != "train"]
    with torch.random.fork_rng():
        return {split: outputs_of(system, model, config, split) for split in splits}


def _config(folders: Sequence[RunFolder], members: list[str]) -> DictConfig:
    configs: list[DictConfig] = [folder.config() for folder in folders]
    config = configs[0].copy()
    with open_dict(config):
        for key in apart([flatten(each) for each in configs]):
            OmegaConf.update(config, key, [OmegaConf.select(each, key) for each in configs], force_add=True)
        config.ensemble = " + ".join(Path(member).name for member in members)
        config.name, config.overrides = None, []
    return config


def _about(folders: Sequence[RunFolder]) -> dict[str, object]:
    every: list[Json] = [folder.read_json("metrics.json") for folder in folders]
    return {
        "members": [str(folder.path) for folder in folders],
        "best_epoch": None,
        "epochs": sum(each["epochs"] for each in every),
        "steps": sum(each["steps"] for each in every),
        "train_seconds": round(sum(each["train_seconds"] for each in every), 2),
    }


@dataclass(frozen=True)
class CrossValidation:
    """Estimates over all folds, differences from controls on the same items, and where the runs lie."""

    folder: Path
    runs: Sequence[Path]
    estimates: Mapping[str, Estimate]
    differences: Sequence[Json]


def cross_validate(
    overrides: Sequence[str], folds: int, train: Callable[[list[str]], None]
) -> CrossValidation:
    """Train once a fold, with ``train`` called as ``nearfar train`` with a sweep's arguments, and judge all together.

    Raises ``NearfarError`` for a system whose data cannot be cut into folds, and where a fold's run did not finish.
    """
    if folds < 2:
        raise NearfarError(f"--folds {folds}: at least two are needed.")
    flags = [word for word in overrides if word.startswith("-")]
    given = [word for word in overrides if not word.startswith("-")]
    if any(word.split("=")[0] in ("data.fold", "data.folds") for word in given):
        raise NearfarError(
            "crossval chooses data.fold and data.folds itself: leave them out, and give --folds."
        )
    values = dict(word.split("=", 1) for word in given if "=" in word)
    name = values.get("name") or f"crossval-{values.get('experiment', '')}"
    fixed = merge_overrides(given, [f"name={name}", f"data.folds={folds}"])
    config = compose_config([*fixed, "data.fold=0"])
    train(["-m", *flags, *fixed, f"data.fold={','.join(str(k) for k in range(folds))}"])
    folder = Path(str(config.runs_dir)) / name
    runs = [folder / f"data.fold={k}" for k in range(folds)]
    missing = [str(run) for run in runs if not RunFolder(run).finished]
    if missing:
        raise NearfarError(f"not finished: {', '.join(missing)}")
    judged, differences = reevaluator(runs[0], "crossval").pool(runs)
    RunFolder(folder).write_json(
        "crossval.json",
        {
            "folds": folds,
            "runs": [run.name for run in runs],
            "estimates": {name: estimate.to_dict() for name, estimate in judged.estimates.items()},
            "differences": differences,
        },
    )
    return CrossValidation(folder, runs, judged.estimates, differences)
