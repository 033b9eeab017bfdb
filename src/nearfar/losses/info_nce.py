"""InfoNCE and CLIP: every row is told apart from the other rows by its partner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast import (
    Extra,
    Mask,
    OwnPair,
    Step,
    checked_mask,
    dense_own_pairs,
    is_directed,
    is_soft,
    one_direction_loss,
    softmax_loss,
    uncompiled,
)
from nearfar.errors import NearfarError
from nearfar.losses.arguments import (
    Negatives,
    any_number,
    check_denominator,
    check_flags,
    check_matrices,
    check_part,
    check_reduction,
    check_temperature,
    check_words,
    extras_of,
    number,
    ready,
)
from nearfar.losses.base import ONE_VALUE_EACH, ContrastiveLoss, LossTraits, PairArguments, Requires

__all__ = ["ClipLoss", "InfoNCELoss", "InfoNCEOptions", "clip", "clip_step", "info_nce", "info_nce_step"]


@dataclass(eq=False, repr=False)
class InfoNCEOptions:
    """The options of InfoNCE, for function and module; ``info_nce`` describes them."""

    temperature: float = 0.07
    symmetric: bool = True
    normalize: bool = True
    in_batch: bool = True
    denominator: Literal["all", "negatives"] = "all"
    reduction: Literal["mean", "sum", "none"] = "mean"
    tau_plus: float = 0.0
    beta: float = 0.0

    def check(self) -> None:
        """``NearfarError`` for options that cannot be; the temperature is checked where it is used."""
        check_flags(symmetric=self.symmetric, normalize=self.normalize, in_batch=self.in_batch)
        check_words(denominator=self.denominator, reduction=self.reduction)
        check_denominator(self.denominator)
        check_reduction(self.reduction)
        if not 0.0 <= number("tau_plus", self.tau_plus) < 1.0:
            raise NearfarError(
                f"tau_plus is {self.tau_plus}, but it is the share of negatives that are positives in truth: 0 up to "
                "below 1, often 0.01 to 0.1"
            )
        number("beta", self.beta, 0.0)
        if self.tau_plus and self.denominator != "all":
            raise NearfarError(
                f"tau_plus={self.tau_plus} corrects a sum that holds the positive, and "
                f"denominator={self.denominator!r} has none there; leave one of them out"
            )

    @property
    def plain(self) -> bool:
        """Whether the loss is the mean over rows of a choice among all candidates."""
        weighted = bool(self.tau_plus or self.beta)
        return self.in_batch and self.denominator == "all" and self.reduction == "mean" and not weighted


def info_nce(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    *,
    temperature: float = 0.07,
    scale: float | Float[Tensor, ""] | Float[Tensor, "1"] | None = None,
    symmetric: bool = True,
    normalize: bool = True,
    mask: Bool[Tensor, "n m"] | Mask | None = None,
    negatives: Negatives | None = None,
    negatives_mask: Bool[Tensor, "n q"] | Mask | tuple[Mask | Tensor | None, ...] | None = None,
    in_batch: bool = True,
    denominator: Literal["all", "negatives"] = "all",
    reduction: Literal["mean", "sum", "none"] = "mean",
    tau_plus: float = 0.0,
    beta: float = 0.0,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""] | Float[Tensor, " queries"]:
    """The mean cross-entropy of picking ``b[i]`` for ``a[i]`` among all rows of ``b`` (van den Oord et al. 2018).

    With scores s_ij = cos(a_i, b_j) / temperature: mean over i of log Σ_j exp(s_ij) - s_ii. ``symmetric=True``
    averages both directions, as CLIP does; with ``symmetric=False``, ``b`` may have more rows than ``a``, and those
    beyond are further negatives.

    ``scale`` replaces 1 / temperature and may be a tensor that learns; ``normalize=False`` takes dot products of the
    embeddings as they are. ``mask`` is true where a pair is *left out*, such as a duplicate that is no real negative;
    a row's own partner always stays in. ``negatives`` are further candidates of the queries ``a``: (q, d) for all, as
    from a memory of earlier batches, or (n, k, d), k mined ones for each; a pair of such gives both directions
    theirs. ``negatives_mask`` leaves some of them out. ``rows`` makes only those rows queries; such parts add up to
    the whole loss. ``tile`` sets the size of the tiles by hand.

    ``in_batch=False``: a query chooses between its own partner and ``negatives`` alone, as in MoCo (He et al. 2020);
    rows of the batch are no negatives of each other, and no product of all with all is made.
    ``denominator="negatives"`` takes the partner out of the sum, log Σ_{j≠i} exp(s_ij) - s_ii: decoupled contrastive
    learning (Yeh et al. 2022, arXiv:2110.06848), where a pair that is found already is pulled as strongly as any
    other. Guessing gives ln(number of negatives), and the loss goes below 0; a query without negatives has 0.
    ``reduction`` "sum" adds the rows up, "none" gives the loss of each row (n,); with ``symmetric`` a row's is the
    mean of its two directions.

    ``beta`` above 0 draws the N negatives of a query with probability ∝ exp(β s_ij) (Robinson et al. 2021,
    arXiv:2010.04592): their sum is N Σ_j exp((1 + β) s_ij) / Σ_j exp(β s_ij), at twice the cost. ``tau_plus`` above 0
    takes for granted that this share of them are positives in truth (Chuang et al. 2020, arXiv:2007.00224): their sum
    is max((Σ_j exp(s_ij) - N τ⁺ exp(s_ii)) / (1 - τ⁺), N exp(-1 / temperature)). Guessing stays ln(candidates).
    A ``NegativeWeights`` or a soft ``GuideMask`` as ``mask`` weighs each negative; N is then the sum of its weights.

    Memory is O(n d): no matrix of all pairs is stored above about a thousand rows. Half precision inputs are scored in
    float32, and the result is float32 then. One row alone has loss 0. Range: 0 (floor) to infinity; guessing is
    ln(number of candidates).

    >>> import torch
    >>> round(info_nce(torch.eye(4), torch.eye(4), temperature=1.0).item(), 4)
    0.7437
    >>> info_nce(torch.ones(4, 2), torch.ones(4, 2)).exp().round().item()
    4.0
    >>> queue = -torch.ones(9, 4)
    >>> moco = info_nce(torch.eye(4), torch.eye(4), symmetric=False, negatives=queue, in_batch=False)
    >>> moco < info_nce(torch.eye(4), torch.eye(4), symmetric=False, negatives=queue)
    tensor(True)
    """
    options = InfoNCEOptions(
        temperature, symmetric, normalize, in_batch, denominator, reduction, tau_plus, beta
    )
    return info_nce_step(
        a,
        b,
        options,
        scale,
        mask=mask,
        negatives=negatives,
        negatives_mask=negatives_mask,
        rows=rows,
        tile=tile,
    )[0]


@uncompiled
def info_nce_step(
    a: Tensor,
    b: Tensor,
    options: InfoNCEOptions,
    scale: float | Tensor | None = None,
    *,
    mask: Tensor | Mask | None = None,
    negatives: Negatives | None = None,
    negatives_mask: Mask | Tensor | tuple[Mask | Tensor | None, ...] | None = None,
    rows: slice | None = None,
    tile: tuple[int, int] | None = None,
    names: tuple[str, str, str] = ("a", "b", "scale"),
) -> tuple[Float[Tensor, ""] | Float[Tensor, " queries"], Step]:
    """``info_nce``, and what its record is made of; ``names`` are what its caller calls the first three."""
    symmetric, normalize = options.symmetric, options.normalize
    if scale is None:
        scale = 1.0 / check_temperature(options.temperature)
    elif not isinstance(scale, Tensor):
        scale = any_number(names[2], scale)
    check_matrices(**{names[0]: a, names[1]: b})
    options.check()
    check_part(rows, tile)
    n, m = len(a), len(b)
    dense_mask = None
    whole = (
        options.plain
        and negatives is None
        and negatives_mask is None
        and rows is None
        and tile is None
        and a.ndim == b.ndim == 2
        and (n == m or (n < m and not symmetric))
    )
    # Weights of negatives, and masks that are not the same in both directions, are the kernel's.
    whole = whole and not (is_soft(mask) or (symmetric and is_directed(mask)))
    if whole:
        dense_mask = None if mask is None else checked_mask(mask, n, m)
        small = dense_own_pairs(a, b, scale, symmetric, normalize, dense_mask)
        if small is not None:
            return small
    # Further negatives are scored beside the kernel, and need rows of unit length themselves.
    inside = normalize and negatives is None
    given = ready(a, b, scale, None if inside else normalize, names[:2], names[2])
    if n != m and (symmetric or m < n):
        raise NearfarError(
            f"{names[0]} has {n} rows and {names[1]} {m}; row i of both is a pair, and only with symmetric=False may "
            "the second have further rows as negatives"
        )
    if whole and not symmetric:
        one_way = one_direction_loss(*given, normalize, dense_mask)
        if one_way is not None:
            return one_way
    extras = extras_of(negatives, negatives_mask, given, symmetric, normalize)
    if not options.in_batch:
        _check_alone(n, m, extras, symmetric, mask is not None)
    return softmax_loss(
        *given,
        OwnPair(n, m),
        both=symmetric,
        mask=mask,
        extras=extras,
        unit=normalize and not inside,
        normalize=inside,
        rows=rows,
        tile=tile,
        in_batch=options.in_batch,
        denominator="negatives" if options.denominator == "negatives" else "all",
        reduction=options.reduction,
        tau_plus=options.tau_plus,
        beta=options.beta,
        half=a.dtype == b.dtype == torch.bfloat16,
    )


def _check_alone(n: int, m: int, extras: list[Extra | None], symmetric: bool, masked: bool) -> None:
    """``NearfarError`` where a direction would have nothing but its partner to choose from."""
    if None in (extras or [None])[: 1 + symmetric]:
        raise NearfarError(
            "in_batch=False: a query chooses between its partner and the given negatives, but negatives is None"
            + (
                " in a direction; symmetric=True needs a pair of them, one for each, and symmetric=False one"
                if symmetric
                else ""
            )
        )
    if masked or n != m:
        raise NearfarError(
            "in_batch=False: "
            + (
                "mask leaves out pairs of the batch"
                if masked
                else f"b has {m - n} rows more than a as negatives"
            )
            + ", but other rows of the batch are no candidates; pass further rows as negatives, and negatives_mask"
        )


def clip(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    logit_scale: float | Float[Tensor, ""] | Float[Tensor, "1"],
    *,
    max_scale: float | None = None,
    normalize: bool = True,
    mask: Bool[Tensor, "n n"] | Mask | None = None,
    rows: slice | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE in both directions with the scale given at each call (Radford et al. 2021).

    ``logit_scale`` is the scale itself, already exponentiated. ``max_scale`` clamps it; beyond the clamp its gradient
    is 0. Otherwise as ``info_nce``.

    >>> import torch
    >>> clip(torch.eye(4), torch.eye(4), 100.0, max_scale=1.0) == clip(torch.eye(4), torch.eye(4), 1.0)
    tensor(True)
    """
    return clip_step(image, text, logit_scale, max_scale, normalize, mask, rows)[0]


def clip_step(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    max_scale: float | None = None,
    normalize: bool = True,
    mask: Tensor | Mask | None = None,
    rows: slice | None = None,
) -> tuple[Float[Tensor, ""], Step]:
    """``clip``, and what its record is made of."""
    scale = clamp_scale(logit_scale, max_scale)
    names = ("image", "text", "logit_scale")
    return info_nce_step(
        image, text, InfoNCEOptions(normalize=normalize), scale, mask=mask, rows=rows, names=names
    )


def clamp_scale(scale: float | Tensor, max_scale: float | None, name: str = "logit_scale") -> float | Tensor:
    """The scale, at most ``max_scale``; its gradient is that of the clamp."""
    if scale is None:
        raise NearfarError(
            f"{name} is None; pass the scale, 1 / temperature, such as 14.3 or model.log_scale.exp()"
        )
    if max_scale is None:
        return scale
    if not number("max_scale", max_scale) > 0:
        raise NearfarError(f"max_scale is {max_scale!r}, but it must be above 0; CLIP's is 100")
    if not isinstance(scale, Tensor):
        return min(number(name, scale), max_scale)
    one_number = scale.numel() == 1 and scale.dtype != torch.bool and not scale.is_complex()
    if not one_number or (scale.device.type == "cpu" and not bool(scale.detach().isfinite().all())):
        return scale  # refused where every scale is looked at: a clamp would hide it
    # A log scale clamped at ln(max_scale) comes back a rounding larger, and must not lose its gradient there.
    return torch.where(scale > max_scale * (1 + 1e-6), max_scale, scale)


@dataclass(eq=False, repr=False)
class InfoNCELoss(InfoNCEOptions, ContrastiveLoss):
    """Pull ``a[i]`` and ``b[i]`` together and push all other pairs of the batch apart (van den Oord et al. 2018).

    ``temperature`` divides the cosines (0.001 and up; smaller looks only at the hardest negatives), ``symmetric``
    averages both directions, ``normalize=False`` takes dot products of the embeddings as they are.

    ``in_batch=False`` chooses between the own partner and the given ``negatives`` alone (MoCo);
    ``denominator="negatives"`` takes the partner out of the sum (decoupled contrastive learning); ``reduction`` is
    "mean", "sum" or "none", the loss of each row. ``beta`` weighs hard negatives up (Robinson et al. 2021), and
    ``tau_plus`` takes off the share of negatives that are positives in truth (Chuang et al. 2020);
    ``record.extra["debias_clamped"]`` is the share of rows whose sum of negatives stands at its least then, where it
    has no gradient.

    Called with two (n, d) matrices it returns a 0-d tensor (of "none" (n,)). ``mask`` (n, n) leaves pairs out, see
    ``nearfar.losses.false_negative_mask``; ``scale`` replaces 1 / temperature and may be a tensor that learns;
    ``negatives`` are further candidates, as from a ``CrossBatchMemory``. ``nearfar.losses.info_nce`` describes
    them all.

    Range 0 (floor) to infinity; guessing gives ``record.uniform_level``, ln(candidates). Losses of batches of
    different size or mask have different levels and are not comparable.

    >>> import torch
    >>> loss = InfoNCELoss(temperature=0.1)
    >>> value = loss(torch.eye(8), torch.eye(8))
    >>> loss.record.candidates, round(loss.record.uniform_level, 3), value.item() < 0.001
    (8.0, 2.079, True)
    """

    traits: ClassVar[LossTraits] = LossTraits(
        "softmax",
        "pair",
        rows=("a", "b"),
        further=("negatives",),
        pairs=("mask",),
        numbers=("scale",),
        local=(Requires("reduction", ("mean", "sum"), ONE_VALUE_EACH),),
        ring=(
            Requires("in_batch", (True,), "rows of the batch are the candidates of the ring"),
            Requires("denominator", ("all",), "its sums hold all candidates"),
            Requires("reduction", ("mean",), "it takes the mean over rows"),
            Requires("tau_plus", (0.0,), "its sums are those of all negatives alike"),
            Requires("beta", (0.0,), "its sums are those of all negatives alike"),
        ),
    )

    def __post_init__(self) -> None:
        self.check()
        self.temperature = check_temperature(self.temperature)

    def forward(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "m d"],
        mask: Bool[Tensor, "n m"] | Mask | None = None,
        scale: float | Float[Tensor, ""] | Float[Tensor, "1"] | None = None,
        negatives: Negatives | None = None,
        negatives_mask: Mask | Tensor | tuple[Mask | Tensor | None, ...] | None = None,
        rows: slice | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, " queries"]:
        masked = mask is not None or negatives_mask is not None
        step = info_nce_step(
            a, b, self, scale, mask=mask, negatives=negatives, negatives_mask=negatives_mask, rows=rows
        )
        return self.keep(*step, masked)

    def _extra(self) -> dict[str, float]:
        clamped = [] if self._step is None else [each.statistics.clamped for each in self._step.directions()]
        shares = [each.to(torch.float32).mean() for each in clamped if each is not None]
        return {"debias_clamped": torch.stack(shares).mean().item()} if shares else {}

    def pair_arguments(self, arguments: Mapping[str, Any]) -> PairArguments:
        scale = arguments.get("scale")
        scale = 1.0 / self.temperature if scale is None else scale
        return PairArguments(arguments["a"], arguments["b"], scale, self.symmetric, self.normalize)


@dataclass(eq=False, repr=False)
class ClipLoss(ContrastiveLoss):
    """InfoNCE in both directions, with the scale an argument of each call (Radford et al. 2021).

    ``logit_scale`` is the scale itself, already exponentiated; a learnable log scale lives in the model. ``max_scale``
    clamps it: beyond, the scale has no gradient, and ``record.extra["at_clamp"]`` is 1.

    Floor 0, guessing ln(n).

    >>> import torch
    >>> log_scale = torch.tensor(2.659, requires_grad=True)
    >>> loss = ClipLoss(max_scale=100)
    >>> loss(torch.eye(8), torch.eye(8).flip(0), log_scale.exp()).backward()
    >>> round(loss.record.scale, 1), bool(log_scale.grad > 0)
    (14.3, True)
    """

    max_scale: float | None = None
    normalize: bool = True

    traits: ClassVar[LossTraits] = LossTraits(
        "softmax",
        "pair",
        rows=("image", "text"),
        pairs=("mask",),
        numbers=("logit_scale",),
        local=(),
        ring=(),
    )

    def __post_init__(self) -> None:
        clamp_scale(1.0, self.max_scale)
        check_flags(normalize=self.normalize)

    def forward(
        self,
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "n d"],
        logit_scale: float | Float[Tensor, ""] | Float[Tensor, "1"],
        mask: Bool[Tensor, "n n"] | Mask | None = None,
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        step = clip_step(image, text, logit_scale, self.max_scale, self.normalize, mask, rows)
        return self.keep(*step, mask is not None)

    def _extra(self) -> dict[str, float]:
        return at_clamp(self._step, self.max_scale)

    def pair_arguments(self, arguments: Mapping[str, Any]) -> PairArguments:
        scale = clamp_scale(arguments["logit_scale"], self.max_scale)
        return PairArguments(arguments["image"], arguments["text"], scale, True, self.normalize)


def at_clamp(step: Step | None, max_scale: float | None) -> dict[str, float]:
    """Whether the scale of a step stood at its clamp."""
    if step is None or max_scale is None:
        return {}
    return {"at_clamp": float(float(step.scale) >= max_scale * (1 - 1e-6))}
