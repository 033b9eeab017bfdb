"""A trained run for other tools: safetensors, ONNX, sentence-transformers, torch.export, each with a model card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from nearfar.data.chunks import NewData
from nearfar.data.items import Column, Items
from nearfar.errors import NearfarError, nearest_name
from nearfar.serving.card import model_card
from nearfar.serving.exported import (
    copy_results,
    is_exported,
    remove_places,
    write_manifest,
    write_members,
)
from nearfar.serving.fill import own_source
from nearfar.serving.trained import Trained, load
from nearfar.towers.build import tower_folder
from nearfar.training.run_folder import RunFolder

__all__ = ["Exported", "Format", "export_run"]

Format = Literal["safetensors", "onnx", "sentence-transformers", "torch"]
#: values with which graphs are checked
_CHECKED = 16
Say = Callable[[str], None]


@dataclass
class Exported:
    """What an export wrote: its folder, the views of the graphs, and how far each is from the model."""

    folder: Path
    format: Format
    views: list[str] = field(default_factory=list)
    #: for each graph the largest difference of a number of a unit vector
    differences: dict[str, float] = field(default_factory=dict)


def export_run(
    run: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    format: Format | str = "safetensors",
    *,
    tower: Sequence[str] | str | None = None,
    data: str | os.PathLike[str] | None = None,
    license: str | None = None,
    say: Say = lambda text: None,
) -> Exported:
    """Write a finished run into ``folder`` for other tools, with a model card.

    Args:
        run: a run folder, an ensemble, or a folder that was exported as safetensors.
        folder: a new or empty folder. It appears whole or not at all.
        format: "safetensors": everything that `nearfar.load` needs, without the machine that trained it; also of runs
            that embed nothing, and of ensembles. "onnx" and "torch" (a program of torch.export): a graph of each view,
            from tensors that anyone can make to unit vectors. "sentence-transformers": a text tower.
        tower: the views that are exported as graphs; all by default. Of sentence-transformers one.
        data: a table or folder whose values the graphs are traced and checked with; by default the run's own data,
            where it is still there.
        license: of the model, by its identifier on the hub, such as "apache-2.0"; for the card.
        say: announces what is checked, and how far graphs are from the model.

    Raises:
        NearfarError: a run that is not finished, a folder that is not empty, a view that cannot be exported in this
            format and why, a graph that differs from the model by more than 1e-5.
    """
    if format not in get_args(Format):
        raise NearfarError(f"--format {format}: {nearest_name(str(format), get_args(Format))}")
    chosen = cast(Format, format)
    source, target = Path(run).expanduser(), Path(folder).expanduser()
    _check_target(target)
    place = RunFolder(source)
    if source.is_dir() and place.started and not place.finished and not is_exported(source):
        raise NearfarError(
            f"{source} has not finished: it has no metrics.json. Let it end, or resume it: nearfar train "
            f"resume_from={source}"
        )
    trained = load(source, device="cpu")
    wanted = [tower] if isinstance(tower, str) else list(tower or [])
    for view in wanted:
        trained.view_of((), view)
    with _whole(target) as temporary:
        match chosen:
            case "safetensors":
                exported = _safetensors(trained, temporary, wanted, license)
            case "sentence-transformers":
                exported = _sentence_transformers(trained, temporary, wanted, data, license, say)
            case _:
                exported = _graphs(trained, temporary, chosen, wanted, data, license, say)
        remove_places(temporary)
    exported.folder = target
    return exported


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise NearfarError(f"{target} is not empty: export into a new folder, or remove it first.")
    if os.path.lexists(target) and not target.is_dir():
        raise NearfarError(f"{target} is no folder: export into a new one.")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name once everything in it is written, and is removed otherwise."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise NearfarError(f"{target} cannot be written: {error.strerror or error}.") from None
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _single(trained: Trained, format: str) -> None:
    if len(trained.members) > 1:
        raise NearfarError(
            f"{trained.path} is an ensemble of {len(trained.members)} models, and --format {format} holds one: export "
            "each member, or take --format safetensors."
        )
    if not trained.views:
        raise NearfarError(
            f"{trained.path}: a run of '{trained.config.system}' embeds no view, so there is no tower for --format "
            f"{format}: take --format safetensors."
        )


def _write_card(trained: Trained, folder: Path, format: str, license: str | None, **details: object) -> None:
    text = model_card(trained, format, details, license)
    (folder / "README.md").write_text(text, encoding="utf-8")


# -- formats -------------------------------------------------------------------------------------------------
def _safetensors(trained: Trained, folder: Path, wanted: Sequence[str], license: str | None) -> Exported:
    if wanted:
        raise NearfarError("--tower is for graphs: --format safetensors holds the whole model.")
    written = write_members([(member.system, member.model) for member in trained.members], folder)
    about = {"name": trained.name, "views": trained.views}
    write_manifest(folder, "safetensors", trained.config.system, about | written)
    copy_results(trained.path, folder, trained.config)
    _write_card(trained, folder, "safetensors", license)
    return Exported(folder, "safetensors", trained.views)


def _is_graph(trained: Trained, view: str) -> bool:
    """Whether a view can be exported as a graph, by its tower alone: nothing is traced."""
    try:
        trained.system.towers[view].graph()
    except NearfarError:
        return False
    return True


def _graphs(
    trained: Trained,
    folder: Path,
    format: Format,
    wanted: Sequence[str],
    data: str | os.PathLike[str] | None,
    license: str | None,
    say: Say,
) -> Exported:
    from nearfar.serving.graphs import view_graph, write_onnx, write_program

    _single(trained, format)
    views = list(wanted) or trained.views
    write = write_onnx if format == "onnx" else write_program
    values = checked_values(trained, views, data, say)
    exported, graphs = Exported(folder, format, views), {}
    for view in views:
        try:
            graph = view_graph(trained, view, values.get(view))
            parity = write(graph, folder / tower_folder(view))
        except NearfarError as error:
            others = [] if wanted else [each for each in trained.views if each != view]
            able = [each for each in others if _is_graph(trained, each)]
            hint = f" What can be exported: --tower {' --tower '.join(able)}." if able else ""
            raise NearfarError(f"{error}{hint}") from None
        say(str(parity))
        exported.differences[view] = parity.largest
        graphs[tower_folder(view)] = {"view": view, **graph.graph.describe()}
    name = {"name": trained.name, "views": {about["view"]: place for place, about in graphs.items()}}
    write_manifest(folder, format, trained.config.system, name)
    _write_card(trained, folder, format, license, graphs=graphs)
    return exported


def _sentence_transformers(
    trained: Trained,
    folder: Path,
    wanted: Sequence[str],
    data: str | os.PathLike[str] | None,
    license: str | None,
    say: Say,
) -> Exported:
    from nearfar.serving.graphs import TOLERANCE
    from nearfar.serving.sentence_transformers import compare, text_view, write_sentence_transformer

    _single(trained, "sentence-transformers")
    if len(wanted) > 1:
        raise NearfarError("--format sentence-transformers holds one tower: give --tower once.")
    view = text_view(trained, next(iter(wanted), None))
    write_sentence_transformer(trained, view, folder)
    write_manifest(
        folder, "sentence-transformers", trained.config.system, {"name": trained.name, "views": [view]}
    )
    _write_card(trained, folder, "sentence-transformers", license, tower=view)
    exported = Exported(folder, "sentence-transformers", [view])
    texts = checked_values(trained, [view], data, say).get(view)
    difference = compare(
        trained, view, folder, ["a text", "a second, longer text"] if texts is None else texts
    )
    if difference is None:
        say("not compared with the model: sentence-transformers is not installed here")
        return exported
    if not difference <= TOLERANCE:
        raise NearfarError(
            f"the exported folder gives vectors that differ from the model by {difference:.1e}, more than "
            f"{TOLERANCE:g}: it is not kept. Take --format safetensors."
        )
    say(f"{view}: largest difference from the model, as SentenceTransformer loads it: {difference:.1e}")
    exported.differences[view] = difference
    return exported


# -- values --------------------------------------------------------------------------------------------------
Values = Column


def checked_values(
    trained: Trained, views: Sequence[str], data: str | os.PathLike[str] | None, say: Say
) -> dict[str, Values]:
    """A few readable values of each view, from ``data`` or the run's own data; views without any are left out."""
    if data is not None:
        values = _values_in(trained.new_items(NewData(Path(data), rows=4 * _CHECKED)), views)
        for view in views:
            if view not in values:
                raise NearfarError(f"{data} has no column for the view '{view}'; name one like it.")
        return values
    if is_exported(trained.path):
        return {}  # its options name files that were on a different machine
    file, problem = own_file(trained), ""
    sources: list[Callable[[], Iterator[Items]]] = [lambda: iter(own_source(trained).chunks())]
    if file is not None:  # the first rows of a file, before all of the data is read
        sources.insert(0, lambda: trained.new_items(NewData(file, rows=4 * _CHECKED)))
    for source in sources:
        try:
            values = _values_in(source(), views)
        except (NearfarError, OSError) as error:
            problem = str(error)
            continue
        if len(values) == len(views):
            return values
    say(f"no values of the run's own data for the check: {problem or 'no row has all views'}")
    return {}


def _values_in(chunks: Iterator[Items], views: Sequence[str]) -> dict[str, Values]:
    """The first values of each view in the first chunk."""
    items = next(chunks, None)
    values: dict[str, Values] = {}
    for view in [view for view in views if items is not None and view in items]:
        assert items is not None
        at = np.flatnonzero(items.present(view))[:_CHECKED]
        column = items[view]
        if len(at):
            values[view] = column[at] if isinstance(column, np.ndarray) else [column[i] for i in at.tolist()]
    return values


def own_file(trained: Trained) -> Path | None:
    """A file of the run's own data that is still where it was; None where it is not, or there are several."""
    options = getattr(trained.config, "data", None)
    for name in ("test", "val", "train"):
        value = getattr(options, name, None)
        if isinstance(value, str | Path) and str(value) and Path(value).is_file():
            return Path(value)
    return None
