"""The report's sections: probes beside their controls, the confusion table, pairs drawn with their boxes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from nearfar.data.scenes.triples import Pairs
from nearfar.errors import NearfarError
from nearfar.systems.relations.evaluation import FUSED, PAIR, Predictions, Scores, confusion, differences
from nearfar.training.sections import Picture, Section, Table

__all__ = ["examples", "pair_picture", "sections"]


_SIDE = 320  # pixels of a picture's longer side
_SUBJECT, _OBJECT = (214, 69, 65), (37, 99, 168)
_RIGHT, _WRONG = 2, 2  # shown of each relation


def examples(
    pairs: Pairs,
    truth: Int[ndarray, " n"],
    predicted: Int[ndarray, " n"],
    relations: tuple[str, ...],
    seed: int = 0,
) -> list[Picture]:
    """A few right and a few wrong predictions of every relation; pairs with a photo first."""
    rng = np.random.default_rng([seed, len(pairs)])
    photo = pairs.has_photo
    shown: list[Picture] = []
    for c in range(len(relations)):
        for right, most in ((True, _RIGHT), (False, _WRONG)):
            at = np.flatnonzero((truth == c) & ((predicted == truth) == right))
            at = rng.permutation(at)
            for i in at[np.argsort(~photo[at], kind="stable")][:most]:
                words = f"{pairs.subject[i]} — {relations[c]} — {pairs.object[i]}"
                verdict = "right" if right else f"predicted: {relations[int(predicted[i])]}"
                shown.append(Picture(pair_picture(pairs, int(i)), f"{words} · {verdict}"))
    return shown


def pair_picture(pairs: Pairs, i: int) -> bytes:
    """A JPEG of one pair: the subject's box red, the object's blue; on grey where there is no photo."""
    from PIL import Image, ImageDraw

    width, height = pairs.size[i]
    scale = _SIDE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.new("RGB", size, (232, 234, 238))
    photo = pairs.photos.get(pairs.image[i])
    if photo is not None:
        # A damaged photo is listed among the rejections; its boxes are shown on grey.
        with suppress(NearfarError):
            canvas = Image.fromarray(photo.read()).resize(size)
    draw = ImageDraw.Draw(canvas)
    for box, colour, name in (
        (pairs.object_box[i], _OBJECT, pairs.object[i]),
        (pairs.subject_box[i], _SUBJECT, pairs.subject[i]),
    ):
        left, top, right, bottom = (float(v) * scale for v in box)
        draw.rectangle((left, top, right, bottom), outline=colour, width=2)
        draw.rectangle((left, top, left + 6 * len(name) + 4, top + 12), fill=colour)
        draw.text((left + 2, top), name, fill=(255, 255, 255))
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def sections(pairs: Pairs, predictions: Predictions, scores: Scores) -> list[Section]:
    """Sections for ``report.html``."""
    relations = list(predictions.relations)
    classes = predictions.classes()[FUSED]
    shown = [
        Section(
            "Is it the views, or the boxes alone?",
            "The same probe on the fused embedding and on its parts. Differences are paired, and their "
            "intervals are over pictures.",
            [_controls(scores, prefix) for prefix in _kinds(scores)] + [_differences(scores)],
        ),
        Section(
            "Confusion of relations",
            "Rows are true relations, columns those that the fused probe predicts.",
            [_confusion(predictions.truth, classes, relations)],
        ),
    ]
    if PAIR in scores.estimates:
        e = scores.estimates[PAIR]
        row = [
            "own partner is nearest",
            e.value,
            e.low,
            e.high,
            e.chance,
            e.protocol["gallery"],
            e.protocol["pairs"],
        ]
        shown.append(
            Section(
                "Pair retrieval: a different question",
                "Which of a batch of pairs of boxes belongs to these crops? An encoder that knows the relation and "
                "nothing else is bad at this, so that its number cannot be compared with the probe's.",
                [Table(["", "share", "low", "high", "chance", "candidates", "pairs"], [row])],
            )
        )
    pictures = examples(pairs, predictions.truth, classes, tuple(relations))
    shown.append(
        Section(
            "Pairs", "Subject red, object blue; up to two right and two wrong of each relation.", (), pictures
        )
    )
    return shown


def _kinds(scores: Scores) -> list[str]:
    return [prefix for prefix in ("", "with_photo/") if f"{prefix}{FUSED}" in scores.estimates]


def _controls(scores: Scores, prefix: str) -> Table:
    names = {
        "fused embedding, RBF-SVM": FUSED,
        "fused embedding, linear": "linear_probe/accuracy",
        "untrained encoder": "untrained/accuracy",
        "raw features": "raw_features/accuracy",
        "boxes alone": "spatial_only/accuracy",
        "numbers of the boxes, nothing learned": "numbers_only/accuracy",
        "pixels alone": "visual_only/accuracy",
        "names alone": "categories_only/accuracy",
    }
    rows: list[list[object]] = []
    for words, metric in names.items():
        e = scores.estimates.get(f"{prefix}{metric}")
        if e is not None:
            rows.append([words, e.value, e.low, e.high])
    e = scores.estimates[f"{prefix}{FUSED}"]
    rows.append(["always the most frequent relation", e.chance, None, None])
    which = "pairs with a photo" if prefix else "all pairs"
    return Table(["", "accuracy", "low", "high"], rows, f"{which}: {e.protocol['pairs']} in {e.n} pictures")


def _differences(scores: Scores) -> Table:
    rows = [
        [f"fused − {row['minus']}", row["pairs"], row["difference"], row["low"], row["high"], row["verdict"]]
        for prefix in _kinds(scores)
        for row in differences(scores, prefix)
    ]
    return Table(["", "pairs", "difference in accuracy", "low", "high", "the fused probe is"], rows)


def _confusion(truth: np.ndarray, predicted: np.ndarray, relations: Sequence[str]) -> Table:
    table = confusion(predicted, truth, len(relations))
    rows = [[name, *counts.tolist()] for name, counts in zip(relations, table, strict=True)]
    return Table(["true ↓ predicted →", *relations], rows, shaded=True)
