"""The supervised contrastive loss of rows with several labels: as far as they have labels in common they belong
together."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.contrast import LabelOverlap, Step, computing_dtype, few_rows, softmax_loss, uncompiled
from nearfar.errors import NearfarError
from nearfar.functional.arguments import (
    check_flags,
    check_matrices,
    check_part,
    check_temperature,
    check_words,
    number,
    ready,
)
from nearfar.functional.supcon import inside_of
from nearfar.labels import MISSING, whole_labels

__all__ = ["multi_label_supcon", "multi_label_supcon_step"]


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

    An entry of ``labels`` that is −1 (or NaN) is not known, and nobody has it in common with the row; a row of such
    entries alone has no positives.

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
    check_matrices(z=z)
    check_words(weights=weights, **({} if sum is None else {"sum": sum}))
    check_flags(normalize=normalize)
    check_part(rows, tile)
    labels = whole_labels(labels)
    if labels.ndim != 2 or len(labels) != len(z):
        raise NearfarError(
            f"labels are {tuple(labels.shape)} for {len(z)} rows of z; one row of labels for each is needed"
        )
    if labels.shape[1] == 0:
        raise NearfarError("labels have no column; at least one label or aspect is needed")
    labels, dtype = labels.to(z.device), computing_dtype(z)
    if weights == "jaccard":
        labels = labels.masked_fill(labels == MISSING, 0)
        if z.device.type == "cpu" and not torch.equal(labels * labels, labels):
            raise NearfarError(
                "labels for weights='jaccard' are multi-hot, 0 or 1; codes of polarities are for weights='legacy'"
            )
        target, inside = LabelOverlap(labels.to(dtype)), inside_of(sum or "outside")
    elif weights == "legacy":
        target, inside = _legacy(labels, number("neutral", neutral), dtype), inside_of(sum or "inside")
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


def _legacy(codes: Tensor, neutral: float, dtype: torch.dtype) -> LabelOverlap:
    """Matches are dot products of one-hot codes; those that are not neutral count twice."""
    kinds, where = torch.unique(codes, return_inverse=True)
    hot = torch.nn.functional.one_hot(where, len(kinds)).to(dtype)
    twice = (kinds != neutral).to(dtype).repeat(codes.shape[1])
    missing = codes == MISSING
    offset = 0.1
    if bool((kinds == MISSING).any()):  # a code that is not known matches none
        hot = hot.masked_fill(missing.unsqueeze(2), 0.0)
    hot = hot.flatten(1) * ((1 + twice) / (2 * codes.shape[1])).sqrt()
    unknown = missing.all(1)
    if bool(
        unknown.any()
    ):  # what all pairs have in common, as a label that rows of which nothing is known lack
        hot = torch.cat([hot, (~unknown).to(dtype).unsqueeze(1) * offset**0.5], 1)
        offset = 0.0
    return LabelOverlap(hot, jaccard=False, offset=offset)
