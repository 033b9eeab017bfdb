"""Hugging Face trainers (transformers, sentence-transformers, TRL, ms-swift): ``trainer_state.json``."""

from __future__ import annotations

import math
import re
from pathlib import Path

from nearfar.data.files import Json, read_json
from nearfar.doctor.logs.files import open_log, suffix
from nearfar.doctor.logs.log import Log

__all__ = ["leave_out_summary", "printed_dictionary", "read_trainer_state", "trainer_state", "whole_epochs"]

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
