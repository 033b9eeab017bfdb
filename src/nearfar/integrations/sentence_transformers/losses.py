"""Losses with the call of sentence-transformers: ``loss(sentence_features, labels)``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nearfar import losses as nearfar_losses
from nearfar.contrast.masks import Mask
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.losses import DuplicateMask
from nearfar.training.gather import gather, world_size
from nearfar.training.grad_cache import cached_embeddings

__all__ = ["InfoNCELoss", "SigLipLoss", "SupConLoss", "text_ids"]

Features = Mapping[str, Tensor]


class _SentenceLoss(nn.Module):
    """What the losses share: embedding the columns of a batch, all at once or in mini-batches."""

    def __init__(self, model: nn.Module, loss: nn.Module, mini_batch_size: int | None) -> None:
        super().__init__()
        if mini_batch_size is not None and mini_batch_size < 1:
            raise NearfarError(f"mini_batch_size={mini_batch_size}: at least 1 row is needed, or None.")
        self.model, self.loss, self.mini_batch_size = model, loss, mini_batch_size

    @property
    def record(self) -> nearfar_losses.Record | None:
        """What the loss saw in its last call (`nearfar.losses.Record`)."""
        return getattr(self.loss, "record", None)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        self._check(features, labels)
        ids = text_ids(features) if getattr(self, "mask_duplicates", False) else None
        return self.compute_loss_from_embeddings(self._embed(features), labels, ids)

    def _check(self, features: Sequence[Features], labels: Tensor | None) -> None:
        raise NotImplementedError

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None, ids: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The loss of the columns' embeddings; ``ids`` number their texts, by which duplicates are left out."""
        raise NotImplementedError

    def _embed(self, features: Sequence[Features]) -> list[Tensor]:
        if self.mini_batch_size is None:
            return [self.model(dict(each))["sentence_embedding"] for each in features]
        # Such a loss replaces the model's forward while it calls this one, and expects one call of it for each column.
        replaced = type(vars(self.model).get("forward")).__module__
        if replaced.startswith("sentence_transformers."):
            raise NearfarError(
                f"mini_batch_size={self.mini_batch_size} does not go with a loss that changes what the model gives, "
                "such as MatryoshkaLoss: encode whole batches (mini_batch_size=None), or leave that loss out."
            )
        rows = [_rows(each) for each in features]
        chunks = [
            _part(each, begin, begin + self.mini_batch_size, n)
            for each, n in zip(features, rows, strict=True)
            for begin in range(0, n, self.mini_batch_size)
        ]
        # A fresh dictionary in each pass: modules write what they compute into it.
        whole = cached_embeddings(
            lambda chunk: self.model(dict(chunk))["sentence_embedding"], chunks, self.model
        )
        return list(whole.split(rows))

    def _config(self) -> Json:
        return {"mini_batch_size": self.mini_batch_size}

    def get_config_dict(self) -> Json:
        """The options, as the model card and the run folder show them."""
        return self._config()


class InfoNCELoss(_SentenceLoss):
    """InfoNCE on (anchor, positive, negative, …) columns (van den Oord et al. 2018): `nearfar.losses.info_nce`.

    Args:
        model: the SentenceTransformer that is trained.
        temperature: divides the cosines; 1 / ``scale`` of MultipleNegativesRankingLoss.
        symmetric: average the choice of the positive for the anchor and that of the anchor for the positive.
            Explicit negatives are candidates of anchors only.
        mask_duplicates: leave out candidates that are no real negatives because of their text: that of the row's own
            positive or anchor, or the positive of a row with the same anchor.
        learn_temperature: whether the temperature is trained with the model.
        normalize: cosines; False: dot products.
        mini_batch_size: rows that are encoded at a time (GradCache, Gao et al. 2021); None: all at once. The loss is
            of the whole batch in either case.
        gather_across_devices: of several processes, contrast each row with those of all; gradients are then those of
            one process with the whole batch. False, as in the library: each process contrasts its own rows.

    Columns after the second are negatives, of which every one is a candidate of every anchor. With ``symmetric=False``
    and without masks the value is that of ``MultipleNegativesRankingLoss(model, scale=1 / temperature)``, with
    ``symmetric=True`` of the same with ``directions=("query_to_doc", "doc_to_query")`` and
    ``partition_mode="per_direction"``; with ``mini_batch_size``, of their cached forms.

    >>> loss = InfoNCELoss(nn.Identity(), temperature=0.05, symmetric=True)
    >>> loss.get_config_dict()["temperature"]
    0.05
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.05,
        *,
        symmetric: bool = False,
        mask_duplicates: bool = False,
        learn_temperature: bool = False,
        normalize: bool = True,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        if gather_across_devices and mask_duplicates:
            raise NearfarError(
                "gather_across_devices does not go with mask_duplicates: texts are compared within a process. Leave "
                "one out; UniqueBatches keeps the same text out of a batch."
            )
        inner = nearfar_losses.InfoNCELoss(temperature, symmetric=symmetric, normalize=normalize)
        super().__init__(model, inner, mini_batch_size)
        self.symmetric, self.mask_duplicates = symmetric, mask_duplicates
        self.gather_across_devices = gather_across_devices
        self._temperature = float(temperature)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learn_temperature else None

    @property
    def temperature(self) -> float:
        """The temperature, as it stands."""
        if self.log_scale is None:
            return self._temperature
        return math.exp(-float(self.log_scale.detach()))

    def _check(self, features: Sequence[Features], labels: Tensor | None) -> None:
        if len(features) < 2:
            raise NearfarError(
                f"InfoNCELoss was given {len(features)} column of texts: anchor and positive are needed, and further "
                "columns are negatives. For texts with labels there is SupConLoss."
            )

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None, ids: Sequence[Tensor] | None = None
    ) -> Tensor:
        if self.gather_across_devices and world_size() > 1:
            embeddings = [gather(each) for each in embeddings]
        anchors, positives, *negatives = embeddings
        scale = None if self.log_scale is None else self.log_scale.exp()
        mask: Mask | None = None
        if not self.symmetric:
            if ids is not None:
                mask = _same_texts(ids[0], ids[1], ids[1:])
            return self.loss(anchors, torch.cat([positives, *negatives]), mask, scale)
        further, further_mask = None, None
        if negatives:
            further = (torch.cat(negatives), None)
        if ids is not None:
            # What is no negative in one direction is none in the other.
            mask = DuplicateMask(ids[1]) | DuplicateMask(ids[0]) | DuplicateMask(ids[0], ids[1])
            mask = mask | DuplicateMask(ids[1], ids[0])
            if negatives:
                further_ids = torch.cat(list(ids[2:]))
                further_mask = (DuplicateMask(ids[1], further_ids) | DuplicateMask(ids[0], further_ids), None)
        return self.loss(anchors, positives, mask, scale, further, further_mask)

    def _config(self) -> Json:
        return {
            "temperature": self._temperature,  # at the start: what it has become is in the record
            "symmetric": self.symmetric,
            "mask_duplicates": self.mask_duplicates,
            "learn_temperature": self.log_scale is not None,
            "normalize": self.loss.normalize,
            "gather_across_devices": self.gather_across_devices,
            **super()._config(),
        }


class SigLipLoss(_SentenceLoss):
    """The pairwise sigmoid loss on (anchor, positive) columns (Zhai et al. 2023): `nearfar.losses.siglip`.

    Args:
        model: the SentenceTransformer that is trained.
        scale, bias: of the logits at the start.
        learn: whether they are trained with the model.
        mask_duplicates, normalize, mini_batch_size: as in `InfoNCELoss`.

    >>> SigLipLoss(nn.Identity()).get_config_dict()["bias"]
    -10.0
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 10.0,
        bias: float = -10.0,
        *,
        learn: bool = True,
        mask_duplicates: bool = False,
        normalize: bool = True,
        mini_batch_size: int | None = None,
    ) -> None:
        if not scale > 0:
            raise NearfarError(f"scale={scale}: a number above 0 is needed; they start at 10.")
        super().__init__(model, nearfar_losses.SigLipLoss(normalize), mini_batch_size)
        self.mask_duplicates, self._start = mask_duplicates, (float(scale), float(bias))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn)

    def _check(self, features: Sequence[Features], labels: Tensor | None) -> None:
        if len(features) != 2:
            raise NearfarError(
                f"SigLipLoss was given {len(features)} columns of texts: it takes two, anchor and positive. For "
                "explicit negatives there is InfoNCELoss."
            )

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None, ids: Sequence[Tensor] | None = None
    ) -> Tensor:
        mask: Mask | None = None
        if ids is not None:
            mask = DuplicateMask(ids[1]) | DuplicateMask(ids[0]) | DuplicateMask(ids[0], ids[1])
            mask = mask | DuplicateMask(ids[1], ids[0])
        return self.loss(embeddings[0], embeddings[1], self.log_scale.exp(), self.bias, mask)

    def _config(self) -> Json:
        scale, bias = self._start
        learn = self.bias.requires_grad
        masked = {"mask_duplicates": self.mask_duplicates, "normalize": self.loss.normalize}
        return {"scale": scale, "bias": bias, "learn": learn, **masked, **super()._config()}


class SupConLoss(_SentenceLoss):
    """The supervised contrastive loss on texts with labels (Khosla et al. 2020): `nearfar.losses.supcon`.

    Args:
        model: the SentenceTransformer that is trained.
        temperature: divides the cosines.
        sum: "outside" the logarithm (all positives), or "inside" (the nearest is enough).
        normalize, mini_batch_size: as in `InfoNCELoss`.

    Rows of the same label are positives of each other. Several columns are several texts of a row, all of its label. A
    label of −1 is missing: the row is a negative of all.

    >>> SupConLoss(nn.Identity()).get_config_dict()["temperature"]
    0.1
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 0.1,
        *,
        sum: str = "outside",
        normalize: bool = True,
        mini_batch_size: int | None = None,
    ) -> None:
        inner = nearfar_losses.SupConLoss(temperature, sum=sum, normalize=normalize)  # type: ignore[arg-type]
        super().__init__(model, inner, mini_batch_size)

    def _check(self, features: Sequence[Features], labels: Tensor | None) -> None:
        if labels is None:
            raise NearfarError(
                "SupConLoss needs a label for each row: a column named 'label' or 'labels' of whole numbers. For pairs "
                "of texts there is InfoNCELoss."
            )

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None, ids: Sequence[Tensor] | None = None
    ) -> Tensor:
        assert labels is not None
        return self.loss(torch.cat(list(embeddings)), labels.reshape(-1).repeat(len(embeddings)))

    def _config(self) -> Json:
        return {"temperature": self.loss.temperature, "sum": self.loss.sum, **super()._config()}


def _same_texts(anchors: Tensor, positives: Tensor, candidates: Sequence[Tensor]) -> Mask:
    """Candidates with the text of a row's own positive or anchor, and positives of rows with the same anchor."""
    every = torch.cat(list(candidates))
    none = anchors.new_full((len(every) - len(anchors),), -1)
    theirs = torch.cat([anchors, none])
    return DuplicateMask(positives, every) | DuplicateMask(anchors, every) | DuplicateMask(anchors, theirs)


def text_ids(features: Sequence[Features]) -> list[Tensor]:
    """A number for each row of each column: the same where the texts are the same to the model.

    >>> a = {"input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    >>> text_ids([a, {"input_ids": torch.tensor([[5, 6], [5, 5]])}])
    [tensor([0, 1]), tensor([0, 2])]
    """
    known: dict[bytes, int] = {}
    result = []
    for column in features:
        tokens = column.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise NearfarError(
                "mask_duplicates=True compares token ids, and a column has no 'input_ids' (rows, tokens); it has "
                f"{', '.join(sorted(map(str, column)))}. Use mask_duplicates=False."
            )
        ids = tokens.detach().cpu().numpy().astype(np.int64)
        kept = column.get("attention_mask")
        used = np.ones(ids.shape, bool) if kept is None else kept.detach().cpu().numpy().astype(bool)
        numbers = [
            known.setdefault(row[own].tobytes(), len(known)) for row, own in zip(ids, used, strict=True)
        ]
        result.append(torch.tensor(numbers, device=tokens.device))
    return result


def _rows(features: Features) -> int:
    """How many rows a column has; NearfarError where it cannot be cut into mini-batches."""
    for name in ("attention_mask", "input_ids"):
        given = features.get(name)
        if isinstance(given, Tensor) and given.ndim == 2 and "cu_seq_lens_q" not in features:
            odd = [
                k for k, v in features.items() if isinstance(v, Tensor) and v.ndim and len(v) != len(given)
            ]
            if not odd:
                return len(given)
            raise NearfarError(
                f"mini_batch_size cuts a batch by rows, and {', '.join(odd)} has a different number of rows than "
                f"{name}: use mini_batch_size=None."
            )
    raise NearfarError(
        "mini_batch_size cuts a batch by rows, and a column has no padded 'input_ids' (rows, tokens): flattened inputs "
        "and static embeddings are encoded at once, with mini_batch_size=None."
    )


def _part(features: Features, begin: int, end: int, rows: int) -> dict[str, Tensor]:
    """Some rows of a column, without the padding that all of them have at their end."""
    part = {
        name: each[begin:end] if isinstance(each, Tensor) and each.ndim and len(each) == rows else each
        for name, each in features.items()
    }
    mask = part.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.any()):
        width, full = int(mask.any(0).nonzero().max()) + 1, mask.shape[1]
        for name, each in part.items():
            if isinstance(each, Tensor) and each.ndim >= 2 and each.shape[1] == full:
                part[name] = each[:, :width]
    return part
