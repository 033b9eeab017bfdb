"""TensorBoard event files, by the library that writes them."""

from __future__ import annotations

from pathlib import Path

from nearfar.data.files import Json
from nearfar.doctor.logs.log import Log
from nearfar.errors import NearfarError

__all__ = ["event_files", "read_event_files"]


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
