"""Choosing a tower by name; towers of other packages are found by their entry points."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import numpy as np

from nearfar.data.files import Json, read_json
from nearfar.data.items import Column
from nearfar.errors import NearfarError, nearest_name
from nearfar.towers.base import Tower, read_tower_spec

__all__ = [
    "PICTURES",
    "TOWERS",
    "build_tower",
    "encoder_options",
    "guess_tower",
    "load_tower",
    "load_towers",
    "register_tower",
    "save_towers",
    "tower_class",
    "tower_folder",
    "tower_names",
]

ENTRY_POINTS = "nearfar.towers"

#: where the towers are; each is imported when it is needed
TOWERS: dict[str, str | type[Tower]] = {
    "boxes": "nearfar.towers.boxes:BoxTower",
    "crops": "nearfar.towers.object_pairs:CropTower",
    "expression": "nearfar.towers.expression:ExpressionTower",
    "names": "nearfar.towers.object_pairs:NamesTower",
    "text": "nearfar.towers.text:TextTower",
    "image": "nearfar.towers.image:ImageTower",
    "molecule": "nearfar.towers.molecule:MoleculeTower",
    "vector": "nearfar.towers.vector:VectorTower",
}


def register_tower(kind: str, tower: type[Tower]) -> None:
    """Make a tower known in this process, as an entry point does for every process."""
    TOWERS[kind] = tower


@cache
def _installed() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if point.name in TOWERS:
            raise NearfarError(
                f"entry point '{point.name}' of {ENTRY_POINTS} ({point.value}) has the name of a tower that nearfar "
                "brings along; rename it in that package, or uninstall it."
            )
        points[point.name] = point
    return points


def tower_names() -> list[str]:
    """Every known kind of tower."""
    return sorted({*TOWERS, *_installed()})


def tower_class(kind: str) -> type[Tower]:
    """The class of a kind; ``NearfarError`` with the nearest name for one that is unknown."""
    place: object = TOWERS.get(kind)
    if place is None:
        point = _installed().get(kind)
        if point is None:
            raise NearfarError(f"tower={kind!r} is unknown; {nearest_name(str(kind), tower_names())}")
        try:
            place = point.load()
        except (ImportError, AttributeError) as error:
            raise NearfarError(
                f"tower={kind}: its entry point ({point.value}) cannot be imported ({error}). Mend that package, or "
                "uninstall it."
            ) from error
    if isinstance(place, str):
        module, name = place.split(":")
        place = getattr(importlib.import_module(module), name)
    if not (isinstance(place, type) and issubclass(place, Tower)):
        raise NearfarError(f"tower={kind}: {place!r} has to be a class below nearfar.towers.Tower.")
    return place


def build_tower(kind: str, name: str = "tower", /, **options: object) -> Tower:
    """The tower called ``kind`` with its options; reads no weights. ``name`` is what messages call it.

    >>> build_tower("vector").description
    'columns of numbers, standardised by the training rows (not fitted yet)'
    >>> build_tower("vectr")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: tower='vectr' is unknown; did you mean 'vector'?
    >>> build_tower("vector", "views.price", standardise=True)
    Traceback (most recent call last):
    nearfar.errors.NearfarError: views.price: a vector tower has no option 'standardise'; did you mean 'standardize'?
    """
    cls = tower_class(kind)
    signature = inspect.signature(cls).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in signature.values()):
        for option in options:
            if option not in signature:
                raise NearfarError(
                    f"{name}: {_article(kind)} {kind} tower has no option {option!r}; "
                    f"{nearest_name(option, list(signature))}"
                )
    try:
        return cls(**options)
    except NearfarError as error:
        raise NearfarError(f"{name}: {error}") from None


def encoder_options(group: Mapping[str, object]) -> Json:
    """The options of a tower from a group ``text_encoder=`` or ``image_encoder=``.

    There the encoder is called ``kind``, a hub model of pictures ``name``, and a transformer that is trained on
    "pretrained", with ``freeze`` for one that is not.

    >>> encoder_options({"kind": "transformers", "name": "microsoft/resnet-18"})
    {'encoder': 'transformers', 'model': 'microsoft/resnet-18'}
    >>> encoder_options({"kind": "pretrained", "model": "vinai/phobert-base-v2", "freeze": False})
    {'encoder': 'transformer', 'model': 'vinai/phobert-base-v2', 'train': 'full'}
    """
    renamed = {"kind": "encoder", "name": "model"}
    options = {renamed.get(str(name), str(name)): value for name, value in group.items()}
    if options.get("encoder") == "pretrained":
        options["encoder"] = "transformer"
        frozen = options.pop("freeze", False)
        options.setdefault("train", "head" if frozen else "full")
    return options


def load_tower(folder: Path) -> Tower:
    """The tower that ``tower.save(folder)`` wrote, ready to read new values."""
    return tower_class(str(read_tower_spec(folder)["kind"])).load(folder)


VIEWS_FILE = "views.json"


def tower_folder(view: str) -> str:
    """The name of the folder that holds a view's tower.

    >>> tower_folder("a/b c")
    'a_b_c'
    """
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in view) or "_"


def save_towers(towers: Mapping[str, Tower], folder: Path) -> None:
    """Write every tower below ``folder``, one that several views share once, and which view has which."""
    shared: dict[str, str] = {}
    for view, tower in towers.items():
        first = next(other for other, each in towers.items() if each is tower)
        shared[view] = first
        if first == view:
            tower.save(folder / tower_folder(view))
    text = json.dumps({"views": list(towers), "towers": shared}, indent=2, ensure_ascii=False)
    (folder / VIEWS_FILE).write_text(text + "\n", encoding="utf-8")


def load_towers(folder: Path) -> dict[str, Tower]:
    """The towers that `save_towers` wrote, by view."""
    known = read_json(folder / VIEWS_FILE, {"views": [str], "towers": dict})
    assert isinstance(known, dict)
    shared = {
        first: load_tower(folder / tower_folder(first)) for first in dict.fromkeys(known["towers"].values())
    }
    return {view: shared[known["towers"][view]] for view in known["views"]}


#: how names of picture files end
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def guess_tower(values: Column) -> str:
    """The kind of tower that a column's values call for: numbers, names of picture files, or else texts.

    >>> guess_tower(np.zeros((3, 2))), guess_tower(["1.5", "2"]), guess_tower(["a/b.png", None]), guess_tower(["word"])
    ('vector', 'vector', 'image', 'text')
    """
    if isinstance(values, np.ndarray):
        picture = values.dtype == np.uint8 and values.ndim >= 3
        return "image" if picture else "vector"
    known = [value for value in values if value is not None][:100]
    if known and all(
        isinstance(value, (str, Path)) and str(value).lower().endswith(PICTURES) for value in known
    ):
        return "image"
    if known and all(_is_numeric(value) for value in known):
        return "vector"
    return "text"


def _is_numeric(value: object) -> bool:
    """Whether a value is a number, a list of numbers, or a number as a table of text has it."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, (list, tuple, np.ndarray, int, float))


def _article(word: str) -> str:
    return "an" if word[:1] in "aeiou" else "a"
