"""A contrastive loss between the views of items: any number of views, some perhaps missing, with masks by content."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nearfar.arguments import choice, entries, instance, mapping, shown, text
from nearfar.contrast import (
    DuplicateMask,
    GuideMask,
    Mask,
    NegativeWeights,
    NoPositivesWarning,
    PairMask,
    SimilarityMask,
    join_masks,
)
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses.arguments import check_flags, check_matrices, check_sum, check_temperature, number
from nearfar.losses.base import LossTraits
from nearfar.losses.distillation import DistillationLoss, MarginMSELoss
from nearfar.losses.info_nce import InfoNCELoss
from nearfar.losses.matryoshka import check_lengths, term_name
from nearfar.losses.objective import Objective
from nearfar.losses.siglip import SigLipLoss
from nearfar.losses.supcon import SupConLoss

__all__ = ["ViewContext", "ViewLoss", "view_pairs"]

ViewLossName = Literal["infonce", "siglip", "supcon"]


class KeptRows(Protocol):
    """Rows that a memory keeps, oldest first."""

    def rows(self) -> Tensor: ...


class Memory(Protocol):
    """Earlier items as further negatives, as `nearfar.models.views.ViewMemory` keeps them."""

    @property
    def filled(self) -> int: ...

    def keeps(self, view: str) -> bool: ...

    def rows(self, view: str) -> Tensor: ...

    def groups(self, view: str) -> Tensor: ...

    @property
    def vectors(self) -> KeptRows | None: ...


@dataclass
class ViewContext:
    """What is known of the rows of a batch, beside their embeddings.

    ``groups``: for each view numbers that are equal where its value is (−1: unknown), which with ``mask_duplicates``
    are no negatives of each other. ``present``: which rows have a view, for views that some lack. ``reference`` and
    ``threshold``: vectors (b, r) whose cosine, from the threshold on, tells a likely false negative. ``labels``: rows
    of the same label are positives of each other (supcon). ``negatives``: of a view further values (b, k, d) that are
    negatives of their own row.

    ``guides``: of a view a frozen second model's vectors (b, g), by which negatives between two such views are judged
    relative to the own positive (`GuideMask`, with ``guide_margin``, ``guide_kind`` and ``guide_softness``;
    ``guide_margin`` None: none are), and which teach where a loss distils; ``negative_guides`` (b, k, g) are those of
    ``negatives``. ``margins``: of the negatives of a view (b, k) a teacher's score of the own value less theirs.

    ``items`` are numbers of the rows' items, and ``excluded`` (b, k) those that are no negatives of each row (−1:
    none), as somebody marked them (`PairMask`).
    """

    groups: Mapping[str, Int[Tensor, " b"]] = field(default_factory=dict)
    mask_duplicates: bool = True
    present: Mapping[str, Bool[Tensor, " b"]] = field(default_factory=dict)
    reference: Float[Tensor, "b r"] | None = None
    threshold: float | None = None
    labels: Int[Tensor, " b"] | None = None
    negatives: Mapping[str, Float[Tensor, "b k d"]] = field(default_factory=dict)
    guides: Mapping[str, Float[Tensor, "b g"]] = field(default_factory=dict)
    guide_margin: float | None = None
    guide_kind: Literal["absolute", "relative"] = "absolute"
    guide_softness: float = 0.0
    negative_guides: Mapping[str, Float[Tensor, "b k g"]] = field(default_factory=dict)
    margins: Mapping[str, Float[Tensor, "b k"]] = field(default_factory=dict)
    items: Int[Tensor, " b"] | None = None
    excluded: Int[Tensor, "b k"] | None = None

    def mask(self, first: str, second: str) -> Mask | None:
        """Pairs of rows that are no negatives between these views."""
        guide = self.guide(first, second)
        judged = [] if guide is None else [guide]
        return join_masks([*self.same_content(first, second), *self._likely(), *self.marked(), *judged])

    def guide(self, first: str, second: str) -> GuideMask | None:
        """Negatives between two views as the guide judges them; None where it does not."""
        if self.guide_margin is None or not {first, second} <= set(self.guides):
            return None
        return GuideMask(
            self.guides[first], self.guides[second], self.guide_margin, self.guide_kind, self.guide_softness
        )

    def judged_negatives(
        self, first: str, second: str
    ) -> tuple[NegativeWeights | None, NegativeWeights | None]:
        """The same of the further negatives of both directions: values of the second view, and of the first."""
        guide = self.guide(first, second)
        if guide is None:
            return None, None
        theirs = [self.negative_guides.get(view) for view in (second, first)]
        sides = (guide, guide.transposed())
        forth, back = (
            None if vectors is None else side.beyond(vectors)
            for side, vectors in zip(sides, theirs, strict=True)
        )
        return forth, back

    def same_content(self, *views: str) -> list[Mask]:
        """Pairs of rows with the same value in one of the views, where these are masked; views whose groups are one
        tensor (rows that are the same item) have one mask."""
        if not self.mask_duplicates:
            return []
        groups = {id(self.groups[view]): self.groups[view] for view in views if view in self.groups}
        return [DuplicateMask(group) for group in groups.values()]

    def _likely(self) -> list[Mask]:
        if self.threshold is None or self.reference is None:
            return []
        return [SimilarityMask(self.reference, self.threshold)]

    def marked(self) -> list[Mask]:
        """Pairs that somebody marked as no negatives."""
        if self.items is None or self.excluded is None:
            return []
        return [PairMask(self.items, self.excluded)]

    def beyond(self, first: str, second: str, memory: Memory) -> Mask | None:
        """Pairs (row of the batch, item of the memory) that are no negatives: the item itself from an earlier epoch,
        with ``mask_duplicates`` all that share a value with it, and likely false negatives."""
        sides = [(self.groups[view], memory.groups(view)) for view in (first, second)]
        masks: list[Mask] = [DuplicateMask(own, kept) for own, kept in sides]
        if not self.mask_duplicates:
            own, kept = ((a << 32) + b for a, b in zip(*sides, strict=True))
            masks = [DuplicateMask(own, kept)]
        if self.threshold is not None and self.reference is not None and memory.vectors is not None:
            masks.append(_SimilarBeyond(self.reference, memory.vectors.rows(), self.threshold))
        return join_masks(masks)

    def rows(self, at: Int[Tensor, " k"]) -> ViewContext:
        """The same of some rows, which have both views."""
        groups = {id(group): group[at] for group in self.groups.values()}
        return ViewContext(
            {view: groups[id(group)] for view, group in self.groups.items()},
            self.mask_duplicates,
            {},
            None if self.reference is None else self.reference[at],
            self.threshold,
            None if self.labels is None else self.labels[at],
            {view: rows[at] for view, rows in self.negatives.items()},
            {view: rows[at] for view, rows in self.guides.items()},
            self.guide_margin,
            self.guide_kind,
            self.guide_softness,
            {view: rows[at] for view, rows in self.negative_guides.items()},
            {view: rows[at] for view, rows in self.margins.items()},
            None if self.items is None else self.items[at],
            None if self.excluded is None else self.excluded[at],
        )


class _SimilarBeyond:
    """A ``SimilarityMask`` between the rows of a batch and others."""

    symmetric = False

    def __init__(self, own: Float[Tensor, "n d"], others: Float[Tensor, "m d"], threshold: float) -> None:
        self.shape = (len(own), len(others))
        self._all = SimilarityMask(torch.cat([own, others]), threshold)

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        return self._all.tile(rows, slice(columns.start + self.shape[0], columns.stop + self.shape[0]))


def _two_views(pair: object) -> tuple[str, str]:
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(name, str) for name in pair)
    ):
        raise NearfarError(f"pairs holds {shown(pair)}; names of views, two and two, are needed")
    return pair[0], pair[1]


def view_pairs(views: Sequence[str], anchor: str | None = None) -> list[tuple[str, str]]:
    """Every two views in order, or the anchor with each of the others.

    >>> view_pairs(["a", "b", "c"]), view_pairs(["a", "b", "c"], anchor="b")
    ([('a', 'b'), ('a', 'c'), ('b', 'c')], [('b', 'a'), ('b', 'c')])
    """
    if anchor is None:
        return list(combinations(views, 2))
    if anchor not in views:
        raise NearfarError(f"anchor={anchor} is no view: {nearest_name(anchor, views)}")
    return [(anchor, other) for other in views if other != anchor]


class ViewLoss(nn.Module):
    """A contrastive loss between every two views, or between an anchor view and each other one.

    Called with embeddings (b, d) by view, not normalised, and a `ViewContext`. Each two views are contrasted over the
    rows that have both; terms are weighted by their rows. Of one pair of views that all rows have, the value is that
    of the loss itself.

    Args:
        name: "infonce" (van den Oord et al. 2018; with a learned scale in both directions the loss of CLIP, Radford et
            al. 2021), "siglip" (Zhai et al. 2023; needs ``scale`` and ``bias``), or "supcon" (Khosla et al. 2020: rows
            of the same ``labels`` are positives across views; the temperature does not learn).
        temperature: 1 / scale where no ``scale`` is given.
        symmetric: both directions (of "infonce"; the others always have both).
        sum, own_pair: of "supcon", see `SupConLoss`.
        anchor: the view that the others are contrasted with; None: every two.
        pairs: the views that are contrasted, two and two, as far as a batch has them, such as a view that only
            training batches have; None: as ``anchor`` says. The first of a pair is the query of one direction alone.
        tau_plus, beta: of "infonce", debiased and hard negatives, see `InfoNCELoss`.
        dims: lengths of embeddings that are contrasted beside the whole, each with weight 1 (`MatryoshkaLoss`).
        distill: the weight of the KL from the guide's distribution over the batch (`DistillationLoss`), for contexts
            with ``guides``; ``teacher_temperature`` divides its cosines, None: the temperature of the loss.
        margin: the weight of the squared error of margins (`MarginMSELoss`), for contexts with ``margins``, which are
            compared with ``margin_scale`` · differences of cosines.

    >>> loss = ViewLoss(temperature=0.5)
    >>> views = {"word": torch.eye(4), "picture": torch.eye(4), "sound": torch.eye(4)}
    >>> round(loss(views).item(), 3), loss.record()["terms"]
    (0.341, 3.0)
    """

    #: it is made of one loss, which has traits of its own and is what several processes take apart
    traits: ClassVar[LossTraits] = LossTraits()

    def __init__(
        self,
        name: ViewLossName = "infonce",
        temperature: float = 0.07,
        symmetric: bool = True,
        *,
        sum: Literal["outside", "inside"] = "outside",
        own_pair: bool = True,
        anchor: str | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        tau_plus: float = 0.0,
        beta: float = 0.0,
        dims: Sequence[int] | None = None,
        distill: float = 0.0,
        teacher_temperature: float | None = None,
        margin: float = 0.0,
        margin_scale: float = 1.0,
    ) -> None:
        super().__init__()
        choice("name", name, ("infonce", "siglip", "supcon"))
        check_flags(symmetric=symmetric, own_pair=own_pair)
        check_sum(sum)
        temperature = check_temperature(temperature)
        if anchor is not None:
            text("anchor", anchor)
        if pairs is not None:
            pairs = [_two_views(pair) for pair in entries("pairs", pairs)]
        if anchor is not None and pairs is not None:
            raise NearfarError("anchor and pairs both say which views are contrasted; leave one of them out")
        self.name, self.symmetric, self.anchor, self.pairs = name, symmetric, anchor, pairs
        self.temperature = temperature
        self.contrast: InfoNCELoss | SigLipLoss | SupConLoss
        if name == "infonce":
            self.contrast = InfoNCELoss(temperature, symmetric=symmetric, tau_plus=tau_plus, beta=beta)
        elif name == "siglip":
            self.contrast = SigLipLoss()
        else:
            self.contrast = SupConLoss(temperature, sum=sum, own_pair=own_pair)
        if name != "infonce" and (tau_plus or beta):
            raise NearfarError(
                f"tau_plus and beta are of the loss infonce, and this is {name}; leave them at 0"
            )
        self.dims = [] if dims is None else check_lengths("dims", dims)
        weights = {term_name(length): 1.0 for length in self.dims} | {"contrastive": 1.0}
        self.distill: DistillationLoss | None = None
        self.margin: MarginMSELoss | None = None
        if number("distill", distill, 0.0):
            weights["distill"] = distill
            self.distill = DistillationLoss(temperature, teacher_temperature, symmetric)
        if number("margin", margin, 0.0):
            weights["margin"] = margin
            self.margin = MarginMSELoss(number("margin_scale", margin_scale, above=0))
        #: the terms beside the contrastive one; None where there is none
        self.objective = Objective(weights) if len(weights) > 1 else None
        self._terms: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def forward(
        self,
        views: Mapping[str, Float[Tensor, "b d"]],
        context: ViewContext | None = None,
        *,
        scale: Float[Tensor, ""] | float | None = None,
        bias: Float[Tensor, ""] | float | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, ""]:
        context = ViewContext() if context is None else instance("context", context, ViewContext)
        if not mapping("views", views):
            raise NearfarError("views holds no view; embeddings (rows, d) by name are needed")
        check_matrices(**{f"views['{name}']": rows for name, rows in views.items()})
        if bias is not None and self.name != "siglip":
            raise NearfarError(f"bias is of the loss siglip, and this is {self.name}; leave it None")
        if memory is not None and not hasattr(memory, "filled"):
            raise NearfarError(
                f"memory is a {type(memory).__name__}; a nearfar.models.views.ViewMemory is needed"
            )
        terms = self._pairs(list(views), context, len(next(iter(views.values()))))
        total = sum(count for *_, count in terms)
        self._counts = {"rows_contrasted": total, "terms": len(terms)}
        self._terms = {}
        if not terms:
            warnings.warn(
                "no two rows of this batch have two views in common: the loss is 0 and nothing is learned. Take "
                "larger batches, or leave out a view that few items have.",
                NoPositivesWarning,
                stacklevel=2,
            )
            return next(iter(views.values())).sum() * 0.0
        loss: Tensor | None = None
        for first, second, rows, count in terms:
            part = context if rows is None else context.rows(rows)
            a, b = (views[name] if rows is None else views[name][rows] for name in (first, second))
            value = self._value(first, second, a, b, part, scale, bias, memory)
            if len(terms) == 1:
                return value
            self._terms[f"{first}-{second}"] = value.detach()
            weighted = value * (count / total)
            loss = weighted if loss is None else loss + weighted
        assert loss is not None
        return loss

    def pairs_of(self, views: Sequence[str]) -> list[tuple[str, str]]:
        """Which of these views are contrasted with each other.

        >>> ViewLoss(pairs=[("picture", "text"), ("picture", "sound")]).pairs_of(["text", "picture"])
        [('picture', 'text')]
        """
        if self.pairs is None:
            return view_pairs(views, self.anchor)
        return [(first, second) for first, second in self.pairs if first in views and second in views]

    def _pairs(
        self, views: list[str], context: ViewContext, size: int
    ) -> list[tuple[str, str, Tensor | None, int]]:
        """Two views, the rows that have both (None: all) and how many; pairs with fewer than two are left out."""
        terms: list[tuple[str, str, Tensor | None, int]] = []
        for first, second in self.pairs_of(views):
            partial = [context.present[view] for view in (first, second) if view in context.present]
            if not partial or all(bool(each.all()) for each in partial):
                terms.append((first, second, None, size))
                continue
            rows = torch.stack(partial).all(0).nonzero()[:, 0]
            if len(rows) > 1:
                terms.append((first, second, rows, len(rows)))
        return terms

    def _value(
        self,
        first: str,
        second: str,
        a: Tensor,
        b: Tensor,
        context: ViewContext,
        scale: Tensor | float | None,
        bias: Tensor | float | None,
        memory: Memory | None,
    ) -> Tensor:
        """Two views: the contrastive term, and those beside it."""
        if self.objective is None:
            return self._of(first, second, a, b, context, scale, bias, memory)
        values: dict[str, Tensor] = {}
        for length in self.dims:
            if a.shape[1] < length:
                raise NearfarError(
                    f"dims names a length of {length}, and embeddings have {a.shape[1]} numbers"
                )
            values[term_name(length)] = self._of(first, second, a, b, context, scale, bias, memory, length)
        values["contrastive"] = self._of(first, second, a, b, context, scale, bias, memory)
        if self.distill is not None:
            if not {first, second} <= set(context.guides):
                raise NearfarError(
                    f"distill: the context has guides of {', '.join(context.guides) or 'no view'}, and '{first}' and "
                    f"'{second}' are contrasted; the teacher's vectors of both are needed"
                )
            values["distill"] = self.distill(a, b, (context.guides[first], context.guides[second]), scale)
        if self.margin is not None:
            values["margin"] = self._margins(first, second, a, b, context)
        total: Tensor = self.objective(values)
        return total

    def _margins(self, first: str, second: str, a: Tensor, b: Tensor, context: ViewContext) -> Tensor:
        """The mean of the directions that have negatives with margins; 0 where none has."""
        assert self.margin is not None
        values = [
            self.margin(queries, keys, context.negatives[view], context.margins[view])
            for view, queries, keys in ((second, a, b), (first, b, a))
            if view in context.margins and view in context.negatives
        ]
        return torch.stack(values).mean() if values else a.sum() * 0.0

    def _of(
        self,
        first: str,
        second: str,
        a: Tensor,
        b: Tensor,
        context: ViewContext,
        scale: Tensor | float | None,
        bias: Tensor | float | None,
        memory: Memory | None,
        length: int | None = None,
    ) -> Tensor:
        """The contrastive loss of two views, of the first ``length`` numbers of every embedding."""
        a, b = a[:, :length], b[:, :length]
        mask = context.mask(first, second)
        if isinstance(self.contrast, SigLipLoss):
            if scale is None:
                scale = 1.0 / self.temperature
            value: Tensor = self.contrast(a, b, scale, 0.0 if bias is None else bias, mask)
            return value
        if isinstance(self.contrast, SupConLoss):
            labels = context.labels
            if labels is None:
                raise NearfarError("the loss supcon needs labels: which rows are positives of each other")
            loss: Tensor = self.contrast(a, labels, other=b, mask=mask)
            return loss
        own = tuple(
            None if (rows := context.negatives.get(view)) is None else rows[..., :length]
            for view in (second, first)
        )
        if memory is not None and memory.filled and memory.keeps(first) and memory.keeps(second):
            if any(each is not None for each in own):
                raise NearfarError("mined negatives and a memory cannot be combined; leave one of them out")
            if context.guide(first, second) is not None:
                raise NearfarError(
                    "a guide does not know the items of a memory, so that they would be judged differently; leave one "
                    "of them out, or set guide_margin to None"
                )
            left_out = context.beyond(first, second, memory)
            kept = (
                memory.rows(second)[:, :length],
                memory.rows(first)[:, :length] if self.symmetric else None,
            )
            between: Tensor = self.contrast(
                a, b, mask, scale, kept, (left_out, left_out if self.symmetric else None)
            )
            return between
        if any(each is not None for each in own):
            judged = context.judged_negatives(first, second)
            further = [(rows, None if rows is None else left) for rows, left in zip(own, judged, strict=True)]
            if not self.symmetric:
                further[1] = (None, None)
            if all(rows is None for rows, _ in further):
                return self.contrast(a, b, mask, scale)
            lefts = (further[0][1], further[1][1])
            mined: Tensor = self.contrast(
                a, b, mask, scale, (further[0][0], further[1][0]), lefts if any(lefts) else None
            )
            return mined
        plain: Tensor = self.contrast(a, b, mask, scale)
        return plain

    def record(self) -> dict[str, float]:
        """Numbers of the last call for the log: the record of the last pair of views, and the loss of each pair."""
        numbers = {} if self.contrast.record is None else dict(self.contrast.record.to_dict())
        if self.objective is not None and self.objective.record is not None:
            numbers |= {
                name: value for name, value in self.objective.record.to_dict().items() if name != "total"
            }
        if len(self._terms) > 1:
            numbers |= {f"{name}/loss": value.item() for name, value in self._terms.items()}
        return numbers | {name: float(value) for name, value in self._counts.items()}
