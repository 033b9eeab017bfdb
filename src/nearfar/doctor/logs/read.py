"""Which kind of log a path is, and its reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nearfar.doctor.logs.log import Log
from nearfar.doctor.logs.printed import open_clip_log, printed_log, read_open_clip, read_printed
from nearfar.doctor.logs.tables import (
    json_lines,
    lightning_table,
    read_json_lines,
    read_lightning,
    read_sentence_transformers,
    read_table,
    read_trainer_state,
    sentence_transformers_tables,
    table_file,
    trainer_state,
)
from nearfar.doctor.logs.trackers import (
    event_files,
    mlflow_run,
    read_event_files,
    read_mlflow,
    read_trackio,
    read_wandb,
    trackio_database,
    wandb_file,
)
from nearfar.errors import NearfarError

__all__ = ["KINDS", "find_log", "read_log"]

#: what is looked for in a path, the richest first: a name for people, what finds it (a path or None), what reads it
KINDS: tuple[tuple[str, Callable[[Path], Path | None], Callable[[Path], Log]], ...] = (
    ("Hugging Face trainer_state.json", trainer_state, read_trainer_state),
    ("open_clip out.log or results.jsonl", open_clip_log, read_open_clip),
    ("Lightning metrics.csv", lightning_table, read_lightning),
    ("Weights & Biases offline run", wandb_file, read_wandb),
    ("MLflow run", mlflow_run, read_mlflow),
    ("Trackio database", trackio_database, read_trackio),
    ("TensorBoard event files", event_files, read_event_files),
    ("sentence-transformers evaluation", sentence_transformers_tables, read_sentence_transformers),
    ("JSON lines", json_lines, read_json_lines),
    ("table", table_file, read_table),
    ("printed log", printed_log, read_printed),
)


def find_log(path: Path) -> list[tuple[str, Path, Callable[[Path], Log]]]:
    """The logs that a file or folder is or holds, the richest first: kind, place and reader."""
    places = [(kind, find(path), read) for kind, find, read in KINDS]
    return [(kind, place, read) for kind, place, read in places if place is not None]


def read_log(path: Path) -> Log:
    """The log of any trainer that a path is or holds.

    Raises:
        NearfarError: nothing there, no log in it (with what is read), or a damaged one.
    """
    if not path.exists():
        raise NearfarError(f"{path} is not a run: there is no such folder, and no such file.")
    logs = find_log(path)
    if not logs:
        inside = ""
        if path.is_dir():
            names = sorted(each.name for each in path.iterdir())[:8]
            inside = f" It holds {', '.join(names)}." if names else " It is empty."
        kinds = ", ".join(kind for kind, *_ in KINDS)
        raise NearfarError(
            f"{path} is not a run, and no log that is known.{inside} What is read: runs of nearfar, {kinds}."
        )
    kind, place, read = logs[0]
    log = read(place)
    if not log.records:
        raise NearfarError(f"{place} ({kind}) holds no record yet.")
    others = [f"{other} ({where})" for other, where, _ in logs[1:] if place not in (where, *where.parents)]
    if others and path.is_dir():
        log.notes.append(f"also here, and not read: {'; '.join(others[:3])}")
    return log
