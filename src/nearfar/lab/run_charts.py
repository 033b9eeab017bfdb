"""Curves from the logs of runs: loss between chance and floor, validation above chance, hardness, health."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from nearfar.data.files import DAMAGED
from nearfar.errors import NearfarError
from nearfar.lab.charts import hardness_chart, line_chart, map_chart
from nearfar.lab.words import metric_words
from nearfar.metrics import Estimate
from nearfar.training.run_folder import RunFolder

if TYPE_CHECKING:
    from nearfar.lab.compare import Comparison
    from nearfar.lab.groups import Arm

__all__ = ["comparison_curves", "embedding_map", "training_charts"]

#: what a probe says of a view: field, title, unit
VIEW_SIGNALS = (
    ("effective_rank", "Effective rank of the embeddings", "dimensions"),
    ("mean_cosine", "Mean cosine of different rows", "cosine (1: collapsed)"),
)
#: partners joined by lines on the map
LINKS = 60


def of_kind(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, oldest first."""
    return [record for record in folder.log() if record.get("kind") == kind]


def _series(
    records: Sequence[Mapping[str, Any]], field: str, x: str = "step"
) -> tuple[list[float], list[float]]:
    found = [record for record in records if record.get(field) is not None]
    return [record[x] for record in found], [record[field] for record in found]


def training_charts(
    folder: RunFolder, metrics: Mapping[str, Any], tables: Mapping[str, Sequence[tuple[str, Estimate]]]
) -> list[Markup]:
    """Loss between guessing and floor, validation above chance, realised hardness, health of the embeddings."""
    steps, epochs, plans, probes = (of_kind(folder, kind) for kind in ("step", "epoch", "plan", "probe"))
    charts = []
    if steps:
        levels = {}
        if steps[-1].get("uniform_level") is not None:
            levels["guessing (ln of the candidates)"] = steps[-1]["uniform_level"]
        if steps[-1].get("floor") is not None:
            levels["floor of the loss"] = steps[-1]["floor"]
        loss = {"training": _series(steps, "loss")}
        if _series(probes, "val_loss")[0]:
            loss["validation, random batches"] = _series(probes, "val_loss")
            loss["training, random batches"] = _series(probes, "train_loss_same_composition")
        loss = {name: line for name, line in loss.items() if line[0]}
        charts.append(line_chart("Training loss", loss, "optimiser step", "loss (nats)", levels))
    charts += _validation(epochs, metrics["monitor"], dict(tables.get("val", ())))
    plans = [plan for plan in plans if plan.get("hardness")]
    if plans:
        charts.append(hardness_chart({"realised": plans}, plans[0].get("hardness_random")))
    return [Markup(chart) for chart in [*charts, *_health(probes)]]


def _validation(
    epochs: Sequence[Mapping[str, Any]], monitor: str, found: Mapping[str, Estimate]
) -> list[str]:
    names = list(epochs[0].get("val") or {}) if epochs else []
    shown = [name for name in names if name == monitor or name.endswith(("MRR", "R@10"))] or names[:3]
    if not shown:
        return []
    curves = {
        metric_words(n): _series([e["val"] | {"epoch": e["epoch"]} for e in epochs], n, "epoch")
        for n in shown
    }
    levels = {}
    if monitor in found:
        levels[f"chance, {metric_words(monitor)}"] = found[monitor].chance
    return [line_chart("Validation", curves, "epoch", "value", levels)]


def _health(probes: Sequence[Mapping[str, Any]]) -> list[str]:
    if not probes:
        return []
    charts = []
    views = [key.rsplit("/", 1)[0] for key in probes[-1] if key.endswith("/effective_rank")]
    for field, title, unit in VIEW_SIGNALS:
        lines = {view: _series(probes, f"{view}/{field}") for view in views}
        lines = {view: line for view, line in lines.items() if line[0]}
        levels = {}
        if field == "effective_rank" and views and probes[-1].get(f"{views[0]}/rank_limit"):
            limit = probes[-1][f"{views[0]}/rank_limit"]
            # Far from its limit the curve would lie flat on the axis.
            top = max(max(y) for _, y in lines.values())
            levels = {"most that is possible": limit} if top > 0.25 * limit else {}
        if lines:
            charts.append(line_chart(title, lines, "optimiser step", unit, levels))
    pair = {"alignment of partners": _series(probes, "alignment")}
    pair |= {f"uniformity, {view}": _series(probes, f"{view}/uniformity") for view in views}
    pair["gap between the views"] = _series(probes, "modality_gap")
    pair = {name: line for name, line in pair.items() if line[0]}
    if pair:
        charts.append(
            line_chart("Alignment, uniformity, gap (lower: nearer, more spread)", pair, "optimiser step", "")
        )
    return charts


def embedding_map(folder: RunFolder) -> dict[str, Any] | None:
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
    picture = map_chart("Embeddings in the plane", points, min(LINKS, rows))
    return {
        "picture": Markup(picture),
        "explained": float(explained),
        "rows": rows,
        "links": min(LINKS, rows),
    }


def comparison_curves(comparison: Comparison, arms: Sequence[Arm]) -> list[str]:
    """Validation of every run and realised hardness of every arm."""
    monitor = comparison.monitor
    curves: dict[str, tuple[list[float], list[float]]] = {}
    plans: dict[str, list[Mapping[str, Any]]] = {}
    random_level = None
    for arm in arms:
        for seed, folder in sorted(arm.runs.items()):
            epochs = [e["val"] | {"epoch": e["epoch"]} for e in of_kind(folder, "epoch") if e.get("val")]
            if epochs:
                curves[f"{arm.label} · seed {seed}"] = _series(epochs, monitor, "epoch")
        found = [p for p in of_kind(arm.runs[min(arm.runs)], "plan") if p.get("hardness")]
        if found:
            plans[arm.label] = list(found)
            random_level = found[0].get("hardness_random", random_level)
    charts = []
    words = metric_words(monitor)
    if curves:
        estimate = next(iter(comparison.baseline.estimates.values())).get(monitor)
        # The gallery of validation may be another one: chance is drawn where the comparison speaks of validation.
        levels = {"chance": estimate.chance} if estimate is not None and comparison.split == "val" else None
        charts.append(line_chart(f"Validation {words}", curves, "epoch", words, levels))
    if plans:
        charts.append(hardness_chart(plans, random_level))
    return charts
