"""Charts of a run as SVG text, drawn with matplotlib without a display and without global state."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from nearfar.terminal import visible

if TYPE_CHECKING:
    from nearfar.lab.curves import Curves

__all__ = [
    "Chart",
    "band_chart",
    "curves_chart",
    "heat_map",
    "intervals_chart",
    "line_chart",
    "map_chart",
]

COLOURS = ("#2563a8", "#c2571a", "#2f8f5b", "#8a4fa0", "#a08a1a", "#5b6673")
INK = "#39424e"
#: names longer than this stand one to a line in a legend
LONG = 26
#: characters of a title in one line
TITLE = 40


class Chart:
    """A small figure with one axis in the house style; ``svg()`` gives the text to put into a page."""

    def __init__(self, title: str, xlabel: str, ylabel: str, width: float = 4.6, height: float = 2.9) -> None:
        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.axis: Axes = self.figure.add_subplot()
        self.axis.set_title(textwrap.fill(title, TITLE), loc="left", fontsize=10.5, color=INK)
        self.axis.set_xlabel(xlabel, fontsize=9, color=INK)
        self.axis.set_ylabel(ylabel, fontsize=9, color=INK)
        self.axis.tick_params(labelsize=8.5, colors=INK, length=2)
        self.axis.grid(axis="y", color="#e4e7eb", linewidth=0.7)
        self.axis.set_axisbelow(True)
        for side in ("top", "right"):
            self.axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            self.axis.spines[side].set_color("#b9c0c9")

    def legend(self) -> None:
        """A legend, where more than one thing is drawn."""
        names = self.axis.get_legend_handles_labels()[1]
        if len(names) > 1:
            self.figure.legend(
                loc="outside lower center",
                ncols=2 if max(map(len, names)) <= LONG else 1,
                fontsize=8,
                frameon=False,
                labelcolor=INK,
                borderaxespad=0,
            )

    def level_lines(self, levels: Mapping[str, float] | None) -> None:
        """Dashed horizontals with their names, such as chance."""
        for name, level in (levels or {}).items():
            self.axis.axhline(level, color="#8b95a1", linewidth=1, linestyle=(0, (4, 3)))
            self.axis.annotate(
                name,
                (1, level),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#6b7683",
            )

    def svg(self) -> str:
        """The figure as an ``<svg>`` element; the same input gives the same bytes."""
        buffer = io.StringIO()
        for text in self.figure.findobj(Text):
            # Names of runs and metrics are no formulas: matplotlib stops at one it cannot read.
            text.set_parse_math(False)
            text.set_text(visible(text.get_text()))
        # Identifiers inside the SVG are salted with the title: several charts on one page do not collide.
        with rc_context({"svg.hashsalt": self.axis.get_title(loc="left"), "svg.fonttype": "none"}):
            FigureCanvasSVG(self.figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        page = buffer.getvalue()
        return re.sub(r"\s*<metadata>.*?</metadata>", "", page[page.index("<svg") :], flags=re.DOTALL)


def line_chart(
    title: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Lines by name, each (x, y); ``levels`` are dashed horizontals such as the chance level."""
    chart = Chart(title, xlabel, ylabel)
    for colour, (name, (x, y)) in zip(COLOURS * 4, series.items(), strict=False):
        marker = "o" if len(x) <= 40 else None
        chart.axis.plot(x, y, color=colour, label=name, linewidth=1.6, marker=marker, markersize=3)
    chart.level_lines(levels)
    if xlabel.startswith("epoch"):
        chart.axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    chart.legend()
    return chart.svg()


def curves_chart(curves: Curves) -> str:
    """Curves as they are drawn on a page."""
    return line_chart(curves.title, curves.series, curves.xlabel, curves.ylabel, curves.levels)


def intervals_chart(title: str, rows: Sequence[tuple[str, float, float, float]], xlabel: str) -> str:
    """Horizontal intervals (name, value, low, high) around a zero line."""
    chart = Chart(title, xlabel, "", height=1.1 + 0.3 * len(rows))
    for i, (_, value, low, high) in enumerate(reversed(rows)):
        colour = COLOURS[2] if low > 0 else COLOURS[1] if high < 0 else COLOURS[5]
        chart.axis.plot([low, high], [i, i], color=colour, linewidth=2)
        chart.axis.plot([value], [i], "o", color=colour, markersize=5)
    chart.axis.axvline(0, color="#8b95a1", linewidth=1)
    chart.axis.set_yticks(range(len(rows)), [visible(name) for name, *_ in reversed(rows)])
    chart.axis.set_ylim(-0.6, len(rows) - 0.4)
    return chart.svg()


def heat_map(
    title: str,
    cells: Mapping[tuple[float, float], tuple[float, float, float]],
    xlabel: str,
    ylabel: str,
    best: tuple[float, float] | None = None,
) -> str:
    """Values (value, low, high) over two axes, each cell with its number and interval, the ``best`` framed."""
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    chart = Chart(title, xlabel, ylabel, width=max(4.6, 1.1 + 1.15 * len(xs)), height=1.1 + 0.62 * len(ys))
    values = [value for value, _, _ in cells.values()]
    low, span = min(values), (max(values) - min(values)) or 1.0
    for (x, y), (value, lower, upper) in cells.items():
        i, j = xs.index(x), ys.index(y)
        strength = (value - low) / span
        frame = (x, y) == best
        chart.axis.add_patch(
            Rectangle(
                (i - 0.48, j - 0.46),
                0.96,
                0.92,
                facecolor=_blend("#eef3f8", COLOURS[0], 0.85 * strength),
                edgecolor=COLOURS[1] if frame else "none",
                linewidth=2.2 if frame else 0,
            )
        )
        ink = "white" if strength > 0.55 else INK
        chart.axis.text(i, j + 0.14, f"{value:.3f}", ha="center", va="center", fontsize=9, color=ink)
        interval = f"{lower:.3f} to {upper:.3f}"
        chart.axis.text(i, j - 0.2, interval, ha="center", va="center", fontsize=6.5, color=ink)
    chart.axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    chart.axis.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    chart.axis.set_xlim(-0.55, len(xs) - 0.45)
    chart.axis.set_ylim(-0.55, len(ys) - 0.45)
    chart.axis.grid(visible=False)
    return chart.svg()


def band_chart(
    title: str,
    points: Mapping[float, tuple[float, float, float]],
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Values (value, low, high) over one axis as a line with its band; ``levels`` as in ``line_chart``."""
    chart = Chart(title, xlabel, ylabel)
    xs = sorted(points)
    value, low, high = zip(*(points[x] for x in xs), strict=True)
    chart.axis.fill_between(xs, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    chart.axis.plot(xs, value, color=COLOURS[0], linewidth=1.6, marker="o", markersize=4)
    chart.axis.set_xticks(xs, [f"{x:g}" for x in xs])
    chart.level_lines(levels)
    return chart.svg()


def map_chart(title: str, points: Mapping[str, Sequence[tuple[float, float]]], links: int) -> str:
    """Points of two views in the plane; the first ``links`` partners are joined by a line."""
    chart = Chart(title, "first component", "second component", height=3.6)
    views = list(points.values())
    if len(views) == 2:
        for a, b in zip(views[0][:links], views[1][:links], strict=True):
            chart.axis.plot([a[0], b[0]], [a[1], b[1]], color="#c9d0d8", linewidth=0.6, zorder=1)
    for colour, (name, view) in zip(COLOURS, points.items(), strict=False):
        x, y = zip(*view, strict=True)
        chart.axis.scatter(x, y, s=9, color=colour, alpha=0.7, label=name, linewidths=0, zorder=2)
    chart.axis.set_aspect("equal", adjustable="datalim")
    chart.legend()
    return chart.svg()


def _blend(a: str, b: str, share: float) -> str:
    """The colour ``share`` of the way from ``a`` to ``b``."""
    mixed = [round((1 - share) * int(a[k : k + 2], 16) + share * int(b[k : k + 2], 16)) for k in (1, 3, 5)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
