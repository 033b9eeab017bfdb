"""``report.html``: one page that stands alone (no scripts, no network), for a run and for a comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nearfar.lab.charts import hardness_chart, intervals_chart, line_chart
from nearfar.lab.reading import read_comparison
from nearfar.lab.table import metric_words, short_number
from nearfar.metrics import Estimate
from nearfar.training.run_folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from nearfar.lab.compare import Comparison

__all__ = ["comparison_page", "write_comparison", "write_report"]

#: examples shown of each kind
SHOWN = 3


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nearfar.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: "–" if value is None else short_number(value)
    environment.filters["signed"] = lambda v: f"{v:+.3f}"
    environment.filters["arrow"] = lambda name: metric_words(name, " · ")
    return environment


def _of_kind(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [record for record in folder.log() if record.get("kind") == kind]


def training_charts(folder: RunFolder, monitor: str) -> list[Markup]:
    """Loss against its uniform level, validation metric, realised hardness."""
    steps, epochs, plans = (_of_kind(folder, kind) for kind in ("step", "epoch", "plan"))
    charts = []
    if steps:
        levels = {}
        if steps[-1].get("uniform_level") is not None:
            levels["guessing (ln of the candidates)"] = steps[-1]["uniform_level"]
        loss = {"loss": ([s["step"] for s in steps], [s["loss"] for s in steps])}
        charts.append(line_chart("Training loss", loss, "optimiser step", "loss (nats)", levels))
    names = list(epochs[0].get("val") or {}) if epochs else []
    shown = [name for name in names if name == monitor or name.endswith(("MRR", "R@10"))]
    if shown:
        x = [e["epoch"] for e in epochs]
        curves = {metric_words(name): (x, [e["val"][name] for e in epochs]) for name in shown}
        charts.append(line_chart("Validation", curves, "epoch", "value"))
    plans = [plan for plan in plans if plan.get("hardness")]
    if plans:
        charts.append(hardness_chart({"realised": plans}, plans[0].get("hardness_random")))
    return [Markup(chart) for chart in charts]


def _examples(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    if (folder.path / "examples.json").exists():
        for example in folder.read_json("examples.json"):
            shown = kinds.setdefault(example["kind"], [])
            if len(shown) < SHOWN:
                for item in [example["query"], *example["items"]]:
                    if item.get("svg"):
                        item["svg"] = Markup(item["svg"])  # drawn by us, not by the user's data
                shown.append(example)
    return kinds


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a finished run and return its path."""
    metrics = folder.read_json("metrics.json")
    layout = folder.read_json("dataset_layout.json")
    tables = {
        split: [(name, Estimate.from_dict(content)) for name, content in found.items()]
        for split, found in metrics["splits"].items()
    }
    page = (
        _environment()
        .get_template("run.html")
        .render(
            name=folder.name,
            path=str(folder.path),
            metrics=metrics,
            tables=tables,
            charts=training_charts(folder, metrics["monitor"]),
            examples=_examples(folder),
            layout=layout,
            plans=[plan for plan in _of_kind(folder, "plan") if plan.get("hardness")],
            config=(folder.path / "config.yaml").read_text(),
            environment=folder.read_json("environment.json"),
            resumed=folder.read_json("resumed.json") if (folder.path / "resumed.json").exists() else [],
        )
    )
    return folder.write_text("report.html", page)


def comparison_page(comparison: Comparison, path: Path) -> str:
    """The page of a comparison: arms, differences with verdicts, curves of every arm, examples of the best arm.

    Links to the runs lead from ``path``, where the page is going to lie.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    plans: dict[str, list[Mapping[str, Any]]] = {}
    monitor = ""
    random_level = None
    for arm in comparison.arms:
        for seed, folder in sorted(arm.runs.items()):
            monitor = folder.read_json("metrics.json")["monitor"]
            epochs = [e for e in _of_kind(folder, "epoch") if e.get("val")]
            if epochs:
                label = f"{arm.label} · seed {seed}"
                curves[label] = ([e["epoch"] for e in epochs], [e["val"][monitor] for e in epochs])
        found = [p for p in _of_kind(arm.runs[min(arm.runs)], "plan") if p.get("hardness")]
        if found:
            plans[arm.label] = list(found)
            random_level = found[0].get("hardness_random", random_level)
    charts = []
    if curves:
        charts.append(
            line_chart(f"Validation {metric_words(monitor)}", curves, "epoch", metric_words(monitor))
        )
    if plans:
        charts.append(hardness_chart(plans, random_level))
    for label, differences in comparison.differences.items():
        rows = [(metric_words(n), d.value, d.low, d.high) for n, d in differences.items() if "rank" not in n]
        charts.append(
            intervals_chart(
                f"{label} − {comparison.baseline.label}", rows, "paired difference, 95 % interval"
            )
        )
    first = next(iter(next(iter(comparison.arms[0].estimates.values())).values()))
    best = max(comparison.arms, key=lambda arm: next(iter(comparison.summary[arm.label].values())).value)
    shown = best.runs[min(best.runs)]
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            comparison=comparison,
            first=first,
            charts=[Markup(chart) for chart in charts],
            monitor=monitor,
            reading=read_comparison(comparison),
            examples=_examples(shown),
            example_run=f"{best.label}, seed {min(best.runs)}",
            runs=[
                (arm.label, seed, folder.name, os.path.relpath(folder.path.resolve(), path.resolve().parent))
                for arm in comparison.arms
                for seed, folder in arm.runs.items()
            ],
        )
    )


def write_comparison(comparison: Comparison, output: Path | None = None) -> Path:
    """Write the comparison's ``report.html`` and ``comparison.json``; returns the path of the former."""
    folders = [str(run.path.resolve()) for arm in comparison.arms for run in arm.runs.values()]
    common = Path(os.path.commonpath(folders))
    path = output or common / "report.html"
    if path.is_dir():
        path = path / "report.html"
    if output is None and (common / "config.yaml").exists():
        path = common / "comparison.html"  # one run lies inside the other: its own report stays
    content = {
        "split": comparison.split,
        "baseline": comparison.baseline.label,
        "arms": {arm.label: {str(s): str(r) for s, r in arm.runs.items()} for arm in comparison.arms},
        "differences": {
            a: {m: d.to_dict() for m, d in ds.items()} for a, ds in comparison.differences.items()
        },
        "refused": comparison.refused,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomically(path.with_name("comparison.json"), lambda file: file.write(text.encode()))
    page = comparison_page(comparison, path)
    write_atomically(path, lambda file: file.write(page.encode()))
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
