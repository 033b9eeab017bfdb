"""First vectors for words and pieces: what stands around them in the training texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from nearfar.models.text.words import UNKNOWN, WordVocabulary

__all__ = ["context_vectors"]

_WINDOW = 5  # words to either side; a word at distance k counts 1 / k
_CONTEXTS = 3000  # the most frequent words serve as contexts
_SMOOTHING = 0.75  # power of the contexts' frequencies
_PRIOR = 5.0  # a row of total count n keeps n / (n + 5) of its information: rare words say little


def context_vectors(
    vocabulary: WordVocabulary, texts: Sequence[str], dims: int
) -> tuple[Float[ndarray, "words d"], Float[ndarray, "pieces d"]]:
    """Vectors of words and of pieces by a truncated SVD of positive pointwise mutual information.

    Levy and Goldberg (2014) show that skip-gram factorises this matrix; with a few thousand texts the factorisation
    needs a few seconds. The row of a piece is the sum of the rows of its words: it lies in the space of the words, and
    so does an unknown word made of pieces. Entries of words have a root mean square of 1;
    dimensions beyond the number of contexts are 0. Row 0 of the pieces and rows 0 and 1 of the words are 0.

    >>> vocabulary = WordVocabulary.fit(["pin trâu", "pin khỏe", "màn hình đẹp"], min_piece_count=1)
    >>> words, pieces = context_vectors(vocabulary, ["pin trâu", "pin khỏe", "màn hình đẹp"], 2)
    >>> words.shape == (8, 2), len(pieces) == len(vocabulary.pieces) + 1
    (True, True)
    """
    from scipy import sparse

    words = len(vocabulary.words) + UNKNOWN + 1
    together = _cooccurrence([np.asarray(vocabulary.rows(text)) for text in texts], words)
    found = [vocabulary.pieces_of(word) for word in vocabulary.words]
    columns = np.repeat(np.arange(UNKNOWN + 1, words), [len(row) for row in found])
    rows = np.asarray([piece for row in found for piece in row], dtype=np.int64)
    members = sparse.csr_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=(len(vocabulary.pieces) + 1, words)
    )
    frequency = np.asarray(together.sum(axis=0)).ravel()
    contexts = np.argsort(-frequency, kind="stable")[:_CONTEXTS]
    contexts = contexts[frequency[contexts] > 0]
    shape = (words + len(vocabulary.pieces) + 1, dims)
    vectors = np.zeros(shape, dtype=np.float32)
    if len(contexts):
        counts = sparse.vstack([together, members @ together]).tocsc()[:, contexts].tocoo()
        information = _positive_information(counts, frequency[contexts] ** _SMOOTHING)
        axes = _axes(information[:words], dims)
        vectors[:, : axes.shape[1]] = information @ axes
        vectors /= max(float(np.sqrt((vectors[:words] ** 2).mean())), 1e-9)
    vectors[: UNKNOWN + 1] = 0
    vectors[words] = 0
    return vectors[:words], vectors[words:]


def _cooccurrence(texts: Sequence[ndarray], words: int) -> Any:
    """(words, words), symmetric: how often two words stand near each other, weighted by 1 / distance."""
    from scipy import sparse

    total = sparse.csr_matrix((words, words), dtype=np.float64)
    for distance in range(1, _WINDOW + 1):
        long = [text for text in texts if len(text) > distance]
        if not long:
            break
        left = np.concatenate([text[:-distance] for text in long])
        right = np.concatenate([text[distance:] for text in long])
        known = (left > UNKNOWN) & (right > UNKNOWN)
        weights = np.full(int(known.sum()), 1 / distance)
        pairs = sparse.csr_matrix((weights, (left[known], right[known])), shape=(words, words))
        total = total + pairs + pairs.T
    return total.tocsr()


def _positive_information(counts: Any, contexts: ndarray) -> Any:
    from scipy import sparse

    rows = np.asarray(counts.sum(axis=1)).ravel()
    share = contexts / contexts.sum()
    value = np.log(counts.data / (rows[counts.row] * share[counts.col]))
    value = np.maximum(value, 0) * rows[counts.row] / (rows[counts.row] + _PRIOR)
    return sparse.csr_matrix((value, (counts.row, counts.col)), shape=counts.shape)


def _axes(matrix: Any, dims: int) -> Float[ndarray, "contexts d"]:
    """Right singular vectors over the root of their singular values, so that rows times these are U √S."""
    from sklearn.utils.extmath import randomized_svd

    dims = min(dims, *matrix.shape)
    _, values, axes = randomized_svd(matrix, dims, n_iter=3, random_state=0)
    real = values > values[0] * 1e-6
    axes = axes[real] / np.sqrt(values[real])[:, None]
    return np.asarray(axes.T)
