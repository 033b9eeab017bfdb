"""Supervised contrastive losses: rows of the same class, or with labels in common, belong together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast import (
    LabelOverlap,
    Mask,
    SameClass,
    Step,
    computing_dtype,
    few_rows,
    softmax_loss,
    uncompiled,
)
from nearfar.contrast.tiles import KEPT
from nearfar.errors import NearfarError
from nearfar.functional.arguments import check_temperature, check_tensors, ready

__all__ = ["inside_of", "multi_label_supcon", "multi_label_supcon_step", "supcon", "supcon_step"]


def supcon(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    temperature: float = 0.1,
    sum: Literal["outside", "inside"] = "outside",
    normalize: bool = True,
    other: Float[Tensor, "n d"] | None = None,
    own_pair: bool = True,
    memory: Float[Tensor, "q d"] | None = None,
    memory_labels: Int[Tensor, " q"] | None = None,
    mask: Bool[Tensor, "n n"] | Mask | None = None,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""]:
    """The supervised contrastive loss (Khosla et al. 2020): all rows of a class are each other's positives.

    ``sum="outside"`` is their L_out: mean over positives p of log Σ_c exp(s_ic) - s_ip, candidates c all rows but i.
    ``sum="inside"`` is log Σ_c exp(s_ic) - log Σ_p exp(s_ip), which the nearest positive alone can satisfy; their L_in
    divides the inner sum by the number of positives, which adds the constant ln(positives). No factor
    temperature / base temperature. Rows without a positive are left out of the mean and counted.

    ``other`` is another view of the same rows: candidates are then its rows, in both directions, and
    ``own_pair=False`` takes a row's own partner out of both positives and candidates. ``memory`` adds rows of earlier
    batches as candidates and positives. ``mask`` leaves out negatives, ``rows`` makes only those rows queries.

    Floor: ln(positives) for a sum outside (all positives equal), 0 for a sum inside; guessing gives ln(candidates),
    less ln(positives) for a sum inside.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> round(supcon(z, torch.tensor([0, 0, 1, 1]), temperature=1.0).item(), 4)
    0.5514
    """
    return supcon_step(
        z, labels, temperature, sum, normalize, other, own_pair, memory, memory_labels, mask, rows, tile
    )[0]


@uncompiled
def supcon_step(
    z: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    sum: str = "outside",
    normalize: bool = True,
    other: Tensor | None = None,
    own_pair: bool = True,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    mask: Tensor | Mask | None = None,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Step]:
    """``supcon``, and what its record is made of."""
    factor = 1.0 / check_temperature(temperature)
    inside = inside_of(sum)
    whole = memory is None and memory_labels is None and mask is None and rows is None and tile is None
    if whole and _fit(z, other, labels):
        few = few_rows(
            z, other, factor, SameClass(labels), both=other is not None, inside=inside, normalize=normalize,
            without_self=other is None or not own_pair,
        )  # fmt: skip
        if few is not None:
            return few[0], few[2]
    # A memory joins rows of unit length.
    raw = normalize and memory is None
    options: dict[str, Any] = {"inside": inside, "mask": mask, "rows": rows, "tile": tile}
    options |= {"normalize": raw, "unit": normalize and not raw}
    first, second, scale = ready(z, other, factor, None if raw else normalize, ("z", "other"))
    if memory is None and memory_labels is not None:
        raise NearfarError("memory_labels were given without memory, the rows that they belong to")
    _check_labels(labels, len(z), "labels", "z")
    labels = labels.to(z.device)
    if memory is not None:
        if other is not None or memory_labels is None:
            raise NearfarError("memory needs memory_labels, and goes with one view only (other=None)")
        _check_labels(memory_labels, len(memory), "memory_labels", "memory")
    if memory is not None and memory_labels is not None and len(memory):
        kept = ready(memory, first, 1.0, normalize, ("memory", "z")).a
        keys = torch.cat([first, kept.to(first.dtype)])
        target = SameClass(labels, torch.cat([labels, memory_labels.to(labels.device)]))
        return softmax_loss(first, keys, scale, target, without_self=True, **options)
    if other is not None:
        if len(first) != len(second):
            raise NearfarError(
                f"z has {len(first)} rows and other {len(second)}; they are two views of the same rows"
            )
        return softmax_loss(
            first, second, scale, SameClass(labels), both=True, without_self=not own_pair, **options
        )
    if rows is None and mask is None and z.device.type == "cpu" and len(z) ** 2 > KEPT:
        # In the order of their labels, positives stand together and most tiles hold none.
        labels, order = torch.sort(labels, stable=True)
        first = first[order]
    return softmax_loss(first, None, scale, SameClass(labels), without_self=True, **options)


def multi_label_supcon(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, "n labels"],
    *,
    temperature: float = 0.1,
    weights: Literal["jaccard", "legacy"] = "jaccard",
    sum: Literal["outside", "inside"] | None = None,
    neutral: int = 0,
    normalize: bool = True,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""]:
    """A supervised contrastive loss for rows with several labels: positives weigh what they have in common.

    ``weights="jaccard"``: ``labels`` is multi-hot; W_ij = labels of both / labels of either, so that what neither has
    counts for nothing; the sum stands outside the logarithm, with Q_ij = W_ij / Σ_j W_ij. (As SupCon for multi-label
    rows, after Małkiński and Mańdziuk 2022, "Multi-Label Contrastive Learning for Abstract Visual Reasoning".)

    ``weights="legacy"``: ``labels`` are codes, one per aspect; ``neutral`` (0) is the code that also stands for absent
    aspects, every other one a polarity. W_ij = Σ_a match_a (1 + neither is neutral) / (2 A) + 0.1, and the loss is
    -log(Σ_j W_ij exp(s_ij) / Σ_j exp(s_ij)), the sum inside. Agreement about nothing counts as agreement there: a
    collapsed encoder scores -ln(mean W), already near the floor -ln(max W). Prefer Jaccard.

    ``sum`` overrides where the sum stands. Rows that share nothing with another row are left out and counted. Floor
    for a sum outside: the entropy of Q.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(multi_label_supcon(z, torch.tensor([[1, 0], [1, 1], [0, 1]]), temperature=1.0).item(), 4)
    0.6066
    """
    return multi_label_supcon_step(z, labels, temperature, weights, sum, neutral, normalize, rows, tile)[0]


@uncompiled
def multi_label_supcon_step(
    z: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    weights: str = "jaccard",
    sum: str | None = None,
    neutral: int = 0,
    normalize: bool = True,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Step]:
    """``multi_label_supcon``, and what its record is made of."""
    factor = 1.0 / check_temperature(temperature)
    check_tensors(z=z, labels=labels)
    if labels.ndim != 2 or len(labels) != len(z):
        raise NearfarError(
            f"labels are {tuple(labels.shape)} for {len(z)} rows of z; one row of labels for each is needed"
        )
    if labels.shape[1] == 0:
        raise NearfarError("labels have no column; at least one label or aspect is needed")
    labels, dtype = labels.to(z.device), computing_dtype(z)
    if weights == "jaccard":
        if z.device.type == "cpu" and not bool((labels * labels == labels).all()):
            raise NearfarError(
                "labels for weights='jaccard' are multi-hot, 0 or 1; codes of polarities are for weights='legacy'"
            )
        target, inside = LabelOverlap(labels.to(dtype)), inside_of(sum or "outside")
    elif weights == "legacy":
        target, inside = _legacy(labels, neutral, dtype), inside_of(sum or "inside")
    else:
        raise NearfarError(f"weights is {weights!r}; it is 'jaccard' or 'legacy'")
    if rows is None and tile is None:
        few = few_rows(z, None, factor, target, without_self=True, inside=inside, normalize=normalize)
        if few is not None:
            return few[0], few[2]
    first, _, scale = ready(z, None, factor, None if normalize else False, ("z", "z"))
    return softmax_loss(
        first,
        None,
        scale,
        target,
        without_self=True,
        inside=inside,
        normalize=normalize,
        rows=rows,
        tile=tile,
    )


def _legacy(codes: Tensor, neutral: int, dtype: torch.dtype) -> LabelOverlap:
    """Matches are dot products of one-hot codes; those that are not neutral count twice."""
    if codes.dtype.is_floating_point and bool((codes != codes.round()).any()):
        raise NearfarError("labels for weights='legacy' are codes, one whole number for each aspect")
    kinds, where = torch.unique(codes, return_inverse=True)
    hot = torch.nn.functional.one_hot(where, len(kinds)).flatten(1).to(dtype)
    twice = (kinds != neutral).to(dtype).repeat(codes.shape[1])
    return LabelOverlap(hot * ((1 + twice) / (2 * codes.shape[1])).sqrt(), jaccard=False, offset=0.1)


def inside_of(sum: str) -> bool:
    if sum not in ("outside", "inside"):
        raise NearfarError(f"sum is {sum!r}; it stands 'outside' or 'inside' the logarithm")
    return sum == "inside"


def _check_labels(labels: Tensor, n: int, name: str, of: str) -> None:
    check_tensors(**{name: labels})
    if labels.shape != (n,):
        raise NearfarError(
            f"{name} are {tuple(labels.shape)} for {n} rows of {of}; one label for each row is needed"
        )


def _fit(z: Any, other: Any, labels: Any) -> bool:
    """Whether these can be what they should be; if not, the long way says what is wrong."""
    if not all(isinstance(x, Tensor) for x in (z, z if other is None else other, labels)):
        return False
    return (
        labels.shape == z.shape[:1] and (other is None or len(other) == len(z)) and labels.device == z.device
    )
