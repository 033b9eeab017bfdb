"""Cross-validation as a sweep over folds: every item is in one test set, and all test sets are judged together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nearfar.config.compose import compose_config, merge_overrides
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.metrics import Estimate
from nearfar.systems import reevaluator
from nearfar.training.run_folder import RunFolder

__all__ = ["CrossValidation", "cross_validate"]


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
