"""Sections of the report: patches with the spots retrieved for them, metrics by slide, a gene in space."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from nearfar.data.files import Json
from nearfar.data.slides.tissue import Tissue
from nearfar.metrics import paired_difference
from nearfar.metrics.correlation import pearson
from nearfar.towers.expression import gene_sentences
from nearfar.training.sections import Picture, Section, Table, retrieval_examples

if TYPE_CHECKING:
    from nearfar.systems.tissue.evaluation import Evaluator

__all__ = ["examples", "gene_map", "sections"]

_NAMES = 8  # genes named beside a patch
_LOW, _HIGH = np.array([247.0, 247.0, 240.0]), np.array([122.0, 4.0, 80.0])


def examples(
    tissue: Tissue, genes: Sequence[str], images: Float[Tensor, "n d"], vectors: Float[Tensor, "n d"]
) -> list[Json]:
    """Patches with the spots retrieved for them: right, nearly, wrong."""

    def query(spot: int) -> Json:
        return {"text": tissue.ids[spot], "svg": _patch(tissue.patches[spot])}

    def item(spot: int) -> Json:
        names = gene_sentences(tissue.expression[[spot]], genes, _NAMES)[0]
        return query(spot) | {"text": f"{tissue.ids[spot]}: {names}"}

    return retrieval_examples(images, vectors, query, item)


def sections(evaluator: Evaluator, outputs: Mapping[str, Tensor], split: str) -> list[Section]:
    """Slide by slide, against ridge regression on colour, and the best predicted gene over a slide."""
    evaluation = evaluator.evaluate(outputs, split, final=True)
    slides = cast(Mapping[str, Mapping[str, float]], evaluation.facts["slides"])
    tissue = evaluator.data.splits[split]
    counts = {name: int((tissue.slides == at).sum()) for at, name in enumerate(tissue.slide_names)}
    metrics = [name for name in slides if not name.endswith("MRR")]
    table = Table(
        ["slide", "spots", *(name.replace("/", " · ").replace("_", " ") for name in metrics)],
        [
            [slide, counts[slide], *(slides[name].get(slide) for name in metrics)]
            for slide in tissue.slide_names
        ],
        caption="Each slide by itself: its own spots are the gallery; chance of R@k is k over the spots.",
    )
    rows = []
    for baseline, values in evaluator.values_of_ridge(split).items():
        name = baseline.removeprefix("ridge/")
        own, ridge = evaluation.estimates[name], evaluation.estimates[baseline]
        apart = paired_difference(evaluation.per_item[name], values, metric=name)
        difference = f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"
        rows.append([name.split("/")[1], f"{own:.3f}", f"{ridge:.3f}", difference])
    beside = Table(
        ["genes", "by retrieval", "ridge on colour", "difference over spots"],
        rows,
        caption="Mean gene-wise Pearson correlation. Spots side by side are not independent, so that intervals over "
        "the spots of one slide are too narrow for a different slide.",
    )
    return [Section("Slides", tables=[table, beside]), _best_gene(evaluator, outputs, split)]


def _best_gene(evaluator: Evaluator, outputs: Mapping[str, Tensor], split: str) -> Section:
    tissue = evaluator.data.splits[split]
    genes = evaluator.genes["variable"]
    predicted = evaluator.retrieved(outputs["images"])[:, genes]
    own = np.flatnonzero(tissue.slides == 0)
    r = np.nan_to_num(pearson(predicted[own], tissue.expression[own][:, genes]), nan=-1.0)
    best = int(r.argmax())
    name, places = evaluator.data.genes[int(genes[best])], tissue.positions[own]
    shown = {
        "measured": tissue.expression[own, genes[best]],
        f"by retrieval, r = {r[best]:.2f}": predicted[own, best],
    }
    pictures = [Picture(gene_map(places, values), caption) for caption, values in shown.items()]
    lead = (
        f"{name} on {tissue.slide_names[0]}: of {len(genes)} genes the one that retrieval predicts best there, and so "
        "no example of the average."
    )
    return Section(f"A gene over a slide: {name}", lead, pictures=pictures)


def gene_map(places: Float[np.ndarray, "n 2"], values: Float[np.ndarray, " n"], size: int = 340) -> str:
    """Spots of a slide in their places, darker where a value is higher, as an SVG element.

    >>> gene_map(np.array([[0.0, 0.0], [1.0, 2.0]]), np.array([0.0, 1.0])).count("<circle")
    2
    """
    low, high = places.min(axis=0), places.max(axis=0)
    scale = size / max(float((high - low).max()), 1e-9)
    at = (places - low) * scale
    radius = 0.45 * size / max(np.sqrt(len(places)), 1.0)
    spread = float(np.ptp(values)) or 1.0
    share = (values - values.min()) / spread
    circles = []
    for (x, y), level in zip(at, share, strict=True):
        red, green, blue = (_LOW + (_HIGH - _LOW) * level).astype(int)
        fill = f"rgb({red},{green},{blue})"
        circles.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}"/>')
    edge = radius + 1
    width, height = (high - low) * scale + 2 * edge
    box = f"{-edge:.1f} {-edge:.1f} {width:.1f} {height:.1f}"
    return f'<svg viewBox="{box}" width="{width:.0f}" height="{height:.0f}">{"".join(circles)}</svg>'


def _patch(patch: UInt8[np.ndarray, "h w 3"], size: int = 112) -> str:
    """A patch as an SVG element."""
    from PIL import Image

    kept = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(patch)).save(kept, "JPEG", quality=85)
    data = escape(base64.b64encode(kept.getvalue()).decode())
    return (
        f'<svg viewBox="0 0 {size} {size}" width="{size}" height="{size}">'
        f'<image width="{size}" height="{size}" href="data:image/jpeg;base64,{data}"/></svg>'
    )
