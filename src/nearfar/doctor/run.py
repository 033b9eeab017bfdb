"""A run folder as signals: its log, and what its configuration, data and metrics say of the whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearfar.data.files import Json, Maybe, check_shape, parse_json, read_json, read_yaml
from nearfar.doctor.fields import NUMBERS, SWITCHES, WORDS
from nearfar.doctor.signals import Signals
from nearfar.errors import NearfarError

__all__ = ["is_run", "read_run"]

#: the system of a run that `nearfar.integrations` watched
WATCHED = "external"
#: what the doctor reads of the files beside the log
SHAPES = {
    "metrics.json": {
        "splits": Maybe({str: {str: {"protocol": Maybe(dict)}}}),
        "monitor": Maybe(str),
        "groups": Maybe(dict),
        "before_training": Maybe({str: {str: dict}}),
        "gain": Maybe({str: {str: {"value": float, "low": float, "high": float, "verdict": str}}}),
    },
    "dataset_layout.json": {"splits": Maybe({str: dict})},
}
#: counts that tell two lists of rows apart which are only numbered alike
_COUNTS = ("structures", "texts", "scaffolds", "rows_without_ring")


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a run of nearfar: its folder, or the log in it."""
    place = Path(path)
    if place.name == "train_log.jsonl":
        return True
    return (place / "train_log.jsonl").exists() or _is_config(place / "config.yaml")


def _is_config(path: Path) -> bool:
    """Whether a ``config.yaml`` is that of a run of nearfar; other trainers write files of this name, too."""
    if not os.path.lexists(path):
        return False
    try:
        content = read_yaml(path)
    except NearfarError:
        return not any(each.suffix == ".wandb" for each in path.parent.iterdir())
    return isinstance(content, Mapping) and "wandb_version" not in content and "_wandb" not in content


def read_run(folder: str | os.PathLike[str]) -> Signals:
    """The signals of a run folder, finished or not: a run without ``metrics.json`` is judged by its log.

    Raises ``NearfarError`` where there is neither a log nor a configuration, or a file cannot be read.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise NearfarError(f"folder is {type(folder).__name__}; the path of a run's folder is needed")
    path = Path(folder)
    if path.name == "train_log.jsonl":
        path = path.parent
    if not (path / "train_log.jsonl").exists() and not (path / "config.yaml").exists():
        what = (
            "there is no such folder" if not path.is_dir() else "it has no train_log.jsonl and no config.yaml"
        )
        raise NearfarError(f"{path} is not a run: {what}. Runs lie in runs/ unless runs_dir= says otherwise.")
    config = _config(path / "config.yaml")
    context = _options(config)
    layout = _json(path / "dataset_layout.json")
    metrics = _json(path / "metrics.json")
    model = _json(path / "model.json")
    for name in ("batchnorm", "world_size", "scale_max", "gradient_ratio"):
        for source in (model, metrics):
            if name in source:
                context.setdefault(name, source[name])
    # A run's batch is that of all its processes; in what the doctor reads it is that of one, as logs of others have it.
    if "batch_size" in context:
        context["batch_size"] /= context.get("world_size") or 1
    for name in ("monitor", "baselines", "groups", "change", "comparison", "before_training", "gain"):
        if metrics.get(name) is not None:
            context[name] = metrics[name]
    final = metrics.get("splits") or {}
    context |= {"metrics": final, "splits": _splits(layout.get("splits") or {}, final)}
    context["leaks"] = layout.get("leaks")
    records, unread = _log(path / "train_log.jsonl")
    signals = Signals(records, {k: v for k, v in context.items() if v is not None and v != {}})
    signals.unread = unread
    signals.foreign = config.get("system") == WATCHED
    return signals


def _config(path: Path) -> Json:
    """A run's configuration; {} of one that only has a log."""
    if not os.path.lexists(path):
        return {}
    config: Json = read_yaml(path) or {}
    check_shape(config, dict, str(path))
    return config


def _options(config: Json) -> Json:
    options = _flat(config)
    values = ((name, _option(options, name)) for name in sorted(WORDS | NUMBERS | SWITCHES))
    return {name: value for name, value in values if value is not None}


def _flat(config: Mapping[Any, object], before: str = "") -> dict[str, object]:
    """The options of a configuration by dotted key."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _option(options: Mapping[str, object], name: str) -> str | float | None:
    """The option that a field of the context is: ``FIELD`` or ``trainer.FIELD``; a word also ``FIELD.name`` and, in any
    group, ``GROUP.FIELD``. Of several the one with the shortest key.

    A schedule is a text, and an ensemble has the values of its members: neither is a number.
    """
    words = name in WORDS
    keys = [
        key
        for key in options
        if key in (name, f"trainer.{name}") or (words and (key == f"{name}.name" or key.endswith(f".{name}")))
    ]
    for value in (options[key] for key in sorted(keys, key=len)):
        if words and isinstance(value, str):
            return value
        if not words and isinstance(value, (bool, int, float)):
            return value
    return None


def _json(path: Path) -> Json:
    if not os.path.lexists(path):
        return {}
    content: Json = read_json(path, SHAPES.get(path.name, dict))
    return content


def _log(path: Path) -> tuple[list[Json], int]:
    """The records, and how many lines are none, such as one that a killed process cut off."""
    if not os.path.lexists(path):
        return [], 0
    if not path.is_file():
        raise NearfarError(f"{path} is no file, and the log of a run is expected in its place.")
    records, unread = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                unread += 1
    if unread and not records:
        raise NearfarError(
            f"{path}: none of its {unread} lines is a JSON object. A log has one object per line, such as "
            '{"step": 20, "loss": 3.9, "candidates": 64}.'
        )
    return records, unread


def _splits(layout: Json, metrics: Json) -> dict[str, Json]:
    """Rows and hash of each split.

    Files without an id column number their rows alike, so that two splits of one length may have one hash of ids. The
    other counts of the layout, and the hash of the content that stands with the metrics, tell them apart.
    """
    known = {name: {"rows": part.get("rows"), "hash": part.get("split_hash") or part.get("hash")}
             | {key: part[key] for key in ("ids", "gallery") if key in part}
             for name, part in layout.items() if isinstance(part, Mapping)}  # fmt: skip
    for name, part in layout.items():
        for other, second in layout.items():
            if other <= name or not (isinstance(part, Mapping) and isinstance(second, Mapping)):
                continue
            differ = any(part.get(key) != second.get(key) for key in _COUNTS)
            if part.get("rows") == second.get("rows") and differ:
                known[name]["hash"], known[other]["hash"] = f"{name}: by number", f"{other}: by number"
    for name, estimates in metrics.items():
        hashes = {
            (e.get("protocol") or {}).get("split") for e in estimates.values() if isinstance(e, Mapping)
        }
        if len(hashes) == 1 and (content := hashes.pop()) is not None:
            known.setdefault(name, {})["content"] = content
    return known
