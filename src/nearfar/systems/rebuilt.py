"""What runs of earlier versions did not keep, made anew from the data that they were trained on."""

from __future__ import annotations

from pathlib import Path

from nearfar.data.files import read_json
from nearfar.errors import NearfarError
from nearfar.training.system import System

__all__ = ["prepare_again"]


def prepare_again(system: System, folder: Path, what: str) -> None:
    """Let a system read the data of its run again, and check that it is the same.

    Args:
        system: built from the configuration of the run.
        folder: that run.
        what: what the run did not keep, for messages.

    Raises:
        NearfarError: data that is not where it was, or has changed since.
    """
    lacking = f"{folder} is a run of an earlier version, which did not keep {what}"
    try:
        system.prepare(lambda _: None)
    except NearfarError as error:
        raise NearfarError(
            f"{lacking}; it can be made anew from the data of the run, which cannot be read: {error} Put the data "
            "where config.yaml in that folder names it, or train again."
        ) from None
    path = folder / "dataset_layout.json"
    before = read_json(path, {}).get("data_hash") if path.is_file() else None
    now = system.layout().get("data_hash")
    if before is not None and before != now:
        raise NearfarError(
            f"{lacking}; it can be made anew from the data of the run, which has changed since (hash {now}, then "
            f"{before}). Bring back the data of then, or train again."
        )
