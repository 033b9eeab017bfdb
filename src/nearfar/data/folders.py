"""Folders as sources of items: pictures whose folders are the classes, and ``datasets`` of Hugging Face.

What ``datasets`` saved to disk is read without the library; what is fetched by name needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from nearfar.data.column_kinds import PICTURE_SUFFIXES
from nearfar.data.files import Json, Maybe, read_json
from nearfar.data.items import Column, Items
from nearfar.data.picture_files import walk_files
from nearfar.data.table_items import Wanted, choose
from nearfar.data.typed_tables import arrow_items
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["dataset_items", "dataset_splits", "hub_items", "hub_name", "hub_splits", "image_folder_items"]


def image_folder_items(folder: Path) -> Items:
    """The pictures below a folder: ``image`` (path), ``label``, the folder directly below ``folder`` that they are in.

    Where they lie deeper (``folder/genus/species/a.png``), ``folder`` is the whole of it, ``genus/species``. A picture
    beside the folders of classes has no label. Ids are the paths below ``folder``. Hidden files are passed over, links
    are followed once; files that are no pictures by their endings are counted in the notes. Nothing is opened.

    Raises:
        NearfarError: no picture.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("cat/1.png", "dog/2.jpg", "dog/read.me"):
    ...     (root / name).parent.mkdir(exist_ok=True)
    ...     (root / name).touch()
    >>> items = image_folder_items(root)
    >>> items.ids, items["label"], items.notes
    (['cat/1.png', 'dog/2.jpg'], ['cat', 'dog'], {'files that are no pictures': {'.me': 1}})
    """
    others: Counter[str] = Counter()
    paths: list[Path] = []
    for path in walk_files(folder):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            paths.append(path)
        else:
            others[path.suffix.lower() or "without ending"] += 1
    if not paths:
        held = ", ".join(f"{count} {ending}" for ending, count in others.most_common(8)) or "no file at all"
        raise NearfarError(
            f"{folder} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES)[:6])}, …) and nothing else that is read; "
            f"below it: {held}."
        )
    inner = [path.relative_to(folder) for path in paths]
    labels = [place.parts[0] if len(place.parts) > 1 else None for place in inner]
    columns: dict[str, Column] = {"image": [str(path) for path in paths], "label": labels}
    if any(len(place.parts) > 2 for place in inner):
        columns["folder"] = [place.parent.as_posix() if len(place.parts) > 1 else None for place in inner]
    notes: Json = {}
    if others:
        notes["files that are no pictures"] = dict(others)
    without = labels.count(None)
    if 0 < without < len(labels):
        notes["pictures outside the folders of classes"] = without
    ids = [place.as_posix() for place in inner]
    return Items(ids, columns, str(folder), rows=list(range(1, len(ids) + 1)), notes=notes)


_BATCH = 1024  # rows that are in memory at once
_INFO = {"features": Maybe({str: object})}
_STATE = {"_data_files": [{"filename": str}]}


def dataset_splits(folder: Path) -> dict[str, Path] | None:
    """The splits of a ``DatasetDict`` that was saved to disk, as folders; None where ``folder`` is none."""
    about = folder / "dataset_dict.json"
    if not about.is_file():
        return None
    names = read_json(about, {"splits": [str]})["splits"]
    wrong = [name for name in names if Path(name).name != name or not (folder / name).is_dir()]
    if wrong or not names:
        raise NearfarError(
            f"{about} names the splits {names}, and there is no folder of {wrong or 'any'} beside it."
        )
    return {name: folder / name for name in names}


def dataset_items(
    folder: Path,
    wanted: Wanted,
) -> Items:
    """The items of one ``Dataset`` that was saved to disk (``save_to_disk``); read without the library ``datasets``.

    Names of classes take the place of their numbers; pictures inside go into the cache.

    Raises:
        NearfarError: as `nearfar.data.sources.read_items`, and for a folder that was saved in part.
    """
    import pyarrow

    features = read_json(folder / "dataset_info.json", _INFO).get("features") or {}
    state = read_json(folder / "state.json", _STATE)
    if state.get("_indices_data_files"):
        raise NearfarError(
            f"{folder} was saved with an order of its rows apart (datasets before 2.0): load it with the library "
            "and save it again after flatten_indices()."
        )
    names = [str(file["filename"]) for file in state["_data_files"]]
    files = [folder / name for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name or not file.is_file():
            raise NearfarError(f"{folder}: its part {name} is missing: save or copy it again.")
    if not files:
        raise NearfarError(f"{folder} is a dataset without rows.")
    try:
        header = _stream(files[0])[0]
        return arrow_items(str(folder), folder, header, _batches(files), features, wanted)
    except NearfarError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        raise NearfarError(
            f"{folder} cannot be read as a saved dataset: {str(error).splitlines()[0]}. Save or copy it again."
        ) from None


def _stream(file: Path) -> tuple[list[str], Iterable[pyarrow.RecordBatch]]:
    """The column names and a reader of an Arrow file, as a stream or with an index at its end."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        reader = pyarrow.ipc.open_stream(source)
        return list(reader.schema.names), reader
    except pyarrow.ArrowInvalid:
        source.seek(0)
        reader = pyarrow.ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        return list(reader.schema.names), batches


def _batches(files: Sequence[Path]) -> Iterator[pyarrow.Table]:
    import pyarrow

    for file in files:
        for batch in _stream(file)[1]:
            batch.validate(full=True)  # a damaged offset would end the process, not raise
            yield pyarrow.Table.from_batches([batch])


# -- by name, over the network -------------------------------------------------------------------------------
def hub_name(text: str) -> tuple[str, str | None, str | None] | None:
    """Name, configuration and split of a dataset on the Hugging Face hub: ``[hf:]OWNER/NAME[:CONFIGURATION][#SPLIT]``.

    >>> hub_name("hf:nyu-mll/glue:sst2#train"), hub_name("ylecun/mnist"), hub_name("data/train.csv.gz/x")
    (('nyu-mll/glue', 'sst2', 'train'), ('ylecun/mnist', None, None), None)
    """
    stated = text.startswith("hf:")
    name, _, split = text.removeprefix("hf:").partition("#")
    name, _, configuration = name.partition(":")
    parts = name.split("/")
    plain = all(part and part.strip(".") and all(c.isalnum() or c in "._-" for c in part) for part in parts)
    if not plain or len(parts) not in ((1, 2) if stated else (2,)):
        return None
    return name, configuration or None, split or None


def hub_splits(text: str) -> dict[str, str]:
    """The splits of a dataset on the hub, each as a name that `hub_items` reads."""
    name, configuration, split = _parts(text)
    if split is not None:
        return {split: text}
    library = _datasets(text)
    with _loading(text):
        names = library.get_dataset_split_names(name, configuration)
    base = f"hf:{name}" + (f":{configuration}" if configuration else "")
    return {each: f"{base}#{each}" for each in names}


def hub_items(
    text: str,
    wanted: Wanted,
) -> Items:
    """The items of a split of a dataset on the hub (`hub_name`; without a split: ``train``).

    The library ``datasets`` fetches and keeps it; from version 4 on, which is asked for, it runs no code of datasets.

    Raises:
        NearfarError: as `nearfar.data.sources.read_items`; no such library, name or split, or no network.
    """
    name, configuration, split = _parts(text)
    library = _datasets(text)
    with _loading(text):
        data = library.load_dataset(name, configuration, split=split or "train")
        features = data.features.to_dict()
    header = list(data.column_names)
    choose(Path(text), header, wanted, "Its columns are")
    batches = data.with_format("arrow").iter(batch_size=_BATCH)
    return arrow_items(text, None, header, batches, features, wanted)


def _parts(text: str) -> tuple[str, str | None, str | None]:
    known = hub_name(text)
    if known is None:
        raise NearfarError(
            f"'{text}' is no name on the hub: hf:OWNER/NAME, or hf:OWNER/NAME:CONFIGURATION#SPLIT."
        )
    return known


def _datasets(text: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise NearfarError(
            f"'{text}' is no file or folder here; as a name on the Hugging Face hub it is fetched by the library "
            "datasets: pip install 'nearfar[datasets]'. Or save it where that library is, by "
            "datasets.load_dataset(NAME).save_to_disk(FOLDER), and give the folder."
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise NearfarError(
            f"datasets {datasets.__version__} may run code that comes with a dataset: pip install 'datasets>=4'."
        )
    return datasets


@dataclass
class _loading:
    """Turns whatever the library raises into a message with what to do."""

    text: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, NearfarError):
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise NearfarError(
                f"'{self.text}' is no file or folder here, and could not be fetched from the Hugging Face hub: "
                f"{reason}. Look at its name; without a network, save it elsewhere by "
                "datasets.load_dataset(NAME).save_to_disk(FOLDER), copy it here and give the folder."
            ) from None
