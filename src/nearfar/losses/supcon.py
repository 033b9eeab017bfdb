"""Supervised contrastive losses as modules."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from nearfar.contrast import Mask, check_denominator, check_reduction
from nearfar.errors import NearfarError
from nearfar.functional.arguments import check_flags, check_temperature, check_words, number
from nearfar.functional.multi_label_supcon import multi_label_supcon_step
from nearfar.functional.supcon import inside_of, supcon_step
from nearfar.losses.base import ContrastiveLoss

__all__ = ["MultiLabelSupConLoss", "SupConLoss"]


class SupConLoss(ContrastiveLoss):
    """All rows of the same class are each other's positives (Khosla et al. 2020).

    ``sum="outside"`` (their L_out) asks for all positives, ``"inside"`` is content with the nearest. Called with
    embeddings (n, d) and labels (n,). ``other`` is a second view of the same rows to contrast with,
    ``own_pair=False`` then leaves out a row's own partner; ``memory`` and ``memory_labels`` add rows of earlier
    batches; with ``in_batch=False`` these are the only candidates. ``positives``, a matrix, stands in for labels.
    ``denominator="own"`` is NT-Xent with several positives, ``"negatives"`` decoupled contrastive learning;
    ``reduction`` is "mean", "sum" or "none", the loss of each row.
    ``nearfar.functional.supcon`` has the definitions.

    Floor: ln(positives) outside, 0 inside. Guessing: ln(candidates), less ln(positives) for a sum inside. Rows
    without a positive are left out and counted; a batch without any is 0 and warns. A row whose label is missing (−1
    or NaN) is such a row, and a negative of all others.

    >>> import torch
    >>> loss = SupConLoss()
    >>> value = loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
    >>> loss.record.positives_per_row, loss.record.candidates
    (1.0, 7.0)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sum: Literal["outside", "inside"] = "outside",
        normalize: bool = True,
        own_pair: bool = True,
        denominator: Literal["all", "own", "negatives"] = "all",
        reduction: Literal["mean", "sum", "none"] = "mean",
        in_batch: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)
        check_words(sum=sum, denominator=denominator, reduction=reduction)
        check_flags(normalize=normalize, own_pair=own_pair, in_batch=in_batch)
        inside_of(sum)
        self.denominator, self.reduction = check_denominator(denominator), check_reduction(reduction)
        self.sum = sum
        self.normalize = normalize
        self.own_pair, self.in_batch = own_pair, in_batch

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
    ) -> Float[Tensor, ""] | Float[Tensor, " n"]:
        loss, self._step = supcon_step(
            z, labels, self.temperature, self.sum, self.normalize, other, self.own_pair, memory, memory_labels, mask,
            rows, in_batch=self.in_batch, positives=positives, denominator=self.denominator, reduction=self.reduction,
        )  # fmt: skip
        self._masked = mask is not None
        return loss

    def extra_repr(self) -> str:
        usual = {"own_pair": True, "denominator": "all", "reduction": "mean", "in_batch": True}
        said = {name: getattr(self, name) for name in usual}
        more = "".join(f", {name}={value!r}" for name, value in said.items() if value != usual[name])
        return f"temperature={self.temperature}, sum={self.sum!r}, normalize={self.normalize}{more}"


class MultiLabelSupConLoss(ContrastiveLoss):
    """Rows with labels in common belong together as far as they have them in common.

    ``weights="jaccard"``: called with embeddings and multi-hot labels (n, labels). ``weights="legacy"``: with codes
    (n, aspects), where ``neutral`` also stands for absent. ``nearfar.functional.multi_label_supcon`` has the
    definitions, and why to prefer Jaccard.

    Floor: the mean entropy of the target (sum outside), -ln of the largest weight (inside); ``record.floor`` has it
    for the batch. Guessing: ln(candidates), less ln(Σ weights) for a sum inside.

    >>> import torch
    >>> loss = MultiLabelSupConLoss()
    >>> value = loss(torch.eye(3), torch.tensor([[1, 0], [1, 1], [0, 0]]))
    >>> loss.record.rows_without_positives
    1.0
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weights: Literal["jaccard", "legacy"] = "jaccard",
        sum: Literal["outside", "inside"] | None = None,
        neutral: int = 0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = check_temperature(temperature)
        check_words(weights=weights)
        check_flags(normalize=normalize)
        number("neutral", neutral)
        if weights not in ("jaccard", "legacy"):
            raise NearfarError(f"weights is {weights!r}; it is 'jaccard' or 'legacy'")
        if sum is not None:
            check_words(sum=sum)
            inside_of(sum)
        self.weights, self.sum, self.neutral, self.normalize = weights, sum, neutral, normalize

    def forward(
        self,
        z: Float[Tensor, "n d"],
        labels: Int[Tensor, "n labels"],
        rows: slice | None = None,
    ) -> Float[Tensor, ""]:
        loss, self._step = multi_label_supcon_step(
            z, labels, self.temperature, self.weights, self.sum, self.neutral, self.normalize, rows
        )
        return loss

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, weights={self.weights!r}, sum={self.sum!r}, neutral={self.neutral}"
