"""The report's own parts: what became of each group and of the gap, and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from nearfar.data.images import read_image, resize
from nearfar.metrics import group_signals
from nearfar.metrics.detection import Change
from nearfar.models.detection.detector import corners
from nearfar.systems.fair_detection.data import PictureDataset
from nearfar.systems.fair_detection.evaluation import METRICS, Findings, Looks, panel
from nearfar.training.sections import Picture, Section, Table

__all__ = ["report_sections"]


def report_sections(
    outputs: Mapping[str, Tensor],
    dataset: PictureDataset,
    groups: tuple[str, str],
    findings: Findings,
    looks: Looks,
) -> list[Section]:
    """The gap before and after with the verdict on it; other gaps; pictures."""
    tables = [_metric_table(metric, groups, findings) for metric in METRICS]
    return [
        Section(
            "The gap between the groups",
            f"{findings.verdict} The detector was not changed; each picture was, by at most ε = {looks.bound:.3f} "
            "of the range of a value.",
            [*tables, _other_gaps(outputs, dataset, groups)],
        ),
        Section(
            "Pictures",
            "Clean, perturbation, perturbed. The perturbation is amplified: grey is none, white and black are ± ε. "
            "Green: true boxes. Orange: as many of the detector's best boxes, with their scores. The pictures were "
            "drawn at random.",
            pictures=_panels(outputs, dataset, looks),
        ),
    ]


def _metric_table(metric: str, groups: tuple[str, str], findings: Findings) -> Table:
    rows = []
    names = {group: f"{metric}/{group}" for group in groups} | {
        "both": metric,
        f"gap ({groups[1]} − {groups[0]})": f"{metric}/gap",
        "gap, its size": "gap size",
        "common mode": "common mode",
    }
    for words, name in names.items():
        change, control = findings.changes[metric][name], findings.controls[metric][name]
        rows.append(
            [words, change.before, control.after, change.after, _interval(change), _interval(control)]
        )
    columns = [metric, "clean", "random", "perturbed", "perturbed − clean", "random − clean"]
    caption = (
        "Changes with 95 % intervals over pictures, paired. Random: each picture's own perturbation with its pixels in "
        "another order. Common mode: the mean of both groups' scores; the gap mode is the change of the gap."
    )
    return Table(columns, rows, caption)


def _interval(change: Change) -> str:
    return f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def _other_gaps(outputs: Mapping[str, Tensor], dataset: PictureDataset, groups: tuple[str, str]) -> Table:
    """The gaps in what the losses see: scores and features; and the size of the perturbation."""
    named = [groups[0] if group == dataset.lower else groups[1] for group in dataset.group]
    scores, sizes = outputs["scores"][..., 0], outputs["sizes"][..., 0]
    rows: list[list[Any]] = []
    signals = [
        group_signals(named, scores[:, i], features=outputs[name])
        for i, name in enumerate(("clean_features", "features"))
    ]
    for words, key in (
        *((f"mean score, {group}", f"score/{group}") for group in groups),
        ("distance of the groups' mean features", "feature_gap"),
    ):
        before, after = (found[key] for found in signals)
        rows.append([words, before, after, f"{after - before:+.4f}"])
    before, after = (found[f"score/{groups[1]}"] - found[f"score/{groups[0]}"] for found in signals)
    rows.insert(2, ["score gap", before, after, f"{after - before:+.4f}"])
    rows.append(["‖δ‖∞, mean over pictures", 0.0, float(sizes[:, 0].mean()), ""])
    rows.append(["‖δ‖₂, mean over pictures", 0.0, float(sizes[:, 1].mean()), ""])
    caption = (
        "A picture's score is the mean probability of the true class over the queries matched with its boxes."
    )
    return Table(["", "clean", "perturbed", "change"], rows, caption)


def _panels(outputs: Mapping[str, Tensor], dataset: PictureDataset, looks: Looks) -> list[Picture]:
    panels = []
    for position, pixels in looks.shown[dataset.name].items():
        if pixels is None:
            continue
        image = dataset.split.images[position]
        clean = resize(read_image(image.path), (dataset.size, dataset.size))
        true = corners(dataset.target(position).boxes).numpy()
        before, after = (outputs[kind][position].numpy() for kind in ("clean", "perturbed"))
        scores = np.round(outputs["scores"][position, :, 0].numpy(), 2)
        group = dataset.split.groups[image.group]
        caption = f"{image.name}, {group}: score {scores[0]:.2f} → {scores[1]:.2f}"
        panels.append(panel(clean, pixels, true, before, after, looks.bound, caption))
    return panels
