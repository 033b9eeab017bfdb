"""A trained run as a model of mteb, which then evaluates it as any other.

mteb's results are means of tasks. For an honest comparison of two models let it write what was ranked for each query
(``prediction_folder=``) and give both files to ``nearfar compare --qrels``.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import normalize

from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError, nearest_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Float
    from mteb.models.model_meta import ModelMeta
    from numpy.typing import ArrayLike
    from torch import Tensor

    from nearfar.serving.trained import Trained

__all__ = ["RunEncoder", "encoder"]

#: columns of mteb's batches that the towers of these kinds read
_COLUMNS = {"text": "text", "image": "image"}


def encoder(
    run: str | Path | Trained,
    query_view: str | None = None,
    document_view: str | None = None,
    *,
    device: str = "auto",
    batch_size: int | None = None,
) -> RunEncoder:
    """A model for ``mteb.evaluate``: ``mteb.evaluate(encoder("runs/mine"), tasks, prediction_folder="predictions")``.

    Args:
        run: a run folder, an exported one, a name on the Hugging Face hub, or what ``nearfar.load`` gives.
        query_view, document_view: the views whose towers encode queries and documents; by default the run's only view
            of texts. Everything that mteb calls neither is encoded as a query.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        batch_size: values that are encoded at once, by default the run's.

    Raises:
        NearfarError: mteb is not installed, the run has no such view, or several and none is named.
    """
    return RunEncoder(run, query_view, document_view, device=device, batch_size=batch_size)


class RunEncoder:
    """What `encoder` makes: mteb's protocol of encoders on a trained run.

    ``rejections`` counts the values that could not be encoded, such as empty texts. Their vectors are zero, so that
    they are like nothing, and a warning says how many there are.
    """

    def __init__(
        self,
        run: str | Path | Trained,
        query_view: str | None = None,
        document_view: str | None = None,
        *,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        try:
            import mteb  # noqa: F401
        except ImportError:
            raise NearfarError("mteb is not installed: pip install mteb") from None
        if isinstance(run, (str, Path)):
            from nearfar.serving.trained import load

            run = load(run, device)
        self.trained, self.batch_size = run, batch_size
        self.query_view = self._view(query_view, "query_view")
        self.document_view = self._view(document_view or query_view, "document_view")
        self.rejections = Rejections()
        self._meta: ModelMeta | None = None

    def _view(self, wanted: str | None, name: str) -> str:
        views = [view for view in self.trained.views if self.trained.kind(view) in _COLUMNS]
        if wanted is not None:
            if wanted not in views:
                raise NearfarError(f"{name} is {wanted!r}: {nearest_name(wanted, views)}")
            return wanted
        texts = [view for view in views if self.trained.kind(view) == "text"]
        if len(texts) != 1:
            known = ", ".join(f"{view} ({self.trained.kind(view)})" for view in self.trained.views) or "none"
            raise NearfarError(
                f"{self.trained.name} has the views {known}: say which one encodes what, as query_view= and "
                "document_view=; mteb has texts and pictures"
            )
        return texts[0]

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[object]]],
        *,
        task_metadata: object = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: object = None,
        **options: Any,
    ) -> Float[np.ndarray, "n dim"]:
        """Unit vectors of mteb's batches, in their order; documents by their own view."""
        view = (
            self.document_view
            if getattr(prompt_type, "value", prompt_type) == "document"
            else self.query_view
        )
        column = _COLUMNS[self.trained.kind(view)]
        size = self.batch_size or options.get("batch_size")
        vectors = [self._vectors(batch, column, view, size) for batch in inputs]
        if len(self.rejections):
            warnings.warn(
                f"{self.trained.name} as a model of mteb: {self.rejections.summary()}; their vectors are zero",
                stacklevel=2,
            )
        return np.concatenate(vectors) if vectors else np.zeros((0, self.trained.dim), np.float32)

    def _vectors(
        self, batch: Mapping[str, Sequence[object]], column: str, view: str, size: int | None
    ) -> np.ndarray:
        if column not in batch:
            raise NearfarError(
                f"this task's batches have {', '.join(batch)} and no {column}, which the view '{view}' reads"
            )
        values: Sequence[object] = list(batch[column])
        if column == "image":
            values = [
                np.asarray(each.convert("RGB")) if hasattr(each, "convert") else each for each in values
            ]
        reasons = self.trained.check(values, view)
        good = [i for i, reason in enumerate(reasons) if reason is None]
        vectors = np.zeros((len(values), self.trained.dim), np.float32)
        if good:
            vectors[good] = self.trained.vectors([values[i] for i in good], view, batch_size=size)
        for i, reason in enumerate(reasons):
            if reason is not None:
                self.rejections.add(reason, None, values[i] if column == "text" else "")
        return vectors

    def similarity(self, embeddings1: ArrayLike | Tensor, embeddings2: ArrayLike | Tensor) -> Tensor:
        """Cosines of all pairs."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: ArrayLike | Tensor, embeddings2: ArrayLike | Tensor) -> Tensor:
        """Cosines of rows at the same place."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(-1)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Name, revision (of the weights, so that mteb's cache notices a different training) and sizes."""
        if self._meta is None:
            from mteb.models.model_meta import ModelMeta, ScoringFunction

            kinds = {self.trained.kind(view) for view in (self.query_view, self.document_view)}
            models = [member.model for member in self.trained.members]
            self._meta = ModelMeta.create_empty(
                {
                    "name": f"nearfar/{self.trained.name}",
                    "revision": _revision(models, (self.query_view, self.document_view)),
                    "n_parameters": sum(p.numel() for model in models for p in model.parameters()),
                    "embed_dim": self.trained.dim,
                    "framework": ["PyTorch"],
                    "similarity_fn_name": ScoringFunction.COSINE,
                    "modalities": sorted(kinds),
                }
            )
        return self._meta


def _unit(vectors: ArrayLike | Tensor) -> Tensor:
    return normalize(torch.atleast_2d(torch.as_tensor(vectors).float()), dim=-1)


def _revision(models: Sequence[torch.nn.Module], views: tuple[str, str]) -> str:
    digest = hashlib.sha256(repr(views).encode())
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            if isinstance(value, torch.Tensor):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
