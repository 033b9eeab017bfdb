"""Supervised contrastive losses: rows of the same class, or with labels in common, are positives of each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast import (
    LabelOverlap,
    Mask,
    SameClass,
    Step,
    Weights,
    computing_dtype,
    dense_softmax,
    softmax_loss,
    uncompiled,
)
from nearfar.contrast.tiles import DENSE_MAX_PAIRS
from nearfar.errors import NearfarError
from nearfar.labels import MISSING, apart, whole_labels
from nearfar.losses.arguments import (
    check_denominator,
    check_flags,
    check_matrices,
    check_part,
    check_reduction,
    check_sum,
    check_temperature,
    check_tensors,
    check_words,
    number,
    ready,
)
from nearfar.losses.base import ONE_VALUE_EACH, ContrastiveLoss, LossTraits, Requires
from nearfar.losses.target import target_loss

__all__ = [
    "MultiLabelOptions",
    "MultiLabelSupConLoss",
    "SupConLoss",
    "SupConOptions",
    "multi_label_supcon",
    "multi_label_supcon_step",
    "supcon",
    "supcon_step",
]


@dataclass(eq=False, repr=False)
class SupConOptions:
    """The options of SupCon, for function and module; ``supcon`` describes them."""

    temperature: float = 0.1
    sum: Literal["outside", "inside"] = "outside"
    normalize: bool = True
    own_pair: bool = True
    denominator: Literal["all", "own", "negatives"] = "all"
    reduction: Literal["mean", "sum", "none"] = "mean"
    in_batch: bool = True

    def check(self) -> None:
        """``NearfarError`` for options that cannot be; the temperature is checked where it is used."""
        check_words(denominator=self.denominator, reduction=self.reduction)
        check_flags(normalize=self.normalize, own_pair=self.own_pair, in_batch=self.in_batch)
        check_sum(self.sum)
        check_denominator(self.denominator)
        check_reduction(self.reduction)


@dataclass(eq=False, repr=False)
class MultiLabelOptions:
    """The options of the multi-label loss, for function and module; ``multi_label_supcon`` describes them."""

    temperature: float = 0.1
    weights: Literal["jaccard", "legacy"] = "jaccard"
    sum: Literal["outside", "inside"] | None = None
    neutral: int = 0
    normalize: bool = True

    def check(self) -> None:
        """``NearfarError`` for options that cannot be; the temperature is checked where it is used."""
        check_words(weights=self.weights)
        check_flags(normalize=self.normalize)
        number("neutral", self.neutral)
        if self.weights not in ("jaccard", "legacy"):
            raise NearfarError(f"weights is {self.weights!r}; it is 'jaccard' or 'legacy'")
        if self.sum is not None:
            check_sum(self.sum)


def supcon(
    z: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"] | None = None,
    *,
    positives: Bool[Tensor, "n m"] | Float[Tensor, "n m"] | None = None,
    temperature: float = 0.1,
    sum: Literal["outside", "inside"] = "outside",
    normalize: bool = True,
    other: Float[Tensor, "n d"] | None = None,
    own_pair: bool = True,
    memory: Float[Tensor, "q d"] | None = None,
    memory_labels: Int[Tensor, " q"] | None = None,
    in_batch: bool = True,
    mask: Bool[Tensor, "n m"] | Mask | None = None,
    denominator: Literal["all", "own", "negatives"] = "all",
    reduction: Literal["mean", "sum", "none"] = "mean",
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""] | Float[Tensor, " queries"]:
    """The supervised contrastive loss (Khosla et al. 2020): all rows of a class are each other's positives.

    ``sum="outside"`` is their L_out: mean over positives p of log Σ_c exp(s_ic) - s_ip, candidates c all rows but i.
    ``sum="inside"`` is log Σ_c exp(s_ic) - log Σ_p exp(s_ip), which the nearest positive alone can satisfy; their L_in
    divides the inner sum by the number of positives, which adds the constant ln(positives). No factor
    temperature / base temperature. Rows without a positive are left out of the mean and counted.

    ``labels`` are whole numbers, −1 (or NaN) where one is missing: such a row is no positive of others and has none but
    its own partner in ``other``; it stays a negative of all.

    ``other`` is a second view of the same rows: candidates are then its rows, in both directions, and
    ``own_pair=False`` takes a row's own partner out of both positives and candidates. ``memory`` adds rows of earlier
    batches as candidates and positives; with ``in_batch=False`` they are the only ones, such as the rows of a
    reference set. ``mask`` leaves out negatives, ``rows`` makes only those rows queries.

    ``positives`` stands in for labels: a matrix (n, candidates), true or what it weighs where column j is a positive
    of row i. Columns are the rows of the batch or of ``other`` (there, and back), then those of ``memory``.

    ``denominator``: "all" candidates; "own", each positive is told apart from the negatives on its own, its sisters
    left out, 1/|P| Σ_p log(1 + Σ_{negatives} exp(s_ic - s_ip)): NT-Xent with several positives, of floor 0 (sum
    outside; memory O(positive pairs)); "negatives" alone, log Σ_{negatives} exp(s_ic) - mean s_ip, decoupled
    contrastive learning (Yeh et al. 2022, arXiv:2110.06848), which goes below 0. Guessing gives ln(negatives + 1) and
    ln(negatives). A row with positives only has 0 in both. ``reduction`` "sum" adds the rows up, "none" gives the
    loss of each row (n,), 0 where it has no positive; of two views, the mean of its two directions.

    Floor: ln(positives) for a sum outside (all positives equal), 0 for a sum inside; guessing gives ln(candidates),
    less ln(positives) for a sum inside.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> round(supcon(z, torch.tensor([0, 0, 1, 1]), temperature=1.0).item(), 4)
    0.5514
    >>> views = torch.cat([z, z])  # SimCLR: two views of each item, and no other class
    >>> round(supcon(views, torch.arange(4).repeat(2), temperature=1.0).item(), 4)
    1.4977
    """
    options = SupConOptions(temperature, sum, normalize, own_pair, denominator, reduction, in_batch)
    return supcon_step(
        z, labels, options, other, positives=positives, memory=memory, memory_labels=memory_labels, mask=mask,
        rows=rows, tile=tile,
    )[0]  # fmt: skip


@uncompiled
def supcon_step(
    z: Tensor,
    labels: Tensor | None,
    options: SupConOptions,
    other: Tensor | None = None,
    *,
    positives: Tensor | None = None,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    mask: Tensor | Mask | None = None,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""] | Float[Tensor, " queries"], Step]:
    """``supcon``, and what its record is made of."""
    factor = 1.0 / check_temperature(options.temperature)
    options.check()
    normalize, in_batch, denominator = options.normalize, options.in_batch, options.denominator
    views = {"z": z, "other": other, "memory": memory}
    check_matrices(**{name: view for name, view in views.items() if view is not None or name == "z"})
    check_part(rows, tile)
    if labels is not None:
        labels = _labels(labels, len(z), "labels", "z")
    inside = check_sum(options.sum)
    if denominator == "own" and inside:
        raise NearfarError(
            "denominator='own' tells each positive apart by itself, so that their sum stands outside the logarithm: "
            "sum='outside'"
        )
    plain = denominator == "all" and options.reduction == "mean" and positives is None
    whole = memory is None and memory_labels is None and mask is None and rows is None and tile is None
    fit = labels is not None and labels.device == z.device and (other is None or len(other) == len(z))
    if plain and whole and labels is not None and fit:
        small = dense_softmax(
            z, other, factor, SameClass(labels), both=other is not None, inside=inside, normalize=normalize,
            without_self=other is None or not options.own_pair,
        )  # fmt: skip
        if small is not None:
            return small[0], small[2]
    # A memory joins rows of unit length, and single pairs are scored beside the kernel.
    raw = normalize and memory is None and denominator != "own"
    score = partial(
        softmax_loss, inside=inside, mask=mask, rows=rows, tile=tile, normalize=raw, unit=normalize and not raw,
        denominator=denominator, reduction=options.reduction,
    )  # fmt: skip
    first, second, scale = ready(z, other, factor, None if raw else normalize, ("z", "other"))
    _check_views(len(first), None if other is None else len(second), memory, in_batch)
    _check_who(labels, positives, memory, memory_labels)
    keys, alone, both = None if other is None else second, in_batch, False
    if memory is not None and len(memory):
        kept = ready(memory, first, 1.0, normalize, ("memory", "z")).a.to(first.dtype)
        keys = torch.cat([first, kept]) if in_batch else kept
    elif other is not None:
        both, alone = True, not options.own_pair
    if positives is not None:
        return score(first, keys, scale, _explicit(positives, first, keys), both=both, without_self=alone)
    assert labels is not None
    labels = labels.to(z.device)
    theirs = None
    if memory is not None and memory_labels is not None:  # an empty memory has no labels either
        theirs = _labels(memory_labels, len(memory), "memory_labels", "memory", len(z)).to(labels.device)
    if keys is not None and theirs is not None:
        same = SameClass(labels, torch.cat([labels, theirs]) if in_batch else theirs)
        return score(first, keys, scale, same, both=both, without_self=alone)
    whole = keys is None and rows is None and mask is None
    if not (whole and z.device.type == "cpu" and len(z) ** 2 > DENSE_MAX_PAIRS):
        return score(first, keys, scale, SameClass(labels), both=both, without_self=alone)
    # In the order of their labels, positives stand together and most tiles hold none.
    labels, order = torch.sort(labels, stable=True)
    loss, step = score(first[order], None, scale, SameClass(labels), both=both, without_self=True)
    return loss if options.reduction != "none" else loss[order.argsort()], step


def _check_views(n: int, others: int | None, memory: Tensor | None, in_batch: bool) -> None:
    """``NearfarError`` unless the candidates are one of: the batch, a second view of it, a memory, batch and memory."""
    if others is not None and others != n:
        raise NearfarError(f"z has {n} rows and other {others}; they are two views of the same rows")
    if memory is not None and others is not None:
        raise NearfarError("memory goes with one view only (other=None)")
    if not in_batch and (memory is None or not len(memory)):
        raise NearfarError(
            "in_batch=False leaves the rows of memory as the only candidates, and there are none; until a memory is "
            "filled, use in_batch=True"
        )


def _check_who(
    labels: Tensor | None,
    positives: Tensor | None,
    memory: Tensor | None,
    memory_labels: Tensor | None,
) -> None:
    """``NearfarError`` unless labels or a matrix say who belongs together."""
    if memory is None and memory_labels is not None:
        raise NearfarError("memory_labels were given without memory, the rows that they belong to")
    if positives is not None:
        if labels is not None or memory_labels is not None:
            raise NearfarError("positives says who belongs together: leave labels and memory_labels out")
        return
    if labels is None:
        raise NearfarError("neither labels nor positives were given; one of them says who belongs together")
    if memory is not None and memory_labels is None:
        raise NearfarError("memory needs memory_labels, one for each of its rows")


def _explicit(positives: Tensor, queries: Tensor, keys: Tensor | None) -> Weights:
    """A matrix of positives as a target."""
    check_tensors(positives=positives)
    if positives.is_complex():
        raise NearfarError(f"positives are {positives.dtype}; true, or what a pair weighs, is needed")
    n, m = len(queries), len(queries if keys is None else keys)
    if positives.shape != (n, m):
        raise NearfarError(
            f"positives are {tuple(positives.shape)}, but there are {n} rows and {m} candidates; a matrix ({n}, {m}) "
            "is needed, true (or a weight) where the column is a positive of the row"
        )
    try:
        return Weights(positives.to(queries))
    except NearfarError as error:
        raise NearfarError(f"positives: {error}") from None


def _labels(labels: Tensor, n: int, name: str, of: str, first: int = 0) -> Tensor:
    """One whole number for each row, and a class of its own for each that is missing."""
    labels = whole_labels(labels, name)
    if labels.shape != (n,):
        raise NearfarError(
            f"{name} are {tuple(labels.shape)} for {n} rows of {of}; one label for each row is needed"
        )
    return apart(labels, first)


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

    An entry of ``labels`` that is −1 (or NaN) is not known, and no row has it in common with this one; a row of such
    entries alone has no positives.

    ``sum`` overrides where the sum stands. Rows that share nothing with any other row are left out and counted. Floor
    for a sum outside: the entropy of Q.

    >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(multi_label_supcon(z, torch.tensor([[1, 0], [1, 1], [0, 1]]), temperature=1.0).item(), 4)
    0.6066
    """
    options = MultiLabelOptions(temperature, weights, sum, neutral, normalize)
    return multi_label_supcon_step(z, labels, options, rows=rows, tile=tile)[0]


@uncompiled
def multi_label_supcon_step(
    z: Tensor,
    labels: Tensor,
    options: MultiLabelOptions,
    *,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Step]:
    """``multi_label_supcon``, and what its record is made of."""
    check_temperature(options.temperature)
    check_matrices(z=z)
    options.check()
    check_part(rows, tile)
    labels = whole_labels(labels)
    if labels.ndim != 2 or len(labels) != len(z):
        raise NearfarError(
            f"labels are {tuple(labels.shape)} for {len(z)} rows of z; one row of labels for each is needed"
        )
    if labels.shape[1] == 0:
        raise NearfarError("labels have no column; at least one label or aspect is needed")
    labels, dtype = labels.to(z.device), computing_dtype(z)
    if options.weights == "jaccard":
        labels = labels.masked_fill(labels == MISSING, 0)
        if z.device.type == "cpu" and not torch.equal(labels * labels, labels):
            raise NearfarError(
                "labels for weights='jaccard' are multi-hot, 0 or 1; codes of polarities are for weights='legacy'"
            )
        target = LabelOverlap(labels.to(dtype))
    else:
        target = _legacy(labels, options.neutral, dtype)
    return target_loss(
        z,
        None,
        target,
        temperature=options.temperature,
        sum=options.sum or ("outside" if options.weights == "jaccard" else "inside"),
        normalize=options.normalize,
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


@dataclass(eq=False, repr=False)
class SupConLoss(SupConOptions, ContrastiveLoss):
    """All rows of the same class are each other's positives (Khosla et al. 2020).

    ``sum="outside"`` (their L_out) asks for all positives, ``"inside"`` is content with the nearest. Called with
    embeddings (n, d) and labels (n,). ``other`` is a second view of the same rows to contrast with,
    ``own_pair=False`` then leaves out a row's own partner; ``memory`` and ``memory_labels`` add rows of earlier
    batches; with ``in_batch=False`` these are the only candidates. ``positives``, a matrix, stands in for labels.
    ``denominator="own"`` is NT-Xent with several positives, ``"negatives"`` decoupled contrastive learning;
    ``reduction`` is "mean", "sum" or "none", the loss of each row.
    ``nearfar.losses.supcon`` has the definitions.

    Floor: ln(positives) outside, 0 inside. Guessing: ln(candidates), less ln(positives) for a sum inside. Rows
    without a positive are left out and counted; a batch without any is 0 and warns. A row whose label is missing (−1
    or NaN) is such a row, and a negative of all others.

    >>> import torch
    >>> loss = SupConLoss()
    >>> value = loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
    >>> loss.record.positives_per_row, loss.record.candidates
    (1.0, 7.0)
    """

    traits: ClassVar[LossTraits] = LossTraits(
        "softmax",
        "class",
        rows=("z", "labels", "other"),
        further=("memory", "memory_labels"),
        pairs=("mask", "positives"),
        local=(Requires("reduction", ("mean", "sum"), ONE_VALUE_EACH),),
    )

    def __post_init__(self) -> None:
        self.temperature = check_temperature(self.temperature)
        self.check()

    def forward(
        self,
        z: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"] | None = None,
        other: Float[Tensor, "n d"] | None = None,
        memory: Float[Tensor, "q d"] | None = None,
        memory_labels: Int[Tensor, " q"] | None = None,
        mask: Bool[Tensor, "n m"] | Mask | None = None,
        rows: slice | None = None,
        positives: Bool[Tensor, "n m"] | Float[Tensor, "n m"] | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, " queries"]:
        step = supcon_step(
            z, labels, self, other, positives=positives, memory=memory, memory_labels=memory_labels, mask=mask,
            rows=rows,
        )  # fmt: skip
        return self.keep(*step, mask is not None)


@dataclass(eq=False, repr=False)
class MultiLabelSupConLoss(MultiLabelOptions, ContrastiveLoss):
    """Rows with labels in common belong together as far as they have them in common.

    ``weights="jaccard"``: called with embeddings and multi-hot labels (n, labels). ``weights="legacy"``: with codes
    (n, aspects), where ``neutral`` also stands for absent. ``nearfar.losses.supcon`` has the
    definitions, and why to prefer Jaccard.

    Floor: the mean entropy of the target (sum outside), -ln of the largest weight (inside); ``record.floor`` has it
    for the batch. Guessing: ln(candidates), less ln(Σ weights) for a sum inside.

    >>> import torch
    >>> loss = MultiLabelSupConLoss()
    >>> value = loss(torch.eye(3), torch.tensor([[1, 0], [1, 1], [0, 0]]))
    >>> loss.record.rows_without_positives
    1.0
    """

    traits: ClassVar[LossTraits] = LossTraits("softmax", "overlap", rows=("z", "labels"), local=())

    def __post_init__(self) -> None:
        self.temperature = check_temperature(self.temperature)
        self.check()

    def forward(
        self,
        z: Float[Tensor, "n d"],
        labels: Int[Tensor, "n labels"],
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        return self.keep(*multi_label_supcon_step(z, labels, self, rows=rows))
