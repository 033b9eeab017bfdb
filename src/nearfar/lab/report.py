"""``report.html``: one page that stands alone (no scripts, no network), for a run and for a comparison, with its
curves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nearfar.data.files import DAMAGED, Json, check_shape, read_bytes, read_text, write_atomically
from nearfar.errors import NearfarError
from nearfar.lab.charts import band_chart, curves_chart, heat_map, intervals_chart, line_chart, map_chart
from nearfar.lab.curves import (
    Line,
    PlanRecord,
    hardness_curves,
    of_kind,
    plans_of,
    series_of,
    training_curves,
)
from nearfar.lab.groups import by_question
from nearfar.lab.summary import Sweep, describe_comparison, run_verdict, sweep_of
from nearfar.lab.table import FEW
from nearfar.metrics import Estimate
from nearfar.terminal import metric_words, short_number, visible
from nearfar.training.run_folder import RunFolder
from nearfar.training.sections import read_sections

if TYPE_CHECKING:
    from nearfar.lab.compare import Comparison
    from nearfar.lab.groups import Arm

__all__ = [
    "comparison_curves",
    "comparison_page",
    "comparison_record",
    "embedding_map",
    "training_charts",
    "write_comparison",
    "write_page",
    "write_rankings",
    "write_report",
]


#: partners joined by lines on the map
LINKS = 60


def training_charts(
    folder: RunFolder, metrics: Json, tables: Mapping[str, Sequence[tuple[str, Estimate]]]
) -> list[Markup]:
    """Loss between guessing and floor, validation above chance, realised hardness, health of the embeddings."""
    monitored = dict(tables.get("val", ())).get(metrics["monitor"])
    chance = None if monitored is None else monitored.chance
    return [Markup(curves_chart(c)) for c in training_curves(folder.log(), metrics["monitor"], chance)]


@dataclass(frozen=True)
class EmbeddingMap:
    """The picture of ``rows`` embeddings in the plane, its share of the variance, and how many partners are joined."""

    picture: Markup
    explained: float
    rows: int
    links: int


def embedding_map(folder: RunFolder) -> EmbeddingMap | None:
    """The picture of ``map.npz``, the first two principal components of both views, with the variance they hold."""
    if not folder.has("map.npz"):
        return None
    arrays = folder.read_arrays("map.npz")
    views = {name[5:]: array for name, array in arrays.items() if name.startswith("view/")}
    explained = arrays.get("explained")
    if explained is None or explained.size != 1 or explained.dtype.kind != "f" or not views:
        raise NearfarError(f"{folder.path / 'map.npz'}: not the map of a run's embeddings. {DAMAGED}")
    for name, array in views.items():
        if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise NearfarError(f"{folder.path / 'map.npz'}: {name} is {array.dtype} {array.shape}. {DAMAGED}")
    points = {name: [(float(x), float(y)) for x, y in array] for name, array in views.items()}
    rows = len(next(iter(points.values())))
    links = min(LINKS, rows) if len(points) == 2 else 0  # the points of one view have no partners
    picture = map_chart("Embeddings in the plane", points, links)
    return EmbeddingMap(Markup(picture), float(explained), rows, links)


def comparison_curves(comparison: Comparison, arms: Sequence[Arm]) -> list[str]:
    """Validation of every run and realised hardness of every arm."""
    monitor = comparison.monitor
    curves: dict[str, Line] = {}
    plans: dict[str, list[PlanRecord]] = {}
    random_level = None
    for arm in arms:
        for seed, folder in sorted(arm.runs.items()):
            epochs = [
                e["val"] | {"epoch": e["epoch"]} for e in of_kind(folder.log(), "epoch") if e.get("val")
            ]
            if epochs:
                curves[f"{arm.label} · seed {seed}"] = series_of(epochs, monitor, "epoch")
        if of_arm := plans_of(arm.runs[min(arm.runs)]):
            plans[arm.label] = of_arm
            random_level = of_arm[0].get("hardness_random", random_level)
    charts = []
    words = metric_words(monitor)
    if curves:
        estimate = next(iter(comparison.baseline.estimates.values())).get(monitor)
        # Validation may have a different gallery: chance is drawn only where the comparison is on validation.
        levels = {"chance": estimate.chance} if estimate is not None and comparison.split == "val" else None
        charts.append(line_chart(f"Validation {words}", curves, "epoch", words, levels))
    if plans:
        charts.append(curves_chart(hardness_curves(plans, random_level)))
    return charts


#: fields of metrics.json in the first lines of a report
HEADING = {
    "system": str,
    "monitor": str,
    "best_epoch": (int, type(None)),
    "epochs": int,
    "steps": int,
    "train_seconds": float,
}
#: examples shown of each kind
SHOWN = 3


def _shown(value: object) -> object:
    """A text of data with what would steer a page's direction or a terminal written out; what we drew as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nearfar.lab"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: "–" if value is None else short_number(value)
    environment.filters["signed"] = lambda v: f"{v:+.3f}"
    environment.filters["figure"] = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    environment.filters["words"] = metric_words
    environment.filters["arrow"] = lambda name: metric_words(name, " · ")
    environment.filters["cell"] = _cell
    environment.filters["tint"] = _tint
    environment.filters["drawn"] = Markup  # drawn by us, not by the user's data
    return environment


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return short_number(value) if isinstance(value, float) else str(value)


def _tint(value: float, row: Sequence[object]) -> str:
    """The colour of a cell by its share of the row's numbers."""
    total = sum(cell for cell in row if isinstance(cell, int | float))
    return f"rgba(37, 99, 168, {0.55 * value / total if total else 0.0:.2f})"


def _examples(folder: RunFolder) -> dict[str, list[Json]]:
    kinds: dict[str, list[Json]] = {}
    if (folder.path / "examples.json").exists():
        for example in folder.read_json("examples.json"):
            shown = kinds.setdefault(example["kind"], [])
            if len(shown) < SHOWN:
                for item in [example["query"], *example["items"]]:
                    if item.get("svg"):
                        item["svg"] = Markup(item["svg"])  # drawn by us, not by the user's data
                shown.append(example)
    return kinds


def _baselines(given: Json, reported: str, split: str) -> dict[str, float]:
    """Scores of the baselines on ``split``, by metric.

    ``given`` is by metric for the ``reported`` split, or by split; an entry is a number or has a ``value``.
    """
    by_split = {name: entry for name, entry in given.items() if name in ("train", "val", "test")}
    own = by_split.get(split, {}) if by_split else given if split == reported else {}
    values = {name: entry["value"] if isinstance(entry, Mapping) else entry for name, entry in own.items()}
    return {name: float(value) for name, value in values.items() if value is not None}


def _before(metrics: Json) -> dict[str, dict[str, Estimate]]:
    """The scores of the model before its first step, by split and metric."""
    return {
        split: {name: Estimate.from_dict(each) for name, each in estimates.items()}
        for split, estimates in (metrics.get("before_training") or {}).items()
    }


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a finished run and return its path."""
    metrics = folder.read_json("metrics.json")
    check_shape(metrics, HEADING, str(folder.path / "metrics.json"))
    layout = folder.read_json("dataset_layout.json")
    tables = {
        split: [(name, Estimate.from_dict(content)) for name, content in by_name.items()]
        for split, by_name in sorted(metrics["splits"].items())  # test before val
    }
    page = (
        _environment()
        .get_template("run.html")
        .render(
            name=folder.name,
            path=str(folder.path),
            metrics=metrics,
            tables={
                (split, question): list(estimates.items())
                for split, rows in tables.items()
                for question, estimates in by_question(dict(rows)).items()
            },
            verdict=run_verdict(folder),
            before=_before(metrics),
            gains=metrics.get("gain") or {},
            baselines=partial(_baselines, metrics.get("baselines") or {}, next(iter(tables))),
            sections=read_sections(folder),
            charts=training_charts(folder, metrics, tables),
            map=embedding_map(folder),
            examples=_examples(folder),
            layout=layout,
            plans=plans_of(folder),
            config=read_text(folder.path / "config.yaml"),
            environment=folder.read_json("environment.json"),
            resumed=folder.read_json("resumed.json") if (folder.path / "resumed.json").exists() else [],
        )
    )
    return folder.write_text("report.html", page)


def write_page(path: Path, template: str, **content: object) -> None:
    """Write a page of one of this package's templates, which stands alone, to an HTML file."""
    _check_page(path, "--html")
    page = _environment().get_template(template).render(**content)
    write_atomically(path, lambda file: file.write(page.encode()))


def comparison_page(comparison: Comparison, path: Path) -> str:
    """The page of a comparison: arms, differences with verdicts, curves of every arm, examples of the best arm.

    Links to the runs lead from ``path``, where the page is going to lie.
    """
    sweep = sweep_of(comparison)
    many = len(comparison.arms) > FEW and sweep is not None
    shown = [sweep.best] if many and sweep is not None and sweep.best is not None else None
    charts = comparison_curves(comparison, [comparison.baseline, *shown] if shown else comparison.arms)
    for label, differences in comparison.differences.items():
        if shown and label != shown[0].label:
            continue
        for question, metrics in comparison.by_question(differences).items():
            shown_here = [(metric, differences[metric]) for metric in comparison.results(metrics)]
            if not shown_here:
                continue
            rows = [(metric_words(metric), d.value, d.low, d.high) for metric, d in shown_here]
            title = f"{label} − {comparison.baseline.label}" + (f" · {question}" if question else "")
            charts.append(intervals_chart(title, rows, "paired difference, 95 % interval"))
    first = next(iter(next(iter(comparison.arms[0].estimates.values())).values()))
    best = max(
        (arm for arm in comparison.arms if comparison.monitor in comparison.summary[arm.label]),
        key=lambda arm: comparison.summary[arm.label][comparison.monitor].value,
        default=comparison.baseline,
    )
    run = best.runs[min(best.runs)]
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            comparison=comparison,
            first=first,
            charts=[Markup(chart) for chart in charts],
            monitor=comparison.monitor,
            kind=_kind(comparison, sweep),
            sweep=sweep,
            pictures=[Markup(picture) for picture in sweep_pictures(comparison, sweep)] if sweep else [],
            shown=[arm.label for arm in shown] if shown else list(comparison.differences),
            paragraphs=describe_comparison(comparison),
            examples=_examples(run),
            example_run=f"{best.label}, seed {min(best.runs)}",
            runs=[
                (
                    arm.label,
                    f"{fold}, {seed}" if fold else seed,
                    folder.name,
                    os.path.relpath(folder.path.resolve(), path.resolve().parent),
                )
                for arm in comparison.arms
                for fold, seed, folder in arm.every_run()
            ],
        )
    )


def _kind(comparison: Comparison, sweep: Sweep | None) -> str:
    """The colour of the first paragraph: of the best arm, or of the only one beside the baseline."""
    label = (
        sweep.best.label
        if sweep is not None and sweep.best is not None
        else next(iter(comparison.differences), "")
    )
    difference = comparison.differences.get(label, {}).get(comparison.monitor)
    return {"better": "good", "worse": "bad"}.get(difference.verdict if difference else "", "unsure")


def sweep_pictures(comparison: Comparison, sweep: Sweep) -> list[str]:
    """A heat map for each pair of numeric axes, a line with its band for one; values by the monitored metric."""
    name = comparison.monitor
    words = metric_words(name)
    base = comparison.summary[comparison.baseline.label].get(name)
    pictures = []
    for sheet in sweep.sheets:
        cells = {
            at: (mean.value, mean.low, mean.high)
            for at, arm in sheet.cells.items()
            if (mean := comparison.summary[arm.label].get(name)) is not None
        }
        title = f"{words}{' · ' if sheet.title else ''}{sheet.title}"
        if sheet.y is not None:
            best = next((at for at, arm in sheet.cells.items() if arm is sweep.best), None)
            pictures.append(heat_map(title, cells, sheet.x, sheet.y, best))
        else:
            levels = {f"baseline {comparison.baseline.label}": base.value} if base else None
            pictures.append(band_chart(title, {x: v for (x, _), v in cells.items()}, sheet.x, words, levels))
    return pictures


def _check_page(path: Path, option: str = "--output") -> None:
    """``NearfarError`` where a page would replace one that nearfar has not written."""
    if os.path.lexists(path) and b"nearfar</title>" not in read_bytes(path)[:4096]:
        raise NearfarError(
            f"{path} exists and is not a page of nearfar's: it is left as it is. Give a different {option}."
        )


def write_comparison(comparison: Comparison, output: Path | None = None) -> Path:
    """Write the comparison's ``report.html`` and ``comparison.json``; returns the path of the former."""
    folders = [str(run.path.resolve()) for arm in comparison.arms for _, _, run in arm.every_run()]
    common = Path(os.path.commonpath(folders))
    path = output or common / "report.html"
    if path.is_dir() or not path.suffix:
        path = path / "report.html"
    if output is None and (common / "config.yaml").exists():
        path = common / "comparison.html"  # one run lies inside the other: its own report stays
    _check_page(path)
    text = json.dumps(comparison_record(comparison), indent=2, ensure_ascii=False)
    write_atomically(path.with_name("comparison.json"), lambda file: file.write(text.encode()))
    page = comparison_page(comparison, path)
    write_atomically(path, lambda file: file.write(page.encode()))
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def comparison_record(comparison: Comparison) -> Json:
    """What ``comparison.json`` holds."""
    content: Json = {
        "split": comparison.split,
        "baseline": comparison.baseline.label,
        "arms": {
            arm.label: {f"{fold}/{s}" if fold else str(s): str(r) for fold, s, r in arm.every_run()}
            for arm in comparison.arms
        },
        "means": {
            a: {m: [v.value, v.low, v.high] for m, v in means.items()}
            for a, means in comparison.summary.items()
        },
        "over": comparison.over,
        "by_fold": {a: {m: r.to_dict() for m, r in rs.items()} for a, rs in comparison.by_fold.items()},
        "differences": {
            a: {m: d.to_dict() for m, d in ds.items()} for a, ds in comparison.differences.items()
        },
        "controls": sorted(comparison.controls),
        "together": comparison.together,
        "refused": comparison.refused,
        "notes": comparison.notes,
        "losses": {arm: str(losses) for arm, losses in comparison.losses.items()},
    }
    if (sweep := sweep_of(comparison)) is not None:
        content["sweep"] = {
            "axes": sweep.axes,
            "best": sweep.best.label if sweep.best else None,
            "chosen_on": sweep.chosen_on,
            "verdict": sweep.verdict,
        }
    if comparison.needed:
        content["needed"] = comparison.needed
    return content


def write_rankings(comparison: Comparison, path: Path) -> Path:
    """Write a comparison of rankings as JSON, in the form of ``comparison.json``."""
    if path.suffix != ".json":
        raise NearfarError(f"--output {path}: a comparison of rankings is written as .json")
    text = json.dumps(comparison_record(comparison), indent=2, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path
