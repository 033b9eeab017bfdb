"""The linear baseline that stands beside every result: TF-IDF of words and characters, a linear SVM per aspect.

Word 1–2-grams and character 2–5-grams (inside words) of the training texts, and for each aspect a one-against-the-rest
linear SVM over its classes (Fan et al. 2008, LIBLINEAR). It has no options to tune: it is a mark, not a competitor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from nearfar.data.cache import cached_arrays

__all__ = ["NAME", "linear_answers"]

NAME = "TF-IDF + linear SVM"
_VERSION = 1  # of what is computed here; part of the cache's key


def linear_answers(
    texts: Sequence[str],
    codes: Int[ndarray, "n a"],
    asked: Mapping[str, Sequence[str]],
    cache: bool = True,
) -> dict[str, Int[ndarray, "m a"]]:
    """The baseline's answers for each list of texts in ``asked``; fitted on ``texts`` and ``codes``, kept by content.

    Labels that are not known (below 0) are left out of their aspect's fit.

    >>> texts = ["good camera", "bad camera", "good price", "bad price"] * 3
    >>> codes = np.array([[3, 0], [1, 0], [0, 3], [0, 1]] * 3)
    >>> linear_answers(texts, codes, {"val": ["camera good", "price bad"]}, cache=False)["val"].tolist()
    [[3, 0], [0, 1]]
    """

    def fit() -> dict[str, np.ndarray]:
        return _fit(texts, codes, asked)

    key = [
        "linear baseline",
        _VERSION,
        list(texts),
        codes,
        {name: list(some) for name, some in asked.items()},
    ]
    return cached_arrays("linear-baseline", key, fit, enabled=cache)


def _fit(
    texts: Sequence[str], codes: Int[ndarray, "n a"], asked: Mapping[str, Sequence[str]]
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
            name: hstack([part.transform(some) for part, _ in fitted]).tocsr() for name, some in asked.items()
        }
    answers = {name: np.zeros((len(some), codes.shape[1]), dtype=np.int64) for name, some in asked.items()}
    for aspect in range(codes.shape[1]):
        known = np.flatnonzero(codes[:, aspect] >= 0)
        classes, counts = np.unique(codes[known, aspect], return_counts=True)
        if len(classes) < 2 or not fitted:
            # Nothing to tell apart, or nothing to tell it by: the commonest class; without any label, not mentioned.
            for found in answers.values():
                found[:, aspect] = classes[np.argmax(counts)] if len(classes) else 0
            continue
        model = LinearSVC(random_state=0).fit(features[known], codes[known, aspect])
        for name, found in answers.items():
            found[:, aspect] = model.predict(of[name])
    return answers
