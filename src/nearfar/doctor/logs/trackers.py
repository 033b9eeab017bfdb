"""Experiment trackers on disk: W&B offline runs, MLflow's ``mlruns``, Trackio's databases, TensorBoard event files."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from nearfar.data.files import Json, parse_json, read_yaml
from nearfar.doctor.logs.log import Log
from nearfar.doctor.logs.tables import hyperparameters, newest
from nearfar.errors import NearfarError

__all__ = [
    "event_files",
    "mlflow_run",
    "read_event_files",
    "read_mlflow",
    "read_trackio",
    "read_wandb",
    "trackio_database",
    "wandb_file",
]


def event_files(path: Path) -> Path | None:
    """The folder of event files: that of the file, the folder, or of those nearest below it the one that was written
    last. Folders below a run are parts of it: `add_hparams` and `add_scalars` write some."""
    if path.is_file():
        return path if "tfevents" in path.name else None
    if any(path.glob("*tfevents*")):
        return path
    files = [*path.glob("*/*tfevents*")] or [*path.glob("*/*/*tfevents*")]
    return max(files, key=lambda file: file.stat().st_mtime).parent if files else None


def read_event_files(path: Path) -> Log:
    """The scalars of all event files, one record a step; ``add_scalars("loss", {"train": …})``, which writes a folder
    ``loss_train`` for each, as ``loss/train``."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    except ImportError:
        raise NearfarError("event files need TensorBoard: pip install 'nearfar[loggers]'.") from None
    by_step: dict[int, Json] = {}
    parts = sorted({file.parent for file in path.glob("*/*tfevents*")}) if path.is_dir() else []
    for place in (path, *parts):
        events = EventAccumulator(str(place), size_guidance={SCALARS: 0, TENSORS: 0})
        try:
            events.Reload()
        except Exception as error:  # the library raises whatever a damaged file leads to
            raise NearfarError(
                f"{place}: event files that cannot be read ({type(error).__name__}: {error})."
            ) from None
        values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        for tag in events.Tags()["tensors"]:  # scalars as TensorFlow 2 writes them
            for event in events.Tensors(tag):
                numbers = list(event.tensor_proto.float_val) or list(event.tensor_proto.double_val)
                if len(numbers) == 1:
                    values.setdefault(tag, []).append((event.step, numbers[0]))
        for tag, points in values.items():
            name = tag if place == path else _of_part(place.name, tag)
            for step, value in points if name else ():
                by_step.setdefault(step, {"step": step})[name] = value
    others = [
        each
        for each in path.parent.iterdir()
        if each.is_dir() and each != path and any(each.glob("*tfevents*"))
    ]
    notes = [f"{len(others)} more folders of event files lie beside it"] if path.is_dir() and others else []
    return Log("TensorBoard event files", path, [by_step[step] for step in sorted(by_step)], notes=notes)


def _of_part(folder: str, tag: str) -> str:
    """The name of a scalar in a folder that ``add_scalars`` wrote, ``TAG_NAME``; "" for any other folder.

    >>> _of_part("Loss_train", "Loss"), _of_part("1764400000.1", "hparam/acc")
    ('Loss/train', '')
    """
    head = tag.replace("/", "_") + "_"
    return f"{tag}/{folder[len(head) :]}" if folder.startswith(head) else ""


# -- Weights & Biases ----------------------------------------------------------------------------------------
def wandb_file(path: Path) -> Path | None:
    """``run-ID.wandb``: the file, in the folder of a run, or of the newest run below ``wandb/``."""
    if path.is_file():
        return path if path.suffix == ".wandb" else None
    places = [
        *path.glob("run-*.wandb"),
        *path.glob("*run-*/run-*.wandb"),
        *path.glob("wandb/*run-*/run-*.wandb"),
    ]
    return newest(places)


def read_wandb(path: Path) -> Log:
    """The history of an offline run, and its configuration."""
    try:
        from wandb.proto import wandb_internal_pb2
        from wandb.sdk.internal.datastore import DataStore
    except ImportError:
        raise NearfarError(
            "offline runs of Weights & Biases need its library: pip install 'nearfar[loggers]'. A table that was "
            "exported as CSV is read without."
        ) from None
    store = DataStore()
    records: list[Json] = []
    config: Json = {}
    unread = 0
    try:
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                records.append(_wandb_items(record.history.item))
            elif record.HasField("config"):
                config |= _wandb_items(record.config.update)
    except (
        Exception
    ) as error:  # a record that a killed process cut off: protobuf raises a DecodeError of its own
        known = (
            isinstance(error, (AssertionError, OSError, ValueError)) or type(error).__name__ == "DecodeError"
        )
        if not known or not records:
            raise NearfarError(f"{path}: an offline run that cannot be read ({error}).") from None
        unread = 1
    for row in records:
        if "_step" in row:
            row["step"] = row.pop("_step")
        for name in [name for name in row if name.startswith("_")]:
            del row[name]
    return Log("Weights & Biases offline run", path, records, hyperparameters(config), unread)


def _wandb_items(items: object) -> Json:
    values: Json = {}
    for item in items:  # type: ignore[attr-defined]
        name = item.key or "/".join(item.nested_key)
        try:
            value = json.loads(item.value_json)
        except ValueError:
            continue
        if isinstance(value, dict) and set(value) == {"value"}:
            value = value["value"]
        if isinstance(value, (int, float, str)):
            values[name] = value
    return values


# -- MLflow --------------------------------------------------------------------------------------------------
def mlflow_run(path: Path) -> Path | None:
    """The folder of a run with ``metrics/``; of ``mlruns`` or an experiment the run that was written last; or
    ``mlflow.db``."""
    if path.is_file():
        return path if path.name == "mlflow.db" else None
    if (path / "meta.yaml").is_file() and (path / "metrics").is_dir():
        return path
    runs = [*path.glob("*/metrics"), *path.glob("*/*/metrics"), *path.glob("mlruns/*/*/metrics")]
    metrics = newest([run for run in runs if (run.parent / "meta.yaml").is_file()])
    if metrics is not None:
        return metrics.parent
    return path / "mlflow.db" if (path / "mlflow.db").is_file() else None


def read_mlflow(path: Path) -> Log:
    """The metrics by step, and the parameters."""
    if path.is_file():
        return _mlflow_database(path)
    by_step: dict[int, Json] = {}
    unread = 0
    for file in sorted(each for each in (path / "metrics").rglob("*") if each.is_file()):
        name = file.relative_to(path / "metrics").as_posix()
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            parts = line.split()  # timestamp, value, step
            try:
                value, step = float(parts[1]), int(parts[2]) if len(parts) > 2 else 0
            except (IndexError, ValueError):
                unread += 1
                continue
            by_step.setdefault(step, {"step": step})[name] = value
    parameters: Json = {}
    if (path / "params").is_dir():
        for file in (path / "params").rglob("*"):
            if file.is_file():
                parameters[file.name] = file.read_text(encoding="utf-8", errors="replace").strip()
    notes = []
    meta = read_yaml(path / "meta.yaml")
    if isinstance(meta, dict) and meta.get("run_name"):
        notes.append(f"run '{meta['run_name']}'")
    records = [by_step[step] for step in sorted(by_step)]
    return Log("MLflow run", path, records, hyperparameters(parameters), unread, notes)


def _mlflow_database(path: Path) -> Log:
    rows = _query(path, "SELECT run_uuid, key, value, step, timestamp FROM metrics ORDER BY timestamp")
    runs = list(dict.fromkeys(str(row[0]) for row in rows))
    last = runs[-1] if runs else ""
    by_step: dict[int, Json] = {}
    for run, key, value, step, _ in rows:
        if run == last:
            by_step.setdefault(int(step), {"step": int(step)})[str(key)] = value
    known = {
        str(key): value
        for run, key, value in _query(path, "SELECT run_uuid, key, value FROM params")
        if run == last
    }
    notes = [f"the database has {len(runs)} runs; read is the newest, {last}"] if len(runs) > 1 else []
    return Log(
        "MLflow database", path, [by_step[s] for s in sorted(by_step)], hyperparameters(known), notes=notes
    )


# -- Trackio -------------------------------------------------------------------------------------------------
def trackio_database(path: Path) -> Path | None:
    """``PROJECT.db``: the file, or the one of a folder that was written last."""
    files = [path] if path.is_file() else list(path.glob("*.db"))
    fitting = []
    for file in files:
        if file.suffix != ".db" or file.name == "mlflow.db":
            continue
        try:
            columns = {str(row[1]) for row in _query(file, "PRAGMA table_info(metrics)")}
        except NearfarError:
            continue
        if {"run_name", "metrics"} <= columns:
            fitting.append(file)
    return newest(fitting)


def read_trackio(path: Path) -> Log:
    """The metrics of the project's newest run."""
    rows = _query(path, "SELECT run_name, step, metrics FROM metrics ORDER BY id")
    runs = list(dict.fromkeys(str(row[0]) for row in rows))
    records: list[Json] = []
    for run, step, text in rows:
        if run != runs[-1]:
            continue
        try:
            values = parse_json(text)
        except (ValueError, TypeError):
            continue
        if isinstance(values, dict):
            records.append(
                {"step": step} | {n: v for n, v in values.items() if isinstance(v, (int, float, str))}
            )
    notes = [f"the project has {len(runs)} runs; read is the newest, '{runs[-1]}'"] if len(runs) > 1 else []
    return Log("Trackio database", path, records, notes=notes)


def _query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a database that is only read."""
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return list(connection.execute(sql))
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise NearfarError(f"{path}: not a database that can be read ({error}).") from None
