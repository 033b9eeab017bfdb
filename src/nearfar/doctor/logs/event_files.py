"""TensorBoard event files, by the library that writes them."""

from __future__ import annotations

from pathlib import Path

from nearfar.data.files import Json
from nearfar.doctor.logs.log import Log
from nearfar.errors import NearfarError

__all__ = ["event_files", "read_event_files"]


def event_files(path: Path) -> Path | None:
    """The folder of event files: that of the file, the folder, or the one below it that was written last."""
    if path.is_file():
        return path if "tfevents" in path.name else None
    if any(path.glob("*tfevents*")):
        return path
    files = [*path.glob("*/*tfevents*"), *path.glob("*/*/*tfevents*")]
    return max(files, key=lambda file: file.stat().st_mtime).parent if files else None


def read_event_files(path: Path) -> Log:
    """The scalars of all event files, one record a step."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator
    except ImportError:
        raise NearfarError("event files need TensorBoard: pip install 'nearfar[loggers]'.") from None
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0})
    try:
        events.Reload()
    except Exception as error:  # the library raises whatever a damaged file leads to
        raise NearfarError(
            f"{path}: event files that cannot be read ({type(error).__name__}: {error})."
        ) from None
    by_step: dict[int, Json] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            by_step.setdefault(event.step, {"step": event.step})[tag] = event.value
    for tag in events.Tags()["tensors"]:  # scalars as TensorFlow 2 writes them
        for event in events.Tensors(tag):
            values = list(event.tensor_proto.float_val) or list(event.tensor_proto.double_val)
            if len(values) == 1:
                by_step.setdefault(event.step, {"step": event.step})[tag] = values[0]
    others = [
        each
        for each in path.parent.iterdir()
        if each.is_dir() and each != path and any(each.glob("*tfevents*"))
    ]
    notes = [f"{len(others)} more folders of event files lie beside it"] if path.is_dir() and others else []
    return Log("TensorBoard event files", path, [by_step[step] for step in sorted(by_step)], notes=notes)
