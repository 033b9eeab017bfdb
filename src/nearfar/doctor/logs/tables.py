"""Logs as tables: Lightning's ``metrics.csv``, sentence-transformers' evaluations, any CSV file or JSON lines."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from nearfar.data.files import Json, parse_json, read_yaml
from nearfar.doctor.logs.hugging_face import whole_epochs
from nearfar.doctor.logs.log import Log
from nearfar.errors import NearfarError

__all__ = [
    "csv_rows",
    "json_lines",
    "lightning_table",
    "newest",
    "read_json_lines",
    "read_lightning",
    "read_sentence_transformers",
    "read_table",
    "sentence_transformers_tables",
    "table_file",
]

#: options that files of hyperparameters hold, by the names that other trainers give them
HYPERPARAMETERS = {
    "batch_size": ("batch_size", "per_device_train_batch_size", "train_batch_size"),
    "lr": ("lr", "learning_rate"),
    "temperature": ("temperature", "tau"),
    "epochs": ("epochs", "max_epochs", "num_train_epochs"),
    "precision": ("precision",),
    "world_size": ("world_size", "devices", "num_gpus"),
    "loss": ("loss", "loss_name", "criterion"),
    "memory": ("queue_size", "memory_size"),
}


def newest(paths: Sequence[Path]) -> Path | None:
    """The file that was written last."""
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def hyperparameters(values: Json) -> Json:
    """What a flat mapping of a trainer's options says, under the doctor's names."""
    known: Json = {}
    for name, spellings in HYPERPARAMETERS.items():
        for spelling in spellings:
            value = values.get(spelling)
            if isinstance(value, str) and name not in ("precision", "loss"):
                try:
                    value = float(value)
                except ValueError:
                    continue
            words = name in ("precision", "loss")
            if (
                isinstance(value, str)
                if words
                else isinstance(value, (int, float)) and not isinstance(value, bool)
            ):
                known.setdefault(name, value)
    return known


# -- Lightning -----------------------------------------------------------------------------------------------
def lightning_table(path: Path) -> Path | None:
    """``metrics.csv`` of a ``CSVLogger``: the file, in a folder, or in its newest version."""
    if path.is_file():
        return path if path.name == "metrics.csv" else None
    if (path / "metrics.csv").is_file():
        return path / "metrics.csv"
    return newest([*path.glob("version_*/metrics.csv"), *path.glob("*/version_*/metrics.csv")])


def read_lightning(path: Path) -> Log:
    """Its rows (epochs are counted from 0), and the hyperparameters that stand beside it."""
    context: Json = {}
    beside = path.with_name("hparams.yaml")
    if beside.is_file():
        content = read_yaml(beside)
        if isinstance(content, dict):
            context = hyperparameters(content)
    return Log("Lightning metrics.csv", path, list(csv_rows(path)), context)


# -- sentence-transformers -----------------------------------------------------------------------------------
def sentence_transformers_tables(path: Path) -> Path | None:
    """A table that an evaluator wrote, ``…_results.csv``; of a folder the folder."""
    if path.is_file():
        return path if path.name.endswith("_results.csv") else None
    tables = [*path.glob("*_results.csv"), *path.glob("eval/*_results.csv")]
    return newest(tables)


def read_sentence_transformers(path: Path) -> Log:
    """Scores by epoch and step; a step of -1 is the end of its epoch."""
    records = []
    for row in csv_rows(path):
        record: Json = {name: value for name, value in row.items() if name and value != ""}
        if str(record.get("steps", "")).strip() == "-1":
            del record["steps"]
        records.append(record)
    return Log("sentence-transformers evaluation", path, records, validation=True)


# -- any -----------------------------------------------------------------------------------------------------
def json_lines(path: Path) -> Path | None:
    """``.jsonl`` or ``.ndjson``; in a folder ``logging.jsonl`` (ms-swift), ``trainer_log.jsonl``, or the only one."""
    if path.is_file():
        return path if path.suffix.lower() in (".jsonl", ".ndjson") else None
    for name in ("logging.jsonl", "trainer_log.jsonl", "log.jsonl", "metrics.jsonl"):
        if (path / name).is_file():
            return path / name
    only = list(path.glob("*.jsonl"))
    return only[0] if len(only) == 1 else None


def read_json_lines(path: Path) -> Log:
    """One object a line; lines that are none are counted."""
    records: list[Json] = []
    unread = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in filter(str.strip, file):
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(_flat(record))
            else:
                unread += 1
    if unread and not records:
        raise NearfarError(f"{path}: none of its {unread} lines is a JSON object.")
    for record in records:  # ms-swift writes "25/1000"
        for name in ("global_step/max_steps", "step"):
            value = record.get(name)
            if isinstance(value, str) and value.partition("/")[0].strip().isdigit():
                record["global_step"] = int(value.partition("/")[0])
                del record[name]
    if any(isinstance(record.get("epoch"), float) and record["epoch"] % 1 for record in records):
        whole_epochs(records)
    kind = "ms-swift logging.jsonl" if path.name == "logging.jsonl" else "JSON lines"
    return Log(kind, path, records)


def _flat(record: Json, before: str = "") -> Json:
    """Nested objects as names with slashes."""
    flat: Json = {}
    for name, value in record.items():
        flat |= _flat(value, f"{before}{name}/") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def table_file(path: Path) -> Path | None:
    """A ``.csv`` or ``.tsv`` file; in a folder the only one."""
    if path.is_file():
        return path if path.suffix.lower() in (".csv", ".tsv") else None
    only = [*path.glob("*.csv"), *path.glob("*.tsv")]
    return only[0] if len(only) == 1 else None


def read_table(path: Path) -> Log:
    """Any table with a line of names. Of one that Weights & Biases exported for a chart ("RUN - train/loss", with
    columns of the least and the greatest value), the names of the run are left away."""
    rows = list(csv_rows(path))
    names = list(rows[0]) if rows else []
    runs = {name.partition(" - ")[0] for name in names if " - " in name}
    if not runs:
        return Log("table", path, list(rows))
    first = sorted(runs)[0]
    kept = {
        name: name.partition(" - ")[2] or name
        for name in names
        if (" - " not in name or name.startswith(f"{first} - ")) and not name.endswith(("__MIN", "__MAX"))
    }
    records: list[Json] = [
        {kept[name]: row[name] for name in kept if row.get(name, "") != ""} for row in rows
    ]
    notes = [f"the table has {len(runs)} runs; read is '{first}'"] if len(runs) > 1 else []
    return Log("Weights & Biases exported table", path, records, notes=notes)


def csv_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a line of names, as a logger writes one; cells end at commas, semicolons or tabs.

    A short row lacks its last cells. One with more cells than names, or a name that comes twice, is refused: it would
    not be clear which cell is which field's.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            mark = max(",;\t", key=head.count)
            rows = csv.reader(file, delimiter=mark)
            names = next(rows, [])
            twice = next((name for at, name in enumerate(names) if name and name in names[:at]), None)
            if twice is not None:
                raise NearfarError(f"{path} has several columns '{twice}'; rename them, or drop all but one")
            records = []
            for row in filter(None, rows):
                if len(row) > len(names) and any(cell.strip() for cell in row[len(names) :]):
                    raise NearfarError(
                        f"{path}: line {rows.line_num} has {len(row)} cells, but line 1 names {len(names)} columns; "
                        "put texts that hold the separator in quotes, and write decimal points"
                    )
                records.append(dict(zip(names, row, strict=False)))
            return records
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise NearfarError(f"{path}: not a CSV file that can be read ({error})") from None
