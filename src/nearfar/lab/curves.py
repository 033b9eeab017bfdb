"""Curves and charts of a training: as numbers, and as SVG drawn with matplotlib without a display or global state."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypedDict, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from nearfar.data.files import Json
from nearfar.terminal import metric_words, visible
from nearfar.training.run_folder import RunFolder

__all__ = [
    "Chart",
    "Curves",
    "Line",
    "PlanRecord",
    "band_chart",
    "curves_chart",
    "hardness_curves",
    "heat_map",
    "intervals_chart",
    "line_chart",
    "map_chart",
    "of_kind",
    "plans_in",
    "plans_of",
    "training_curves",
]


#: positions and values of a line
Line = tuple[Sequence[float], Sequence[float]]
#: signals that a probe records of a view: field, title, unit
VIEW_SIGNALS = (
    ("effective_rank", "Effective rank of the embeddings", "dimensions"),
    ("mean_cosine", "Mean cosine of different rows", "cosine (1: collapsed)"),
)


@dataclass(frozen=True)
class Curves:
    """Lines by name over one axis; ``levels`` are dashed horizontals such as the chance level.

    >>> Curves("Loss", {"training": ([1, 2], [4.1, 3.9])}, "step", "nats", {"guessing": 4.2}).to_dict()["levels"]
    {'guessing': 4.2}
    """

    title: str
    series: Mapping[str, Line]
    xlabel: str
    ylabel: str
    levels: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> Json:
        """Plain data."""
        return asdict(self)


class PlanRecord(TypedDict, total=False):
    """What a run logs of the batches of an epoch; hardness is by quarter of the epoch."""

    epoch: int
    sampler: str
    random_phase: bool
    hardness: list[float]
    hardness_random: float
    last_to_first: float | None
    nominal_hard: float | None
    realised_hard: list[float] | None
    false_negatives: float


def of_kind(records: Iterable[Json], kind: str) -> list[Json]:
    """The records of one kind, oldest first."""
    return [record for record in records if record.get("kind") == kind]


def plans_in(records: Iterable[Json]) -> list[PlanRecord]:
    """The plans in a log whose hardness was measured, oldest first."""
    return [cast(PlanRecord, record) for record in of_kind(records, "plan") if record.get("hardness")]


def plans_of(run: RunFolder) -> list[PlanRecord]:
    """The plans in a run's log whose hardness was measured, oldest first."""
    return plans_in(run.log())


def series_of(records: Sequence[Json], field: str, x: str = "step") -> Line:
    """A field over the records that have it."""
    points = [
        (record[x], record[field]) for record in records if record.get(field) is not None and x in record
    ]
    return [at for at, _ in points], [value for _, value in points]


def training_curves(
    records: Iterable[Json], monitor: str | None = None, chance: float | None = None
) -> list[Curves]:
    """Loss between guessing and floor, validation above chance, realised hardness, health of the embeddings.

    Args:
        records: of a run's log, finished or not.
        monitor: the metric that chooses the best epoch; None: as the log says.
        chance: its chance level on validation; None: as the log says.
    """
    records = list(records)
    for start in of_kind(records, "start"):
        monitor = monitor or start.get("monitor")
        chance = (start.get("chance") or {}).get(monitor) if chance is None else chance
    steps, epochs, probes = (of_kind(records, kind) for kind in ("step", "epoch", "probe"))
    curves = []
    if steps:
        levels = {}
        if steps[-1].get("uniform_level") is not None:
            levels["guessing (ln of the candidates)"] = steps[-1]["uniform_level"]
        if steps[-1].get("floor") is not None:
            levels["floor of the loss"] = steps[-1]["floor"]
        loss = {
            "training": series_of(steps, "loss"),
            "validation, random batches": series_of(probes, "val_loss"),
            "training, random batches": series_of(probes, "train_loss_same_composition"),
        }
        if not loss["validation, random batches"][0]:
            del loss["training, random batches"]
        curves.append(_drawn("Training loss", loss, "optimiser step", "loss (nats)", levels))
    curves.append(_validation(of_kind(records, "start"), epochs, monitor, chance))
    if plans := plans_in(records):
        curves.append(hardness_curves({"realised": plans}, plans[0].get("hardness_random")))
    curves += _health(probes)
    return [each for each in curves if each is not None]


def _drawn(
    title: str,
    series: Mapping[str, Line],
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
) -> Curves | None:
    """Curves of the lines that have any point; None where none has."""
    lines = {name: line for name, line in series.items() if line[0]}
    return Curves(title, lines, xlabel, ylabel, dict(levels or {})) if lines else None


def _validation(
    start: Sequence[Json], epochs: Sequence[Json], monitor: str | None, chance: float | None
) -> Curves | None:
    measured = [each | {"epoch": 0} for each in start if each.get("val")] + [
        e for e in epochs if e.get("val")
    ]
    names = list(measured[0]["val"]) if measured else []
    shown = [name for name in names if name == monitor or name.endswith(("MRR", "R@10"))] or names[:3]
    series = {
        metric_words(n): series_of([e["val"] | {"epoch": e["epoch"]} for e in measured], n, "epoch")
        for n in shown
    }
    levels = (
        {f"chance, {metric_words(monitor)}": chance} if monitor is not None and chance is not None else {}
    )
    return _drawn("Validation", series, "epoch", "value", levels)


def hardness_curves(plans: Mapping[str, Sequence[PlanRecord]], random_level: float | None) -> Curves:
    """Realised hardness by quarter of every epoch, one line per arm.

    ``plans[arm]`` are the ``plan`` records of a run's log.
    """
    series = {}
    for arm, records in plans.items():
        x = [
            record["epoch"] - 1 + (q + 0.5) / 4 for record in records for q in range(len(record["hardness"]))
        ]
        series[arm] = (x, [value for record in records for value in record["hardness"]])
    return Curves(
        "Realised hardness through the epochs",
        series,
        "epoch (four quarters each)",
        "near neighbours in one batch",
        {"random batches": random_level} if random_level is not None else {},
    )


def _health(probes: Sequence[Json]) -> list[Curves | None]:
    if not probes:
        return []
    curves = []
    views = [key.rsplit("/", 1)[0] for key in probes[-1] if key.endswith("/effective_rank")]
    for name, title, unit in VIEW_SIGNALS:
        lines = {view: series_of(probes, f"{view}/{name}") for view in views}
        levels = {}
        if name == "effective_rank" and views and probes[-1].get(f"{views[0]}/rank_limit"):
            limit = probes[-1][f"{views[0]}/rank_limit"]
            # Far from its limit the curve would lie flat on the axis.
            top = max((max(y) for _, y in lines.values() if y), default=0.0)
            levels = {"most that is possible": limit} if top > 0.25 * limit else {}
        curves.append(_drawn(title, lines, "optimiser step", unit, levels))
    pair = {"alignment of partners": series_of(probes, "alignment")}
    pair |= {f"uniformity, {view}": series_of(probes, f"{view}/uniformity") for view in views}
    pair["gap between the views"] = series_of(probes, "modality_gap")
    title = "Alignment, uniformity, gap (lower: nearer, more spread)"
    curves.append(_drawn(title, pair, "optimiser step", ""))
    return curves


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
