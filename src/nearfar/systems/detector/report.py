"""Pictures of the report with true and predicted boxes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from nearfar.data.coco import CocoSplit
from nearfar.data.images import read_image
from nearfar.metrics.detection import Boxes, box_overlap
from nearfar.training.sections import Picture, Section

__all__ = ["draw_boxes", "pictures_section"]


TRUE, PREDICTED = (255, 255, 255), (255, 140, 0)
_SHOWN = 12
_SIDE = 320  # pixels of a picture's longer side


def pictures_section(split: CocoSplit, true: Boxes, predicted: Boxes) -> Section:
    """Twelve pictures from the best prediction to the worst, at even steps of the IoU of the best-scored box."""
    reached = []
    for i in range(len(split)):
        best, theirs = best_predicted(predicted, i), true.boxes[true.picture == i]
        reached.append(float(box_overlap(best[:1], theirs).max()) if len(theirs) and len(best) else np.nan)
    scored = np.flatnonzero(~np.isnan(reached))
    order = scored[np.argsort(-np.asarray(reached)[scored], kind="stable")]
    chosen = (
        order[np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int)]
        if len(order)
        else []
    )
    assert predicted.scores is not None
    pictures = []
    for i in chosen:
        box, score = best_predicted(predicted, i), float(predicted.scores[predicted.picture == i].max())
        image = draw_boxes(
            read_image(split.images[i].path),
            [(b, TRUE) for b in true.boxes[true.picture == i]] + [(box[0], PREDICTED)],
        )
        group = split.images[i].group
        name = f"{split.groups[group]}, " if split.groups and group >= 0 else ""
        pictures.append(Picture(image, f"{name}IoU {reached[i]:.2f}, score {score:.2f}"))
    return Section(
        "Predicted and true boxes",
        "White: true boxes. Orange: the predicted box of the best score. From the best fit of the split to the worst, "
        "at even steps.",
        pictures=pictures,
    )


def best_predicted(predicted: Boxes, picture: int) -> np.ndarray:
    """The best-scored box of a picture, (1, 4), or (0, 4) without a prediction."""
    rows = np.flatnonzero(predicted.picture == picture)
    assert predicted.scores is not None
    return predicted.boxes[rows[np.argsort(-predicted.scores[rows], kind="stable")[:1]]]


def draw_boxes(
    pixels: UInt8[np.ndarray, "h w 3"], boxes: Sequence[tuple[np.ndarray, tuple[int, int, int]]]
) -> bytes:
    """A JPEG of the picture with boxes (left, top, right, bottom), in its pixels, in their colours."""
    from PIL import Image, ImageDraw

    scale = _SIDE / max(pixels.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for box, colour in boxes:
        pen.rectangle([float(v) * scale for v in box], outline=colour, width=3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
