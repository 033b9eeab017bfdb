"""Drawn things of which scenes are composed: each a few shapes in a box of any size, with shade and light."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["HELD_OUT", "HOLLOW", "LEGGED", "SUPPORTS", "THINGS", "draw_thing"]

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
    def _shade(base: Any, factor: float) -> Colour:
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
