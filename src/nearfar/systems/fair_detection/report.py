"""Sections of the report: AP and AR of each group, the gap between the groups, and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from nearfar.data.images import read_image, resize
from nearfar.metrics import group_signals
from nearfar.metrics.detection import Change
from nearfar.models.detection.detector import corners
from nearfar.systems.fair_detection.evaluation import METRICS, FairResults, PictureSplit
from nearfar.systems.fair_detection.frozen import DetectorOutputs
from nearfar.training.sections import Picture, Section, Table

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["panel", "report_sections"]


def report_sections(
    outputs: Mapping[str, Tensor],
    part: PictureSplit,
    groups: tuple[str, str],
    results: FairResults,
    detector_outputs: DetectorOutputs,
) -> list[Section]:
    """The gap before and after with the verdict on it; other gaps; pictures."""
    tables = [_metric_table(metric, groups, results) for metric in METRICS]
    return [
        Section(
            "The gap between the groups",
            f"{results.verdict} The detector was not changed; each picture was, by at most "
            f"ε = {detector_outputs.bound:.3f} of the range of a value.",
            [*tables, _other_gaps(outputs, part, groups)],
        ),
        Section(
            "Pictures",
            "Clean, perturbation, perturbed. The perturbation is amplified: grey is none, white and black are ± ε. "
            "Green: true boxes. Orange: as many of the detector's best boxes, with their scores. The pictures were "
            "drawn at random.",
            pictures=_panels(outputs, part, detector_outputs),
        ),
    ]


def _metric_table(metric: str, groups: tuple[str, str], results: FairResults) -> Table:
    rows = []
    names = {group: f"{metric}/{group}" for group in groups} | {
        "both": metric,
        f"gap ({groups[1]} − {groups[0]})": f"{metric}/gap",
        "gap, its size": "gap size",
        "common mode": "common mode",
    }
    for words, name in names.items():
        change, control = results.changes[metric][name], results.controls[metric][name]
        rows.append(
            [words, change.before, control.after, change.after, _interval(change), _interval(control)]
        )
    columns = [metric, "clean", "random", "perturbed", "perturbed − clean", "random − clean"]
    caption = (
        "Changes with 95 % intervals over pictures, paired. Random: each picture's own perturbation with its pixels in "
        "a different order. Common mode: the mean of both groups' scores; the gap mode is the change of the gap."
    )
    return Table(columns, rows, caption)


def _interval(change: Change) -> str:
    return f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def _other_gaps(outputs: Mapping[str, Tensor], part: PictureSplit, groups: tuple[str, str]) -> Table:
    """The gaps in what the losses see: scores and features; and the size of the perturbation."""
    named = [part.split.groups[group] for group in part.group]
    scores, sizes = outputs["scores"][..., 0], outputs["sizes"][..., 0]
    rows: list[list[object]] = []
    signals = [
        group_signals(named, scores[:, i], features=outputs[name])
        for i, name in enumerate(("clean_features", "features"))
    ]
    for words, key in (
        *((f"mean score, {group}", f"score/{group}") for group in groups),
        ("distance of the groups' mean features", "feature_gap"),
    ):
        before, after = (values[key] for values in signals)
        rows.append([words, before, after, f"{after - before:+.4f}"])
    before, after = (values[f"score/{groups[1]}"] - values[f"score/{groups[0]}"] for values in signals)
    rows.insert(2, ["score gap", before, after, f"{after - before:+.4f}"])
    rows.append(["‖δ‖∞, mean over pictures", 0.0, float(sizes[:, 0].mean()), ""])
    rows.append(["‖δ‖₂, mean over pictures", 0.0, float(sizes[:, 1].mean()), ""])
    caption = (
        "A picture's score is the mean probability of the true class over the queries matched with its boxes."
    )
    return Table(["", "clean", "perturbed", "change"], rows, caption)


def _panels(
    outputs: Mapping[str, Tensor], part: PictureSplit, detector_outputs: DetectorOutputs
) -> list[Picture]:
    panels = []
    for position, pixels in detector_outputs.shown[part.number].items():
        if pixels is None:
            continue
        image = part.split.images[position]
        clean = resize(read_image(image.path), (part.size, part.size))
        true = corners(part.target(position).boxes).numpy()
        before, after = (outputs[kind][position].numpy() for kind in ("clean", "perturbed"))
        scores = np.round(outputs["scores"][position, :, 0].numpy(), 2)
        group = part.split.groups[image.group]
        caption = f"{image.name}, {group}: score {scores[0]:.2f} → {scores[1]:.2f}"
        panels.append(panel(clean, pixels, true, before, after, detector_outputs.bound, caption))
    return panels


#: least side of a picture in the report, in pixels
SIDE = 224


TRUE, PREDICTED = (70, 200, 110), (250, 140, 40)


def panel(
    clean: UInt8[np.ndarray, "h w 3"],
    perturbed: Float[np.ndarray, "h w 3"],
    true: Float[np.ndarray, "k 4"],
    before: Float[np.ndarray, "q 6"],
    after: Float[np.ndarray, "q 6"],
    bound: float,
    caption: str,
) -> Picture:
    """Three pictures side by side. The middle one is the perturbation: grey is none, black and white are ∓ ``bound``.

    ``true``: corners as shares of the picture. ``before``, ``after``: detections (corners, score, label),
    of which as many as there are true boxes are drawn, best first.
    """
    from PIL import Image

    delta = perturbed - clean / 255.0
    shown = 0.5 + 0.5 * delta / max(bound, 1e-9)
    scale = max(1, -(-SIDE // clean.shape[1]))
    parts = []
    for pixels, boxes in (
        (clean / 255.0, before),
        (shown, None),
        (perturbed, after),
    ):
        image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if boxes is not None:
            _draw(image, true, boxes)
        parts.append(np.asarray(image))
    gutter = np.full((parts[0].shape[0], 6, 3), 255, np.uint8)
    whole = np.concatenate([parts[0], gutter, parts[1], gutter, parts[2]], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, "JPEG", quality=88)
    return Picture(buffer.getvalue(), caption)


def _draw(image: Image.Image, true: Float[np.ndarray, "k 4"], detections: Float[np.ndarray, "q 6"]) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    size = np.array([image.width, image.height] * 2)
    for box in true * size:
        draw.rectangle(tuple(box), outline=TRUE, width=2)
    for row in detections[np.argsort(-detections[:, 4], kind="stable")][: max(1, len(true))]:
        left, top, right, bottom = row[:4] * size
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=PREDICTED, width=2)
        draw.text((left + 4, max(0, top) + 2), f"{row[4]:.2f}", fill=PREDICTED)
