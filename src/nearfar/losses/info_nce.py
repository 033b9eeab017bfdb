"""InfoNCE and CLIP as modules."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from nearfar.contrast import Mask, Step, check_denominator, check_reduction
from nearfar.functional.arguments import Negatives, check_flags, check_temperature, check_words
from nearfar.functional.info_nce import clamp_scale, clip_step, info_nce_step
from nearfar.losses.base import ContrastiveLoss

__all__ = ["ClipLoss", "InfoNCELoss"]


class InfoNCELoss(ContrastiveLoss):
    """Pull ``a[i]`` and ``b[i]`` together and push all other pairs of the batch apart (van den Oord et al. 2018).

    ``temperature`` divides the cosines (0.001 and up; smaller looks only at the hardest negatives), ``symmetric``
    averages both directions, ``normalize=False`` takes dot products of the embeddings as they are.

    ``in_batch=False`` chooses between the own partner and the given ``negatives`` alone (MoCo);
    ``denominator="negatives"`` takes the partner out of the sum (decoupled contrastive learning); ``reduction`` is
    "mean", "sum" or "none", the loss of each row.

    Called with two (n, d) matrices it returns a 0-d tensor (of "none" (n,)). ``mask`` (n, n) leaves pairs out, see
    ``nearfar.losses.false_negative_mask``; ``scale`` replaces 1 / temperature and may be a tensor that learns;
    ``negatives`` are further candidates, as from a ``CrossBatchMemory``. ``nearfar.functional.info_nce`` describes
    them all.

    Range 0 (floor) to infinity; guessing gives ``record.uniform_level``, ln(candidates). Losses of batches of
    different size or mask have different levels and are not comparable.

    >>> import torch
    >>> loss = InfoNCELoss(temperature=0.1)
    >>> value = loss(torch.eye(8), torch.eye(8))
    >>> loss.record.candidates, round(loss.record.uniform_level, 3), value.item() < 0.001
    (8.0, 2.079, True)
    """

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = True,
        normalize: bool = True,
        in_batch: bool = True,
        denominator: Literal["all", "negatives"] = "all",
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_flags(symmetric=symmetric, normalize=normalize, in_batch=in_batch)
        check_words(denominator=denominator, reduction=reduction)
        self.temperature = check_temperature(temperature)
        self.symmetric = symmetric
        self.normalize = normalize
        self.in_batch = in_batch
        self.denominator, self.reduction = check_denominator(denominator), check_reduction(reduction)

    def forward(
        self,
        a: Float[Tensor, "n d"],
        b: Float[Tensor, "m d"],
        mask: Bool[Tensor, "n m"] | Mask | None = None,
        scale: float | Float[Tensor, ""] | None = None,
        negatives: Negatives | None = None,
        negatives_mask: Mask | Tensor | tuple[Mask | Tensor | None, ...] | None = None,
        rows: slice | None = None,
    ) -> Float[Tensor, ""] | Float[Tensor, " n"]:
        loss, self._step = info_nce_step(
            a,
            b,
            self.temperature,
            scale,
            self.symmetric,
            self.normalize,
            mask,
            negatives,
            negatives_mask,
            rows,
            in_batch=self.in_batch,
            denominator=self.denominator,
            reduction=self.reduction,
        )
        self._masked = mask is not None or negatives_mask is not None
        return loss

    def extra_repr(self) -> str:
        usual = {"in_batch": True, "denominator": "all", "reduction": "mean"}
        said = {name: getattr(self, name) for name in usual}
        more = "".join(f", {name}={value!r}" for name, value in said.items() if value != usual[name])
        return f"temperature={self.temperature}, symmetric={self.symmetric}, normalize={self.normalize}{more}"


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

    def __init__(self, max_scale: float | None = None, normalize: bool = True) -> None:
        super().__init__()
        clamp_scale(1.0, max_scale)
        check_flags(normalize=normalize)
        self.max_scale = max_scale
        self.normalize = normalize

    def forward(
        self,
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "n d"],
        logit_scale: float | Float[Tensor, ""],
        mask: Bool[Tensor, "n n"] | Mask | None = None,
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        loss, self._step = clip_step(image, text, logit_scale, self.max_scale, self.normalize, mask, rows)
        self._masked = mask is not None
        return loss

    def _extra(self) -> dict[str, float]:
        return at_clamp(self._step, self.max_scale)

    def extra_repr(self) -> str:
        return f"max_scale={self.max_scale}, normalize={self.normalize}"


def at_clamp(step: Step | None, max_scale: float | None) -> dict[str, float]:
    """Whether the scale of a step stood at its clamp."""
    if step is None or max_scale is None:
        return {}
    return {"at_clamp": float(float(step.scale) >= max_scale * (1 - 1e-6))}
