"""The embedded set: scenes composed of drawn objects, with exact boxes, and no kind of test in training.

An object is a few shapes in a box of any size, with shade and light. A picture has two pairs, side by side. The
relation is chosen first and drawn then, so that boxes and relations are exact; what makes them hard is that boxes
alone do not tell everything: what hangs in front of a table has the box of what stands on it, and only the shadow
where two objects touch tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from nearfar.data.cache import content_key
from nearfar.data.images import Box, Photo
from nearfar.data.scenes.triples import ALL10, Triple

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["HELD_OUT", "HOLLOW", "LEGGED", "SUPPORTS", "THINGS", "Scene", "composed_scenes", "draw_thing"]


_FINE = 3  # drawn so many times larger and then made smaller, for smooth edges
Colour = tuple[int, int, int]


class _Pen:
    """Draws in units of the thing's box: (0, 0) is its upper left corner, (1, 1) its lower right one."""

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        from PIL import Image, ImageDraw

        self.w, self.h = width * _FINE, height * _FINE
        self.image = Image.new("RGBA", (self.w, self.h), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        base = rng.integers(60, 215, 3)
        self.main, self.dark, self.light = (self._shade(base, f) for f in (1.0, 0.62, 1.25))

    @staticmethod
    def _shade(base: ndarray, factor: float) -> Colour:
        r, g, b = (int(min(255, max(0, value * factor))) for value in base)
        return r, g, b

    def _at(self, *points: float) -> list[float]:
        return [v * (self.w - 1 if i % 2 == 0 else self.h - 1) for i, v in enumerate(points)]

    def block(self, x0: float, y0: float, x1: float, y1: float, colour: Colour, round_: float = 0.0) -> None:
        radius = round_ * min(self.w, self.h)
        self.draw.rounded_rectangle(self._at(x0, y0, x1, y1), radius, fill=colour)

    def disc(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.draw.ellipse(self._at(x0, y0, x1, y1), fill=colour)

    def shape(self, *points: float, colour: Colour) -> None:
        self.draw.polygon(self._at(*points), fill=colour)

    def finished(self) -> Image.Image:
        from PIL import Image

        size = (self.w // _FINE, self.h // _FINE)
        return self.image.resize(size, Image.Resampling.BOX)


def _ball(p: _Pen) -> None:
    p.disc(0, 0, 1, 1, p.main)
    p.disc(0.15, 0.12, 0.5, 0.45, p.light)


def _bottle(p: _Pen) -> None:
    p.block(0.3, 0, 0.7, 0.35, p.dark)
    p.block(0, 0.28, 1, 1, p.main, 0.2)
    p.block(0, 0.5, 1, 0.75, p.light)


def _mug(p: _Pen) -> None:
    p.disc(0.55, 0.15, 1, 0.8, p.dark)
    p.block(0, 0, 0.78, 1, p.main, 0.1)
    p.disc(0.02, 0, 0.76, 0.2, p.dark)


def _book(p: _Pen) -> None:
    p.block(0, 0, 1, 1, p.main)
    p.block(0.05, 0.2, 1, 0.45, (235, 232, 220))
    p.block(0.05, 0.62, 1, 0.85, p.dark)


def _plant(p: _Pen) -> None:
    green = (60, 140, 70)
    for x in (0.1, 0.38, 0.66):
        p.disc(x - 0.1, 0, x + 0.34, 0.66, green)
    p.shape(0.2, 0.6, 0.8, 0.6, 0.7, 1, 0.3, 1, colour=p.main)


def _clock(p: _Pen) -> None:
    p.disc(0, 0, 1, 1, p.dark)
    p.disc(0.1, 0.1, 0.9, 0.9, (240, 240, 235))
    p.block(0.46, 0.2, 0.54, 0.55, p.dark)
    p.block(0.46, 0.48, 0.75, 0.56, p.dark)


def _bird(p: _Pen) -> None:
    p.disc(0.1, 0.35, 0.85, 1, p.main)
    p.shape(0.25, 0.5, 0.6, 0, 0.72, 0.55, colour=p.dark)
    p.shape(0.8, 0.55, 1, 0.66, 0.8, 0.75, colour=(230, 160, 40))


def _cone(p: _Pen) -> None:
    p.shape(0.5, 0, 0.85, 0.9, 0.15, 0.9, colour=p.main)
    p.shape(0.36, 0.4, 0.64, 0.4, 0.72, 0.6, 0.28, 0.6, colour=(240, 240, 240))
    p.block(0, 0.88, 1, 1, p.dark)


def _lamp(p: _Pen) -> None:
    p.block(0.45, 0.3, 0.55, 1, p.dark)
    p.shape(0.25, 0, 0.75, 0, 1, 0.5, 0, 0.5, colour=p.main)
    p.disc(0.2, 0.88, 0.8, 1, p.dark)


def _kite(p: _Pen) -> None:
    p.shape(0.5, 0, 1, 0.45, 0.5, 1, 0, 0.45, colour=p.main)
    p.shape(0.5, 0, 0.5, 1, 0, 0.45, colour=p.light)


def _vase(p: _Pen) -> None:
    p.disc(0, 0.25, 1, 1, p.main)
    p.block(0.32, 0, 0.68, 0.4, p.main)
    p.disc(0.25, 0, 0.75, 0.14, p.dark)


def _radio(p: _Pen) -> None:
    p.block(0, 0.15, 1, 1, p.main, 0.1)
    p.block(0.1, 0, 0.14, 0.2, p.dark)
    p.disc(0.08, 0.35, 0.5, 0.9, p.dark)
    p.block(0.6, 0.4, 0.92, 0.55, p.light)


def _legs(p: _Pen, top: float, width: float) -> None:
    for x in (0.0, 1.0 - width):
        p.block(x, top, x + width, 1, p.dark)


def _table(p: _Pen) -> None:
    _legs(p, 0.15, 0.09)
    p.shape(0.08, 0, 0.92, 0, 1, 0.2, 0, 0.2, colour=p.main)
    p.block(0, 0.2, 1, 0.27, p.dark)


def _bench(p: _Pen) -> None:
    _legs(p, 0.25, 0.14)
    for y in (0.0, 0.12, 0.24):
        p.block(0, y, 1, y + 0.09, p.main)


def _stand(p: _Pen) -> None:
    _legs(p, 0.1, 0.06)
    p.block(0, 0, 1, 0.22, p.main, 0.08)
    p.block(0, 0.55, 1, 0.62, p.dark)


def _crate(p: _Pen) -> None:
    p.block(0, 0, 1, 1, p.dark)
    for y in (0.04, 0.37, 0.7):
        p.block(0.04, y, 0.96, y + 0.26, p.main)


def _chest(p: _Pen) -> None:
    p.block(0, 0.12, 1, 1, p.main)
    p.disc(0, 0, 1, 0.5, p.main)
    p.block(0, 0.4, 1, 0.47, p.dark)
    p.block(0.44, 0.38, 0.56, 0.6, (220, 190, 70))


def _cabinet(p: _Pen) -> None:
    p.block(0, 0, 1, 1, p.main)
    p.block(0.48, 0.05, 0.52, 0.95, p.dark)
    p.disc(0.38, 0.45, 0.44, 0.55, p.light)
    p.disc(0.56, 0.45, 0.62, 0.55, p.light)


def _frame(p: _Pen) -> None:
    for x0, y0, x1, y1 in ((0, 0, 1, 0.1), (0, 0.9, 1, 1), (0, 0, 0.08, 1), (0.92, 0, 1, 1)):
        p.block(x0, y0, x1, y1, p.main)


def _hoop(p: _Pen) -> None:
    width = int(0.09 * min(p.w, p.h))
    p.draw.ellipse(p._at(0, 0, 1, 1), outline=p.main, width=width)


THINGS: dict[str, Callable[[_Pen], None]] = {
    "ball": _ball,
    "bottle": _bottle,
    "mug": _mug,
    "book": _book,
    "plant": _plant,
    "clock": _clock,
    "bird": _bird,
    "cone": _cone,
    "lamp": _lamp,
    "kite": _kite,
    "vase": _vase,
    "radio": _radio,
    "table": _table,
    "bench": _bench,
    "stand": _stand,
    "crate": _crate,
    "chest": _chest,
    "cabinet": _cabinet,
    "frame": _frame,
    "hoop": _hoop,
}
#: what something can be on, what it can be under, what it can be inside of
SUPPORTS = ("table", "bench", "stand", "crate", "chest", "cabinet")
LEGGED = ("table", "bench", "stand")
HOLLOW = ("frame", "hoop")
#: kinds that are in no training or validation scene, and the only ones of test scenes
HELD_OUT = ("lamp", "kite", "vase", "radio", "stand", "cabinet", "hoop")


def draw_thing(kind: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """One thing of this kind that fills a box of so many pixels, on nothing (RGBA).

    >>> draw_thing("ball", 30, 20, np.random.default_rng(0)).size
    (30, 20)
    """
    pen = _Pen(max(width, 4), max(height, 4), rng)
    THINGS[kind](pen)
    return pen.finished()


_VERSION = 1  # of what is drawn
WIDTH, HEIGHT = 384, 256
_FLOOR = 225  # where things stand
#: shares of the relations: the first five as in the pairs that the reference counted
_SHARES = {
    "on": 13071, "above": 4995, "under": 2951, "next to": 4108, "below": 1680,
    "left of": 1500, "right of": 1500, "near": 1500, "inside": 1500, "outside": 1500,
}  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    relation: str
    subject: str
    object: str
    subject_box: Box
    object_box: Box


@dataclass(frozen=True)
class Scene:
    """One picture, drawn when it is read; (seed, number, held-out kinds or not, relations) determine it."""

    seed: int
    number: int
    held_out: bool
    relations: tuple[str, ...]

    def pairs(self) -> list[_Pair]:
        """What is where."""
        rng = self._rng(0)
        shares = np.array([_SHARES[name] for name in self.relations], dtype=float)
        chosen = rng.choice(len(self.relations), size=2, p=shares / shares.sum())
        half = WIDTH / 2
        return [
            _place(self.relations[which], side * half + 4, (side + 1) * half - 4, self.held_out, rng)
            for side, which in enumerate(chosen)
        ]

    def read(self) -> UInt8[ndarray, "h w 3"]:
        """The picture, 256 × 384."""
        return _draw(self.pairs(), self._rng(1))

    def key(self) -> str:
        return content_key("scene", _VERSION, self.seed, self.number, self.held_out, list(self.relations))

    def size(self) -> tuple[float, float]:
        return float(WIDTH), float(HEIGHT)

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.number, purpose])


def composed_scenes(
    n: int, relations: Sequence[str] = ALL10, seed: int = 0, fractions: tuple[float, float] = (0.15, 0.25)
) -> tuple[list[Triple], dict[str, Photo]]:
    """``n`` scenes: their pairs, and pictures that are drawn when read.

    ``fractions`` are the shares of val and test. Test scenes have held-out kinds alone, all others none of them.

    >>> triples, photos = composed_scenes(10)
    >>> len(triples), len(photos), photos["scene 0"].read().shape
    (20, 10, (256, 384, 3))
    """
    triples: list[Triple] = []
    photos: dict[str, Photo] = {}
    for number in range(n):
        place = (number + 0.5) / n
        split = "test" if place > 1 - fractions[1] else "val" if place > 1 - sum(fractions) else "train"
        scene, name = Scene(seed, number, split == "test", tuple(relations)), f"scene {number}"
        photos[name] = scene
        for pair in scene.pairs():
            row = len(triples) + 1
            boxes = pair.subject_box, pair.object_box
            triples.append(
                Triple(
                    name,
                    pair.subject,
                    boxes[0],
                    pair.relation,
                    pair.object,
                    boxes[1],
                    row,
                    scene.size(),
                    split,
                )
            )
    return triples, photos


def _place(relation: str, left: float, right: float, held_out: bool, rng: np.random.Generator) -> _Pair:
    """A pair in this relation between two borders."""
    kinds = [kind for kind in THINGS if (kind in HELD_OUT) == held_out]
    wanted = {"on": SUPPORTS, "above": SUPPORTS, "under": LEGGED, "inside": HOLLOW}.get(relation)
    objects = [kind for kind in kinds if wanted is None or kind in wanted]
    if relation in ("next to", "near", "left of", "right of", "outside", "below"):
        objects = [kind for kind in objects if kind not in HOLLOW]
    subjects = [kind for kind in kinds if kind not in SUPPORTS and kind not in HOLLOW]
    object_ = objects[rng.integers(len(objects))]
    subject = [kind for kind in subjects if kind != object_][
        rng.integers(len(subjects) - (object_ in subjects))
    ]
    boxes = _WHERE[relation](left, right, rng)
    return _Pair(relation, subject, object_, *boxes)


def _sized(
    rng: np.random.Generator, low: float, high: float, shape: tuple[float, float]
) -> tuple[float, float]:
    """Width and height: a height between two bounds, and a shape (width / height) between two others."""
    height = rng.uniform(low, high)
    return height * rng.uniform(*shape), height


def _support(left: float, right: float, rng: np.random.Generator) -> Box:
    """A piece of furniture on the floor."""
    width, height = _sized(rng, 60, 95, (0.9, 1.6))
    x, bottom = rng.uniform(left, right - width), _FLOOR + rng.uniform(-12, 20)
    return x, bottom - height, x + width, bottom


def _above_support(
    left: float, right: float, rng: np.random.Generator, gap: tuple[float, float]
) -> tuple[Box, Box]:
    """Something over a support: its bottom ``gap`` heights of the support above the support's top."""
    under = _support(left, right, rng)
    width, height = _sized(rng, 26, 60, (0.6, 1.3))
    bottom = max(under[1] - rng.uniform(*gap) * (under[3] - under[1]), height + 3)
    middle = rng.uniform(under[0] + 0.15 * (under[2] - under[0]), under[2] - 0.15 * (under[2] - under[0]))
    x = min(max(middle - width / 2, left), right - width)
    return (x, bottom - height, x + width, bottom), under


def _on(left: float, right: float, rng: np.random.Generator) -> tuple[Box, Box]:
    return _above_support(left, right, rng, (-0.2, 0.0))


def _above(left: float, right: float, rng: np.random.Generator) -> tuple[Box, Box]:
    return _above_support(left, right, rng, (-0.2, 0.9))


def _under(left: float, right: float, rng: np.random.Generator) -> tuple[Box, Box]:
    over = _support(left, right, rng)
    width, height = over[2] - over[0], over[3] - over[1]
    w, h = width * rng.uniform(0.25, 0.6), height * rng.uniform(0.3, 0.68)
    x, bottom = rng.uniform(over[0] + 0.1 * width, over[2] - 0.1 * width - w), over[3] - rng.uniform(-6, 6)
    return (x, bottom - h, x + w, bottom), over


def _below(left: float, right: float, rng: np.random.Generator) -> tuple[Box, Box]:
    w, h = _sized(rng, 28, 60, (0.7, 1.3))
    x, bottom = rng.uniform(left, right - w), _FLOOR + rng.uniform(-12, 15)
    width, height = _sized(rng, 28, 60, (0.7, 1.4))
    over = bottom - h - rng.uniform(0.05, 1.2) * h
    top = max(over - height, 2)
    at = min(max(x + w / 2 - width / 2 + rng.uniform(-0.6, 0.6) * width, left), right - width)
    return (x, bottom - h, x + w, bottom), (at, top, at + width, max(over, top + height / 2))


def _beside(
    left: float, right: float, rng: np.random.Generator, gap: tuple[float, float], side: int, rise: float
) -> tuple[Box, Box]:
    """Subject to the left (−1) or the right (1) of the object, ``gap`` mean widths between them."""
    (w, h), (width, height) = (_sized(rng, 30, 70, (0.6, 1.0)) for _ in range(2))
    room = (right - left) - w - width
    between = min(rng.uniform(*gap) * (w + width) / 2, max(room, 0))
    start = left + rng.uniform(0, max(room - between, 0))
    bottoms = _FLOOR + rng.uniform(-8, 18, 2)
    bottoms[0] -= rise
    first, second = ((w, h), (width, height)) if side < 0 else ((width, height), (w, h))
    boxes = [
        (start, 0.0, start + first[0], first[1]),
        (start + first[0] + between, 0.0, start + first[0] + between + second[0], second[1]),
    ]
    subject, other = boxes if side < 0 else boxes[::-1]
    placed = []
    for box, bottom in zip((subject, other), bottoms, strict=True):
        placed.append((box[0], float(bottom) - box[3], box[2], float(bottom)))
    return placed[0], placed[1]


def _inside(left: float, right: float, rng: np.random.Generator) -> tuple[Box, Box]:
    outer = _support(left, right, rng)
    width, height = outer[2] - outer[0], outer[3] - outer[1]
    w, h = width * rng.uniform(0.3, 0.6), height * rng.uniform(0.3, 0.6)
    x, y = outer[0] + rng.uniform(0.15, 0.85) * (width - w), outer[1] + rng.uniform(0.15, 0.85) * (height - h)
    return (x, y, x + w, y + h), outer


def _outside(left: float, right: float, rng: np.random.Generator) -> tuple[Box, Box]:
    width, height = _sized(rng, 110, 150, (0.6, 0.8))
    w, h = _sized(rng, 26, 50, (0.6, 1.0))
    side = -1 if rng.random() < 0.5 else 1
    x = left + w * rng.uniform(0.3, 0.9) if side < 0 else right - width - w * rng.uniform(0.3, 0.9)
    box = (x, _FLOOR - height, x + width, float(_FLOOR))
    at = (
        max(left, x - w * rng.uniform(0.5, 1.0))
        if side < 0
        else min(right - w, x + width - w * rng.uniform(0, 0.5))
    )
    bottom = _FLOOR + rng.uniform(0, 22)
    return (at, bottom - h, at + w, bottom), box


_WHERE: dict[str, Callable[[float, float, np.random.Generator], tuple[Box, Box]]] = {
    "on": _on,
    "above": _above,
    "under": _under,
    "below": _below,
    "next to": lambda l, r, g: _beside(l, r, g, (0.0, 0.3), 1 if g.random() < 0.5 else -1, 0.0),  # noqa: E741
    "left of": lambda l, r, g: _beside(l, r, g, (0.35, 1.2), -1, 0.0),  # noqa: E741
    "right of": lambda l, r, g: _beside(l, r, g, (0.35, 1.2), 1, 0.0),  # noqa: E741
    "near": lambda l, r, g: _beside(l, r, g, (0.0, 0.5), 1 if g.random() < 0.5 else -1, g.uniform(25, 70)),  # noqa: E741
    "inside": _inside,
    "outside": _outside,
}


def _draw(pairs: Sequence[_Pair], rng: np.random.Generator) -> UInt8[ndarray, "h w 3"]:
    from PIL import Image, ImageDraw

    wall, floor = rng.integers(150, 235, 3), rng.integers(90, 180, 3)
    rows = np.where(np.arange(HEIGHT)[:, None, None] < 180, wall, floor).astype(float)
    noise = rng.normal(0, 5, (HEIGHT // 4, WIDTH // 4, 1)).repeat(4, 0).repeat(4, 1)
    pixels = np.broadcast_to(rows, (HEIGHT, WIDTH, 3)) + noise
    canvas = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert("RGBA")
    for pair in pairs:
        for kind, box, touches in (
            (pair.object, pair.object_box, None),
            (pair.subject, pair.subject_box, pair.object_box if pair.relation == "on" else None),
        ):
            left, top, right, bottom = (round(value) for value in box)
            shade = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
            stands = bottom > 190 or touches is not None
            if stands:
                flat = max(3, (right - left) // 9)
                ImageDraw.Draw(shade).ellipse(
                    (left, bottom - flat, right, bottom + flat // 2), fill=(0, 0, 0, 120)
                )
            canvas = Image.alpha_composite(canvas, shade)
            thing = draw_thing(kind, right - left, bottom - top, rng)
            canvas.alpha_composite(thing, (max(left, 0), max(top, 0)))
    return np.asarray(canvas.convert("RGB"))
