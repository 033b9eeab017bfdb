"""The aspect model (a text encoder, an attention and a head for each aspect) and its linear baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn

from nearfar.data.cache import cached_arrays
from nearfar.models import ProjectionHead
from nearfar.models.projection import Dropout
from nearfar.models.text.words import TokenBatch

__all__ = ["NAME", "AspectAttention", "AspectModel", "linear_answers"]

NAME = "TF-IDF + linear SVM"
_VERSION = 1  # of what is computed here; part of the cache's key


def linear_answers(
    texts: Sequence[str],
    codes: Int[ndarray, "n a"],
    evaluated: Mapping[str, Sequence[str]],
    cache: bool = True,
) -> dict[str, Int[ndarray, "m a"]]:
    """The baseline's answers for the texts in ``evaluated``, fitted on ``texts`` and ``codes``; cached by content.

    Unknown labels (below 0) are left out of the fit of their aspect.

    >>> texts = ["good camera", "bad camera", "good price", "bad price"] * 3
    >>> codes = np.array([[3, 0], [1, 0], [0, 3], [0, 1]] * 3)
    >>> linear_answers(texts, codes, {"val": ["camera good", "price bad"]}, cache=False)["val"].tolist()
    [[3, 0], [0, 1]]
    """

    def fit() -> dict[str, np.ndarray]:
        return _fit(texts, codes, evaluated)

    key = [
        "linear baseline",
        _VERSION,
        list(texts),
        codes,
        {name: list(some) for name, some in evaluated.items()},
    ]
    return cached_arrays("linear-baseline", key, fit, enabled=cache)


def _fit(
    texts: Sequence[str], codes: Int[ndarray, "n a"], evaluated: Mapping[str, Sequence[str]]
) -> dict[str, Int[ndarray, "m a"]]:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    few = 1 if len(texts) < 100 else 2
    parts = [
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=few),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=few),
    ]
    fitted = []
    for part in parts:
        try:
            fitted.append((part, part.fit_transform(texts)))
        except ValueError:  # no term is left: texts of single letters, or no term that stands in two texts
            continue
    if fitted:
        features = hstack([matrix for _, matrix in fitted]).tocsr()
        of = {
            name: hstack([part.transform(some) for part, _ in fitted]).tocsr()
            for name, some in evaluated.items()
        }
    answers = {
        name: np.zeros((len(some), codes.shape[1]), dtype=np.int64) for name, some in evaluated.items()
    }
    for aspect in range(codes.shape[1]):
        known = np.flatnonzero(codes[:, aspect] >= 0)
        classes, counts = np.unique(codes[known, aspect], return_counts=True)
        if len(classes) < 2 or not fitted:
            # One class, or no features: the most frequent class; without any label, not mentioned.
            for predicted in answers.values():
                predicted[:, aspect] = classes[np.argmax(counts)] if len(classes) else 0
            continue
        model = LinearSVC(random_state=0).fit(features[known], codes[known, aspect])
        for name, predicted in answers.items():
            predicted[:, aspect] = model.predict(of[name])
    return answers


class AspectAttention(nn.Module):
    """One query per aspect over the states of the tokens (label-wise attention, Mullenbach et al. 2018, CAML).

    Called with states (b, t, d) and mask (b, t) it gives (b, A, d): one vector for each aspect.

    >>> attention = AspectAttention(aspects=2, width=4)
    >>> attention(torch.ones(1, 3, 4), torch.tensor([[True, True, False]])).shape
    torch.Size([1, 2, 4])
    """

    def __init__(self, aspects: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(aspects, width) * width**-0.5)

    def forward(self, states: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, "b a d"]:
        scores = states @ self.queries.T
        weights = scores.masked_fill(~mask[..., None], float("-inf")).softmax(dim=1)
        return weights.transpose(1, 2) @ states


class AspectModel(nn.Module):
    """``encode`` gives (b, A, d), one vector of the review for each aspect, from which all heads start.

    Args:
        encoder: the module of a text tower, with ``width`` = d, whose ``states`` of a `TokenBatch` are (b, t, d).
        aspects, classes: how many.
        projection_dim: length of the vectors that are contrasted; 0 where nothing is contrasted.
        dropout: before the heads.
    """

    def __init__(
        self,
        encoder: nn.Module,
        aspects: int,
        classes: int,
        *,
        projection_dim: int = 128,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        width = cast(int, encoder.width)
        self.encoder = encoder
        self.attention = AspectAttention(aspects, width)
        self.dropout = Dropout(dropout)
        self.weight = nn.Parameter(torch.randn(aspects, classes, width) * 0.5 * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(aspects, classes))
        self.projection = (
            ProjectionHead(aspects * width, projection_dim, projection_dim, norm="layer")
            if projection_dim
            else None
        )

    def heads(self) -> list[nn.Parameter]:
        """All parameters but the encoder's."""
        own = {id(p) for p in self.encoder.parameters()}
        return [p for p in self.parameters() if id(p) not in own]

    def encode(self, tokens: TokenBatch) -> Float[Tensor, "b a d"]:
        """A review as one vector for each aspect."""
        states: Tensor = self.encoder.states(tokens)  # type: ignore[operator]
        return self.attention(states, tokens.mask)

    def classify(self, aspects: Float[Tensor, "b a d"]) -> Float[Tensor, "b a c"]:
        """Logits of the classes of each aspect."""
        return torch.einsum("bad,acd->bac", self.dropout(aspects), self.weight) + self.bias

    def project(self, aspects: Float[Tensor, "b a d"]) -> Float[Tensor, "b p"] | None:
        """What is contrasted, not normalised; None without a contrastive term."""
        return None if self.projection is None else self.projection(aspects.flatten(1))
