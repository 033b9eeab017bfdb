"""What requests and answers hold, and how values come from them: texts, numbers, pictures, never files."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import UInt8
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from nearfar.data.files import Json
from nearfar.data.images import decode_image
from nearfar.errors import NearfarError

__all__ = [
    "DecodedPair",
    "Decoder",
    "Description",
    "EmbedRequest",
    "EmbedResponse",
    "ErrorResponse",
    "GalleryItem",
    "GalleryPage",
    "Health",
    "HitModel",
    "ObjectPair",
    "Picture",
    "PredictRequest",
    "PredictResponse",
    "Problem",
    "SearchRequest",
    "SearchResponse",
    "ServedView",
    "Shown",
    "Slide",
    "Spot",
    "Value",
    "plain",
]


class _Strict(BaseModel):
    """No conversion of types, no names that are not known, no numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Picture(_Strict):
    """A picture in JPEG, PNG, GIF, BMP or WebP."""

    image: str = Field(description="The bytes of its file in base64, or a `data:` URL that holds them.")


class ObjectPair(_Strict):
    """Two objects in a picture: left, top, right and bottom of the box of each, in pixels."""

    image: str = Field(description="The picture, as in `Picture`.")
    first: list[float] = Field(min_length=4, max_length=4)
    second: list[float] = Field(min_length=4, max_length=4)
    names: list[str] | None = Field(
        None, min_length=2, max_length=2, description="What the objects are called."
    )


def _form(value: object) -> str | None:
    """Which of the forms of a value is meant, by its JSON type alone."""
    if isinstance(value, str | Picture | ObjectPair):
        return {str: "text", Picture: "picture", ObjectPair: "pair"}[type(value)]
    if isinstance(value, list):
        return "numbers"
    if isinstance(value, dict):
        return "pair" if "first" in value or "second" in value else "picture"
    return None


#: a value of a view, or of a column: a text (also a SMILES), numbers (expression), a picture, or two objects in one
Value = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[float], Tag("numbers")]
    | Annotated[Picture, Tag("picture")]
    | Annotated[ObjectPair, Tag("pair")],
    Discriminator(
        _form,
        custom_error_type="form",
        custom_error_message='a text, a list of numbers, {"image": …} or {"image": …, "first": …, "second": …}',
    ),
]


class EmbedRequest(_Strict):
    """Values to embed."""

    values: list[Value] = Field(min_length=1, description="Texts, lists of numbers or pictures.")
    tower: str | None = Field(
        None, description="The view that embeds them; needed where several read such values."
    )


class SearchRequest(_Strict):
    """A query for the gallery: a value of one's own, or an item of the gallery."""

    query: Value | None = Field(None, description="A text, a list of numbers or a picture.")
    item: int | None = Field(
        None, ge=0, description="Instead of `query`: the position of an item, as hits and /gallery state it."
    )
    tower: str | None = Field(
        None, description="The view of the query; needed where several read such values."
    )
    target: str | None = Field(None, description="The view of the gallery that is searched.")
    k: int = Field(10, ge=1, description="How many hits.")
    where: list[str] | None = Field(
        None,
        max_length=16,
        description="Only items whose columns are so: `price<10`, `lang=de`, `kind in a,b`.",
    )


class PredictRequest(_Strict):
    """Items to predict for: values of the only view, or columns of several."""

    values: list[Value] | None = Field(None, min_length=1)
    columns: dict[str, list[Value]] | None = Field(None, min_length=1)


class Problem(BaseModel):
    """One thing that was wrong, and where: the position of a value, or the path of a field."""

    where: str
    reason: str


class ErrorResponse(BaseModel):
    """Why a request was not answered."""

    error: str
    problems: list[Problem] = []


class EmbedResponse(BaseModel):
    """A unit vector for each value; null where one could not be read, which `problems` names."""

    tower: str
    dim: int
    vectors: list[list[float] | None]
    problems: list[Problem] = []


class Shown(BaseModel):
    """A value as a page shows it."""

    kind: str = Field(description="text, picture, molecule, numbers")
    text: str | None = None
    url: str | None = Field(None, description="Where a picture of it is.")
    boxes: list[list[float]] | None = Field(
        None, description="Left, top, right and bottom of objects in it, from 0 to 1."
    )


class Spot(BaseModel):
    """The place of an item on its slide."""

    slide: str
    x: float
    y: float


class Slide(BaseModel):
    """Where the items of one slide lie: their positions in the gallery, and x and y."""

    slide: str
    positions: list[int]
    x: list[float]
    y: list[float]


class GalleryItem(BaseModel):
    """An item of the gallery: its position and id, its views, its other columns."""

    position: int
    id: str
    shown: dict[str, Shown]
    columns: Json = {}
    spot: Spot | None = None


class HitModel(GalleryItem):
    """An item that answers a query; `score` is the cosine with it."""

    rank: int
    score: float


class SearchResponse(BaseModel):
    """The items nearest to the query, best first."""

    tower: str
    target: str
    hits: list[HitModel]


class PredictResponse(BaseModel):
    """A row of predicted columns for each item; null where one could not be read, which `problems` names."""

    rows: list[Json | None]
    problems: list[Problem] = []


class GalleryPage(BaseModel):
    """Some items of the gallery."""

    total: int
    items: list[GalleryItem]


class ServedView(BaseModel):
    """A view: how its values are sent, and what embeds them."""

    kind: str
    form: str = Field(description="text, numbers, picture, pair")
    tower: str


class Description(BaseModel):
    """What is served: the run, its views, what it can be asked."""

    name: str
    system: str
    views: dict[str, ServedView]
    dim: int | None
    searches: list[tuple[str, str]] = Field(description="(view of the query, view that is searched)")
    predicts: dict[str, str] = Field(
        description="Columns that /predict reads, with the form of their values."
    )
    gallery: int = Field(description="Items to search in.")
    gallery_source: str | None = None
    slides: list[str] = Field([], description="Slides on which items of the gallery have a place.")
    columns: list[str] = Field([], description="Columns of the gallery beside its views, for filters.")
    named_pairs: bool = Field(False, description="Two objects in a picture have names, too.")
    results: Json = {}
    limits: dict[str, float]


class Health(BaseModel):
    """Whether the server answers, and how much it has to do."""

    status: str
    name: str
    system: str
    waiting: int
    requests: int
    seconds: float


class DecodedPair(NamedTuple):
    """Two objects in a photo: its pixels, the box of each (left, top, right, bottom), their names."""

    pixels: UInt8[np.ndarray, "h w 3"]
    first: tuple[float, ...]
    second: tuple[float, ...]
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Decoder:
    """Values of requests as towers read them: texts, arrays of numbers, or of pixels (h, w, 3).

    A text stays a text, whatever it looks like: nothing here opens a file.

    >>> decoder = Decoder(characters=9, numbers=9, pixels=9)
    >>> decoder([1.0, 2.0], "numbers").tolist(), decoder("a/b", "text")
    ([1.0, 2.0], 'a/b')
    >>> decoder("/etc/passwd", "picture")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: a picture is needed: {"image": "the bytes of its file in base64"}
    """

    characters: int
    numbers: int
    pixels: int

    def __call__(self, value: object, form: str) -> object:
        """A value of this form; ``NearfarError`` where it has a different one, is too large, or no picture."""
        if form == "text":
            return self._text(value)
        if form == "numbers":
            if not isinstance(value, list):
                raise NearfarError("a list of numbers is needed")
            if len(value) > self.numbers:
                raise NearfarError(f"{len(value):,} numbers; {self.numbers:,} are taken")
            return np.asarray(value, np.float64)
        if form == "picture":
            if not isinstance(value, Picture):
                raise NearfarError('a picture is needed: {"image": "the bytes of its file in base64"}')
            return decode_image(_bytes(value.image), self.pixels)
        if form == "pair":
            if not isinstance(value, ObjectPair):
                raise NearfarError(
                    'two objects in a picture are needed: {"image": …, "first": …, "second": …}'
                )
            return DecodedPair(
                decode_image(_bytes(value.image), self.pixels),
                tuple(value.first),
                tuple(value.second),
                None if value.names is None else tuple(self._text(name) for name in value.names),
            )
        raise NearfarError("values of this view are not taken over a network")

    def _text(self, value: object) -> str:
        if not isinstance(value, str):
            raise NearfarError("a text is needed")
        if len(value) > self.characters:
            raise NearfarError(f"a text of {len(value):,} characters; {self.characters:,} are taken")
        if "\0" in value:
            raise NearfarError("a text may not hold the character of code 0")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise NearfarError("a text holds half a character (a lone surrogate)") from None
        return value


def _bytes(text: str) -> bytes:
    head, comma, _ = text[:200].partition(",")
    if comma and head.startswith("data:"):
        if not head.endswith(";base64"):
            raise NearfarError("a data: URL in base64 is needed")
        text = text[len(head) + 1 :]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NearfarError("the picture is not in base64") from None


def plain(value: object) -> object:
    """A value as JSON can hold it: arrays as lists, numbers that are not finite as null, anything else as its text.

    >>> plain({"p": np.float32(0.5), "n": [np.nan, np.int64(3)], "at": np.arange(2)})
    {'p': 0.5, 'n': [None, 3], 'at': [0, 1]}
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(each) for each in value]
    return str(value)
