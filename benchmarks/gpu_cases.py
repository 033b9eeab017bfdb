"""Every loss, direction and mask as one call on a given device, against the same call in float64 on the CPU.

``benchmarks/gpu.py`` runs them on a card, and a test on a second device that computes on the CPU. Each is computed as
one tile and as many; half-precision embeddings are rounded first, so that both ways see the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nearfar import functional as F
from nearfar.contrast import SameClass, Weights, tiles
from nearfar.losses import (
    AdaptiveScoreContrastiveLoss,
    BidirectionalScoreContrastiveLoss,
    ClipLoss,
    CrossBatchMemory,
    DistillationLoss,
    DuplicateMask,
    FocalLoss,
    GuideMask,
    IndexMask,
    InfoNCELoss,
    MarginMSELoss,
    MatryoshkaLoss,
    MultiLabelSupConLoss,
    NegativeWeights,
    Objective,
    PairMask,
    SigLipLoss,
    SimilarityMask,
    SpatialLoss,
    SupConLoss,
    ViewContext,
    ViewLoss,
    WassersteinGapLoss,
    duplicate_mask,
    explain_batch,
    false_negative_mask,
    target_loss,
)

__all__ = ["CASES", "Data", "Difference", "Outcome", "data", "difference", "outcome", "tolerance", "truth"]

#: arguments that are embeddings: rounded to the dtype of a check, and judged by their gradients
LEARNING = ("a", "b", "more", "scale", "bias", "negatives", "mined", "logits", "low", "high")


@dataclass
class Data:
    """A batch with everything that some loss wants to know; ``b`` is a noisy copy of ``a``."""

    a: Tensor
    b: Tensor
    more: Tensor
    scale: Tensor
    bias: Tensor
    negatives: Tensor
    mined: Tensor
    logits: Tensor
    low: Tensor
    high: Tensor
    labels: Tensor
    some_labels: Tensor
    classes: Tensor
    multi_hot: Tensor
    codes: Tensor
    scores: Tensor
    neighbors: Tensor
    alpha: Tensor
    items: Tensor
    marked: Tensor
    left_out: Tensor
    left_out_more: Tensor
    guide: Tensor
    other_guide: Tensor
    weights: Tensor
    positives: Tensor
    margins: Tensor


def data(n: int, d: int, seed: int = 0) -> Data:
    """Random rows in float64 on the CPU; classes of about four rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def whole(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    a, guide = draw(n, d), draw(n, 5)
    labels = whole(max(2, n // 4), n)
    return Data(
        a=a, b=a + 0.7 * draw(n, d), more=torch.cat([a + draw(n, d), draw(7, d)]), scale=torch.tensor(12.0).double(),
        bias=torch.tensor(-5.0).double(), negatives=draw(11, d), mined=draw(n, 3, d), logits=draw(n, 4),
        low=draw(n), high=draw(n + 3), labels=labels,
        some_labels=torch.where(torch.arange(n) % 5 == 0, -1, labels), classes=whole(4, n),
        multi_hot=(draw(n, 6) > 0.5).double(), codes=whole(3, n, 4), scores=draw(n), neighbors=whole(n, n, 3, low=-1),
        alpha=draw(n, 3).abs(), items=torch.arange(n), marked=whole(n, n, 2, low=-1),
        left_out=draw(n, n) > 1.0, left_out_more=draw(n, n + 7) > 1.0, guide=guide, other_guide=guide + draw(n, 5),
        weights=draw(n, n).sigmoid(), positives=draw(n, n) > 1.0, margins=draw(n, 3),
    )  # fmt: skip


def _diagonal_in(mask: Tensor) -> Tensor:
    return mask & ~torch.eye(*mask.shape, dtype=torch.bool, device=mask.device)


def _memory(x: Data) -> CrossBatchMemory:
    memory = CrossBatchMemory(20, x.a.shape[1], ids=True).to(x.a.device)
    memory.push(x.negatives, x.labels[: len(x.negatives)])
    return memory


def _views(**options: object) -> Callable[[Data], Tensor]:
    def call(x: Data) -> Tensor:
        context = ViewContext(
            groups={"first": x.some_labels}, guides={"first": x.guide, "second": x.other_guide}, guide_margin=0.1,
            reference=x.guide, threshold=0.95, items=x.items, excluded=x.marked, labels=x.labels,
            present={"third": x.labels > 0},
        )  # fmt: skip
        loss = ViewLoss(**options)  # type: ignore[arg-type]
        value: Tensor = loss({"first": x.a, "second": x.b}, context, scale=x.scale)
        loss.record()
        return value

    return call


def _queue(x: Data) -> Tensor:
    loss = WassersteinGapLoss(queue_size=16).to(x.low.device)
    loss(x.low.detach(), x.high.detach())
    return _recorded(loss, x.low, x.high)


def _recorded(loss: nn.Module, *arguments: object, **named: object) -> Tensor:
    """The value, after its record has been read."""
    value: Tensor = loss(*arguments, **named)
    record = loss.record
    if record is not None and hasattr(record, "to_dict"):
        record.to_dict()
    return value


def _objective(x: Data) -> Tensor:
    objective = Objective({"one": 0.3, "two": 1.0})
    total: Tensor = objective({"one": F.info_nce(x.a, x.b), "two": F.focal_loss(x.logits, x.classes)}, on=x.a)
    objective.record.to_dict()  # type: ignore[union-attr]
    return total


def _explained(x: Data) -> Tensor:
    explained = explain_batch(x.a, x.b, masks={"same": DuplicateMask(x.labels)}, k=2, rows=[0])
    return torch.tensor(explained[0].p_positive, dtype=torch.float64)


def _after(x: Data) -> Tensor:
    return target_loss(x.a, None, Weights(torch.diag(x.scores[1:].abs(), 1)), temperature=0.5)[0]


def _parts(x: Data) -> Tensor:
    half = len(x.a) // 2
    parts = [F.info_nce(x.a, x.b, scale=x.scale, rows=part) for part in (slice(0, half), slice(half, None))]
    return parts[0] + parts[1]


def _info(**options: object) -> Callable[[Data], Tensor]:
    return lambda x: _recorded(InfoNCELoss(**options), x.a, x.b)  # type: ignore[arg-type]


def _masked(mask: Callable[[Data], object], **options: object) -> Callable[[Data], Tensor]:
    return lambda x: _recorded(InfoNCELoss(**options), x.a, x.b, mask=mask(x), scale=x.scale)  # type: ignore[arg-type]


def _spatial(**options: object) -> Callable[[Data], Tensor]:
    return lambda x: _recorded(SpatialLoss(**options), x.a, x.b, x.scale, x.neighbors, x.alpha)  # type: ignore[arg-type]


def _supcon(**options: object) -> Callable[[Data], Tensor]:
    return lambda x: _recorded(SupConLoss(**options), x.a, x.labels)  # type: ignore[arg-type]


CASES: dict[str, Callable[[Data], Tensor]] = {
    "InfoNCE": _info(),
    "InfoNCE, scale that learns": lambda x: _recorded(InfoNCELoss(), x.a, x.b, scale=x.scale),
    "InfoNCE, temperature 0.01": _info(temperature=0.01),
    "InfoNCE, temperature 0.002": _info(temperature=0.002),
    "InfoNCE, one direction": _info(symmetric=False),
    "InfoNCE, further keys": lambda x: F.info_nce(x.a, x.more, symmetric=False, scale=x.scale),
    "InfoNCE, further keys, mask": lambda x: F.info_nce(
        x.a, x.more, symmetric=False, mask=x.left_out_more, scale=x.scale
    ),
    "InfoNCE, dot products": lambda x: F.info_nce(x.a, x.b, normalize=False, temperature=3.0),
    "InfoNCE, parts of the rows": _parts,
    "InfoNCE, sum": _info(reduction="sum"),
    "InfoNCE, each row": _info(reduction="none"),
    "InfoNCE, decoupled": _info(denominator="negatives"),
    "InfoNCE, debiased": _info(tau_plus=0.02, temperature=0.3),
    "InfoNCE, hard weighted": _info(beta=0.5),
    "InfoNCE, Boolean mask": _masked(lambda x: x.left_out),
    "InfoNCE, one direction, Boolean mask": _masked(lambda x: x.left_out, symmetric=False),
    "InfoNCE, same labels left out": _masked(lambda x: DuplicateMask(x.some_labels)),
    "InfoNCE, similar left out": _masked(lambda x: SimilarityMask(x.guide, 0.5)),
    "InfoNCE, neighbours left out": _masked(lambda x: IndexMask(x.neighbors)),
    "InfoNCE, marked pairs left out": _masked(lambda x: PairMask(x.items, x.marked)),
    "InfoNCE, guided": _masked(lambda x: GuideMask(x.guide, x.other_guide, 0.05)),
    "InfoNCE, softly guided": _masked(lambda x: GuideMask(x.guide, x.other_guide, softness=0.1)),
    "InfoNCE, weights of negatives": _masked(lambda x: NegativeWeights(x.weights)),
    "InfoNCE, masks joined": _masked(lambda x: DuplicateMask(x.labels) | x.left_out),
    "InfoNCE, false negatives left out": _masked(lambda x: false_negative_mask(x.guide, 0.8)),
    "InfoNCE, duplicates left out": _masked(lambda x: duplicate_mask(x.labels)),
    "InfoNCE, further negatives": lambda x: _recorded(
        InfoNCELoss(), x.a, x.b, scale=x.scale, negatives=(x.negatives, x.negatives.flip(0))
    ),
    "InfoNCE, mined negatives": lambda x: _recorded(
        InfoNCELoss(symmetric=False), x.a, x.b, negatives=x.mined, negatives_mask=x.mined[..., 0] > 1.0
    ),
    "InfoNCE, memory alone": lambda x: F.info_nce(
        x.a, x.b, symmetric=False, in_batch=False, negatives=x.negatives
    ),
    "memory with ids": lambda x: F.info_nce(
        x.a,
        x.b,
        symmetric=False,
        negatives=(m := _memory(x)).rows().to(x.a.dtype),
        negatives_mask=m.same(x.labels),
    ),
    "CLIP": lambda x: _recorded(ClipLoss(), x.a, x.b, x.scale),
    "CLIP, clamped": lambda x: _recorded(ClipLoss(max_scale=5.0), x.a, x.b, x.scale),
    "SigLIP": lambda x: _recorded(SigLipLoss(), x.a, x.b, x.scale, x.bias),
    "SigLIP, mask": lambda x: _recorded(SigLipLoss(), x.a, x.b, x.scale, x.bias, mask=x.left_out),
    "SigLIP, numbers": lambda x: F.siglip(x.a, x.b, 10.0, -10.0),
    "SupCon": _supcon(),
    "SupCon, sum inside": _supcon(sum="inside"),
    "SupCon, own denominator": _supcon(denominator="own"),
    "SupCon, decoupled": _supcon(denominator="negatives"),
    "SupCon, each row": _supcon(reduction="none"),
    "SupCon, labels missing": lambda x: _recorded(SupConLoss(), x.a, x.some_labels),
    "SupCon, mask": lambda x: _recorded(SupConLoss(), x.a, x.labels, mask=x.left_out),
    "SupCon, two views": lambda x: _recorded(SupConLoss(), x.a, x.labels, other=x.b),
    "SupCon, two views, partner left out": lambda x: _recorded(
        SupConLoss(own_pair=False), x.a, x.labels, x.b
    ),
    "SupCon, memory": lambda x: _recorded(
        SupConLoss(), x.a, x.labels, memory=x.negatives, memory_labels=x.labels[: len(x.negatives)]
    ),
    "SupCon, memory alone": lambda x: _recorded(
        SupConLoss(in_batch=False),
        x.a,
        x.labels,
        memory=x.negatives,
        memory_labels=x.labels[: len(x.negatives)],
    ),
    "SupCon, positives by a matrix": lambda x: _recorded(SupConLoss(), x.a, positives=x.positives),
    "SupCon, own, positives by a matrix": lambda x: _recorded(
        SupConLoss(denominator="own"), x.a, positives=x.positives
    ),
    "SupCon, parts of the rows": lambda x: F.supcon(x.a, x.labels, rows=slice(1, len(x.a) // 2)),
    "multi-label, Jaccard": lambda x: _recorded(MultiLabelSupConLoss(), x.a, x.multi_hot),
    "multi-label, Jaccard, part of the rows": lambda x: F.multi_label_supcon(
        x.a, x.multi_hot, rows=slice(0, len(x.a) // 2)
    ),
    "multi-label, legacy": lambda x: _recorded(MultiLabelSupConLoss(weights="legacy"), x.a, x.codes),
    "spatial": _spatial(),
    "spatial, without regulariser": _spatial(temp_reg_weight=0.0),
    "spatial, neighbours as positives": _spatial(neighbors="positive"),
    "spatial, neighbours left out": _spatial(neighbors="mask"),
    "spatial, none": _spatial(neighbors="none"),
    "spatial, part of the rows": lambda x: F.spatial(
        x.a, x.b, x.scale, x.neighbors, x.alpha, temp_reg_weight=0.0, rows=slice(1, len(x.a) // 2)
    ),
    "scores": lambda x: _recorded(AdaptiveScoreContrastiveLoss(), x.a, x.scores),
    "scores, middle as negatives": lambda x: _recorded(
        AdaptiveScoreContrastiveLoss(middle="negatives", threshold=0.0), x.a, x.scores
    ),
    "scores, both": lambda x: _recorded(BidirectionalScoreContrastiveLoss(), x.a, x.scores),
    "distillation, vectors": lambda x: _recorded(DistillationLoss(), x.a, x.b, (x.guide, x.other_guide)),
    "distillation, scores": lambda x: _recorded(DistillationLoss(), x.a, x.b, x.weights, scale=x.scale),
    "distillation, candidates of each row": lambda x: _recorded(DistillationLoss(), x.a, x.mined, x.margins),
    "margin MSE": lambda x: _recorded(MarginMSELoss(), x.a, x.b, x.mined, x.margins),
    "focal": lambda x: _recorded(FocalLoss(2.0), x.logits, x.classes),
    "focal, weights of classes": lambda x: _recorded(
        FocalLoss(1.0, alpha=torch.ones(4)).to(x.logits.device), x.logits, x.classes
    ),
    "Wasserstein gap": lambda x: _recorded(WassersteinGapLoss(), x.low, x.high),
    "Wasserstein gap, interpolated": lambda x: _recorded(
        WassersteinGapLoss("interpolated", detach_upper=False), x.low, x.high
    ),
    "Wasserstein gap, queue": _queue,
    "Matryoshka": lambda x: _recorded(MatryoshkaLoss(InfoNCELoss(), [3, x.a.shape[1]]), x.a, x.b),
    "objective": _objective,
    "views": _views(),
    "views, classes": _views(name="supcon"),
    "views, distilled": _views(distill=0.5),
    "target of one's own": _after,
    "target of classes, both directions": lambda x: target_loss(
        x.a, x.b, SameClass(x.labels), both=True, scale=x.scale
    )[0],
    "batch explained": _explained,
}  # fmt: skip


class Outcome(NamedTuple):
    """A value and the gradients of what learns, in float64 on the CPU."""

    value: Tensor
    gradients: dict[str, Tensor]


class Difference(NamedTuple):
    """How far an outcome is from the truth: of the value relative to the larger of it and 1, of the gradients the
    largest norm of a difference relative to the norm, and of which tensor."""

    value: float
    gradient: float
    tensor: str

    def within(self, name: str, dtype: torch.dtype) -> bool:
        """Whether rounding explains it."""
        value, gradient = tolerance(name, dtype)
        return self.value <= value and self.gradient <= gradient  # NaN is not


def outcome(
    name: str, x: Data, device: str, dtype: torch.dtype, tile: tuple[int, int] | None = None
) -> Outcome:
    """One case on a device; ``tile``: in tiles of this size, and not as one matrix."""
    with tiles_of(tile):
        return _outcome(CASES[name], x, device, dtype)


def truth(name: str, x: Data, dtype: torch.dtype) -> Outcome:
    """The same in float64 on the CPU, of numbers that are rounded to the dtype first."""
    given = {each.name: getattr(x, each.name) for each in fields(Data)}
    for key in LEARNING:
        if given[key].ndim:
            given[key] = given[key].to(dtype).double()
    return _outcome(CASES[name], Data(**given), "cpu", torch.float64)


def difference(ours: Outcome, true: Outcome) -> Difference:
    """Of two outcomes of one case."""
    by_value = ((ours.value - true.value).abs() / true.value.abs().clamp(min=1.0)).max().item()
    if ours.gradients.keys() != true.gradients.keys():
        missing = ours.gradients.keys() ^ true.gradients.keys()
        return Difference(by_value, math.inf, f"only one has a gradient: {', '.join(sorted(missing))}")
    worst, where = 0.0, ""
    for key, gradient in true.gradients.items():
        error = (ours.gradients[key] - gradient).norm().item() / max(gradient.norm().item(), 1e-3)
        if not error <= worst:  # NaN too
            worst, where = error, key
    return Difference(by_value, worst, where)


def _outcome(call: Callable[[Data], Tensor], x: Data, device: str, dtype: torch.dtype) -> Outcome:
    given = {}
    for each in fields(Data):
        tensor = getattr(x, each.name)
        if tensor.is_floating_point():
            # Scale and bias stay in full precision in every training loop.
            tensor = tensor.to(dtype if each.name in LEARNING and tensor.ndim else max_dtype(dtype))
        given[each.name] = tensor.detach().to(device, copy=True).requires_grad_(each.name in LEARNING)
    value = call(Data(**given))
    if value.requires_grad:
        value.sum().backward()
    gradients = {name: given[name].grad for name in LEARNING}
    return Outcome(
        value.detach().to("cpu").double(),
        {name: each.to("cpu").double() for name, each in gradients.items() if each is not None},
    )


def max_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least single precision."""
    return torch.promote_types(dtype, torch.float32)


def tolerance(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference of value and gradient that rounding explains. Half-precision embeddings are computed in
    single precision, and only their gradients are rounded to half. Small temperatures multiply what a cosine lacks."""
    if dtype == torch.float64:
        return 1e-9, 1e-7
    sharp = 20.0 if "temperature 0.0" in name else 1.0
    gradient = {torch.float32: 5e-4, torch.float16: 4e-3}.get(dtype, 2e-2)
    return 4e-5 * sharp, max(gradient, 5e-4 * sharp)


@contextmanager
def tiles_of(size: tuple[int, int] | None) -> Iterator[None]:
    """Every loss off the CPU in tiles of this size."""
    if size is None:
        yield
        return
    before = tiles.ACCELERATOR_TILE, tiles.ACCELERATOR_DENSE_MAX_PAIRS
    tiles.ACCELERATOR_TILE, tiles.ACCELERATOR_DENSE_MAX_PAIRS = size, 0
    try:
        yield
    finally:
        tiles.ACCELERATOR_TILE, tiles.ACCELERATOR_DENSE_MAX_PAIRS = before
