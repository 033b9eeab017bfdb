"""What a reader gives: the records of a log under the names of its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nearfar.data.files import Json

__all__ = ["Log"]


@dataclass
class Log:
    """A log as it was written.

    Args:
        kind: what wrote it, in words: "Hugging Face trainer_state.json".
        path: the file or folder that was read.
        records: rows, oldest first, under the trainer's own names; texts may be numbers.
        context: what the files beside the log say of the run, under the doctor's names (``batch_size``, …).
        unread: lines that are no records.
        notes: what a user has to know of the reading: other runs or logs that are here, too.
        validation: names without a prefix that are scores of validation, in a log that holds no others.
    """

    kind: str
    path: Path
    records: list[Json]
    context: Json = field(default_factory=dict)
    unread: int = 0
    notes: list[str] = field(default_factory=list)
    validation: bool = False
