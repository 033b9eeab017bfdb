"""Logs as tables: Hugging Face's ``trainer_state.json``, Lightning's ``metrics.csv``, evaluations of
sentence-transformers, any CSV file or JSON lines.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearfar.data.files import Json, parse_json, read_json, read_yaml
from nearfar.doctor.logs.log import Log, open_log, suffix
from nearfar.errors import NearfarError

__all__ = [
    "csv_rows",
    "is_table",
    "json_lines",
    "leave_out_summary",
    "lightning_table",
    "newest",
    "printed_dictionary",
    "read_json_lines",
    "read_lightning",
    "read_sentence_transformers",
    "read_table",
    "read_trainer_state",
    "sentence_transformers_tables",
    "table_file",
    "trainer_state",
    "whole_epochs",
]


_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def trainer_state(path: Path) -> Path | None:
    """``trainer_state.json``: the file itself (a copy of any name too), in a folder, or in its newest checkpoint."""
    if path.is_file():
        return path if path.name == "trainer_state.json" or _is_copy(path) else None
    if (path / "trainer_state.json").is_file():
        return path / "trainer_state.json"
    steps = []
    for each in path.glob("checkpoint-*/trainer_state.json"):
        match = _CHECKPOINT.search(each.parent.name)
        if match:
            steps.append((int(match.group(1)), each))
    return max(steps)[1] if steps else None


def _is_copy(path: Path) -> bool:
    if suffix(path) != ".json":
        return False
    with open_log(path) as file:
        return '"log_history"' in file.read(1 << 20)


def read_trainer_state(path: Path) -> Log:
    """Its ``log_history``; the batch size where it is stated."""
    state = read_json(path, {"log_history": [dict]})
    records = [dict(record) for record in state["log_history"]]
    notes = leave_out_summary(records)
    whole_epochs(records)
    context: Json = {}
    if isinstance(state.get("train_batch_size"), int):
        context["batch_size"] = state["train_batch_size"]
    if isinstance(state.get("num_train_epochs"), (int, float)):
        context["epochs"] = math.ceil(state["num_train_epochs"])
    best = state.get("best_metric")
    if isinstance(best, (int, float)) and not isinstance(best, bool):
        name = _metric_of(records, best, state.get("best_global_step"))
        if name is not None:
            context["monitor"] = name
    return Log("Hugging Face trainer_state.json", path, records, context, notes=notes)


def leave_out_summary(records: list[Json]) -> list[str]:
    """Takes the mean loss of the whole run out of the record that ends it; says so in notes."""
    notes = []
    for record in records:
        if "train_runtime" in record and "train_loss" in record:
            mean = record.pop("train_loss")
            notes.append(
                f"left out: train_loss {mean} of the summary, the mean over the run and no step's loss"
            )
    return notes


def whole_epochs(records: list[Json]) -> None:
    """Fractions of epochs become the number of the epoch that is being trained, from 1."""
    for record in records:
        epoch = record.get("epoch")
        try:
            value = float(epoch)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            record["epoch"] = max(1, math.ceil(value - 1e-6))


def _metric_of(records: list[Json], best: float, step: object) -> str | None:
    """The metric whose best value the trainer kept, by that value."""
    for record in records:
        for name, value in record.items():
            if name.startswith("eval_") and value == best and (step is None or record.get("step") == step):
                return name.removeprefix("eval_")
    return None


def printed_dictionary(line: str) -> Json | None:
    """The dictionary that a trainer printed as one line, ``{'loss': 4.1, 'epoch': 0.1}``; None for any other line."""
    import ast

    start, end = line.find("{"), line.rfind("}")
    if start < 0 or end <= start or end - start > 10_000:
        return None
    try:
        value = ast.literal_eval(line[start : end + 1])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return None
    return value


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


_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
_POINT = re.compile(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?")
_NUMBER = re.compile(
    r"[-+]?(?:\d+[.,]?\d*|[.,]\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?)", re.IGNORECASE
)


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
    table = csv_rows(path)
    return Log("Lightning metrics.csv", path, list(table.rows), context, table.unread, table.notes)


# -- sentence-transformers -----------------------------------------------------------------------------------
_EVALUATION = re.compile(r"_results(_@\d+)?\.csv$")


def sentence_transformers_tables(path: Path) -> Path | None:
    """A table that an evaluator wrote, ``…_results.csv`` or ``…_results_@10.csv``; of a folder the folder that has
    them, itself or ``eval/``."""
    if path.is_file():
        return path if _EVALUATION.search(path.name) else None
    return next((place for place in (path, path / "eval") if _evaluations(place)), None)


def _evaluations(folder: Path) -> list[Path]:
    return sorted(each for each in folder.glob("*_results*.csv") if _EVALUATION.search(each.name))


def read_sentence_transformers(path: Path) -> Log:
    """Scores by epoch and step, of all evaluators of a folder, whose names go before those of their scores where there
    are several (and before the accuracy of triplets: it says what chance is); a step of -1 is the end of its epoch."""
    files = [path] if path.is_file() else _evaluations(path)
    by_place: dict[tuple[str, str], Json] = {}
    unread, notes = 0, []
    for file in files:
        table = csv_rows(file)
        unread += table.unread
        notes += table.notes
        triplets = file.name.startswith(
            "triplet_evaluation"
        )  # whose accuracy is .5 by chance, which its name says
        before = f"{_EVALUATION.sub('', file.name)}/" if len(files) > 1 or triplets else ""
        for row in table.rows:
            place = {name: row[name] for name in ("epoch", "steps") if row.get(name, "") != ""}
            if place.get("steps", "").strip() == "-1":
                del place["steps"]
            record = by_place.setdefault((row.get("epoch", ""), row.get("steps", "")), dict(place))
            scores = ((name, value) for name, value in row.items() if name and name not in ("epoch", "steps"))
            record |= {f"{before}{name}": value for name, value in scores if value != ""}
    if len(files) > 1:
        notes.append(f"{len(files)} evaluators: {', '.join(file.name for file in files)}")
    return Log(
        "sentence-transformers evaluation", path, list(by_place.values()), {}, unread, notes, validation=True
    )


# -- any -----------------------------------------------------------------------------------------------------
def json_lines(path: Path) -> Path | None:
    """``.jsonl``, ``.ndjson`` or ``.json``; in a folder ``logging.jsonl`` (ms-swift), ``trainer_log.jsonl``, or the
    only one."""
    if path.is_file():
        return path if suffix(path) in (".jsonl", ".ndjson", ".json") else None
    for name in ("logging.jsonl", "trainer_log.jsonl", "log.jsonl", "metrics.jsonl"):
        if (path / name).is_file():
            return path / name
    only = list(path.glob("*.jsonl"))
    return only[0] if len(only) == 1 else None


def read_json_lines(path: Path) -> Log:
    """One object a line; lines that are none are counted. A ``.json`` file may be a list of objects, or an object of
    lists, a value for each step (as a history of epochs is dumped)."""
    records: list[Json] = []
    unread = 0
    whole = _whole(path) if suffix(path) == ".json" else None
    if whole is not None:
        records = whole
    else:
        with open_log(path) as file:
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
    return Log(
        "JSON file" if whole is not None else kind, path, records, {}, unread, leave_out_summary(records)
    )


def _whole(path: Path) -> list[Json] | None:
    """The records of a file that is one list of objects, or one object of lists of one length; None for any other."""
    with open_log(path) as file:
        try:
            content = parse_json(file.read())
        except ValueError:
            return None
    if isinstance(content, list):
        return [_flat(each) for each in content if isinstance(each, dict)]
    columns = {n: c for n, c in content.items() if isinstance(c, list)} if isinstance(content, dict) else {}
    if not columns:
        return None
    most = max(map(len, columns.values()))
    return [{name: column[i] for name, column in columns.items() if len(column) == most} for i in range(most)]


def _flat(record: Json, before: str = "") -> Json:
    """Nested objects as names with slashes."""
    flat: Json = {}
    for name, value in record.items():
        flat |= _flat(value, f"{before}{name}/") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def table_file(path: Path) -> Path | None:
    """A ``.csv`` or ``.tsv`` file, or a ``.txt``, ``.log`` or ``.dat`` file whose lines are one; in a folder the only
    one."""
    if path.is_file():
        kind = suffix(path)
        return (
            path
            if kind in (".csv", ".tsv") or (kind in (".txt", ".log", ".dat") and is_table(path))
            else None
        )
    only = [*path.glob("*.csv"), *path.glob("*.tsv"), *path.glob("*.csv.gz")]
    return only[0] if len(only) == 1 else None


def is_table(path: Path) -> bool:
    """Whether a text begins with a line of several names and one with as many numbers."""
    with open_log(path) as file:
        head, first = file.readline(), file.readline()
    mark = _separator(head)
    names, cells = head.split(mark), first.split(mark)
    words = len(names) > 1 and not any(_NUMBER.fullmatch(name.strip()) for name in names)
    return words and len(names) == len(cells) and all(_NUMBER.fullmatch(cell.strip()) for cell in cells)


def _separator(head: str) -> str | None:
    """What divides the cells of a table, by its line of names; None: blanks."""
    mark = max(",;\t", key=head.count)
    return mark if mark in head or " " not in head.strip() else None


def read_table(path: Path) -> Log:
    """Any table with a line of names. Of one that Weights & Biases exported for a chart ("RUN - train/loss", with
    columns of the least and the greatest value), the names of the run are left away; of several runs, the one with
    the most values is read."""
    table = csv_rows(path)
    rows, notes = table.rows, table.notes
    names = list(rows[0]) if rows else []
    parts = {name: name.rpartition(" - ") for name in names}
    runs = list(dict.fromkeys(run for run, mark, _ in parts.values() if mark))
    if not runs:
        return Log("table", path, list(rows), {}, table.unread, notes)
    counts = {
        run: max(sum(row.get(n, "") != "" for row in rows) for n in names if parts[n][0] == run)
        for run in runs
    }
    read = max(runs, key=lambda run: counts[run])
    kept = {
        name: last for name, (run, mark, last) in parts.items()
        if (not mark or run == read) and not name.endswith(("__MIN", "__MAX"))
    }  # fmt: skip
    records: list[Json] = [
        {kept[name]: row[name] for name in kept if row.get(name, "") != ""} for row in rows
    ]
    if len(runs) > 1:
        others = ", ".join(f"'{run}'" for run in runs if run != read)
        notes.append(f"the table has {len(runs)} runs; read is '{read}', and not {others}")
    return Log("Weights & Biases exported table", path, list(filter(None, records)), {}, table.unread, notes)


@dataclass
class Table:
    """Rows of a table by the names of its columns, how many lines were left out, and what was taken for granted."""

    rows: list[dict[str, str]]
    unread: int = 0
    notes: list[str] = field(default_factory=list)


def csv_rows(path: Path) -> Table:
    """The rows of a CSV file with a line of names, as a logger writes one; cells end at commas, semicolons, tabs or
    blanks. Numbers may have decimal commas, where no cell has a decimal point.

    A short row lacks its last cells; a short last line that has no end was cut off by a killed process, and is left
    out. A row with more cells than names, or a name that comes twice, is refused: it would not be clear which cell is
    which field's.
    """
    try:
        with open_log(path) as file:
            text = file.read()
    except (OSError, EOFError) as error:
        raise NearfarError(f"{path}: not a CSV file that can be read ({error})") from None
    mark = _separator(text.lstrip().partition("\n")[0])
    try:
        cells = list(filter(None, _cells(text, mark)))
    except csv.Error as error:
        raise NearfarError(f"{path}: not a CSV file that can be read ({error})") from None
    names = [name.strip() for name in cells[0]] if cells else []
    if names and all(_NUMBER.fullmatch(name) for name in names if name):
        raise NearfarError(
            f"{path}: line 1 holds numbers ({', '.join(names[:4])}) where the names of the columns are needed; put a "
            "line such as 'step,loss' before it."
        )
    twice = next((name for at, name in enumerate(names) if name and name in names[:at]), None)
    if twice is not None:
        raise NearfarError(f"{path} has several columns '{twice}'; rename them, or drop all but one")
    cut = len(cells) > 1 and not text.endswith(("\n", "\r")) and len(cells[-1]) < len(names)
    body = cells[1:-1] if cut else cells[1:]
    for at, row in enumerate(body, 2):
        if len(row) > len(names) and any(cell.strip() for cell in row[len(names) :]):
            raise NearfarError(
                f"{path}: line {at} has {len(row)} cells, but line 1 names {len(names)} columns; "
                "put texts that hold the separator in quotes, and write decimal points"
            )
    rows = [dict(zip(names, row, strict=False)) for row in body]
    return Table(rows, int(cut), _decimal_commas(rows))


def _cells(text: str, mark: str | None) -> Iterator[list[str]]:
    if mark is None:
        return (line.split() for line in text.splitlines())
    return csv.reader(io.StringIO(text, newline=""), delimiter=mark)


def _decimal_commas(rows: list[dict[str, str]]) -> list[str]:
    """Decimal points for decimal commas, in place, where all fractions of the table have these; says so in notes."""
    every = [cell.strip() for row in rows for cell in row.values()]
    if not any(map(_DECIMAL_COMMA.fullmatch, every)) or any(map(_POINT.fullmatch, every)):
        return []
    for row in rows:
        row |= {n: c.replace(",", ".") for n, c in row.items() if _DECIMAL_COMMA.fullmatch(c.strip())}
    return ["decimal commas were read as decimal points"]
