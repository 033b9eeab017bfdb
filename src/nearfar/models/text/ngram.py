"""The embedded default: TF-IDF over characters or words, then a truncated SVD. It needs no weights.

Character n-grams see inside systematic names ("dichlorophenyl", "hydroxyphenyl"), where most of the
information about a molecule stands, and short ones are the words of prose as well. On ChEBI-20 prose (half
of the 3,301 validation rows to train, half as gallery; Morgan fingerprints and a small network) they
retrieved better than words and better than both: MRR .43 against .31 and .39 at 256 dimensions. With a
stronger molecule encoder more dimensions went on helping (512: .737, 1,024: .748, 2,000: .764), and scaling
the axes by the power .5 of their singular values instead of 1 did not (.747 against .766).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from nearfar.data.cache import cached_arrays, content_key
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.models.text.protocol import check_number, read_spec, write_spec

if TYPE_CHECKING:
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

__all__ = ["NgramTextEncoder"]

_VERSION = 3  # of this file's computation; part of every cache key
_EXACT_UP_TO = 6_000  # texts whose Gram matrix is decomposed instead
_ARRAYS_FILE = "text_encoder.npz"
# What scikit-learn says when nothing is left to count; its other errors are not about the texts.
_NO_TERMS = ("no terms remain", "empty vocabulary", "max_df corresponds to < documents than min_df")
_POWER_ITERATIONS = 2  # each is a pass over the texts; four scored the same in retrieval


class NgramTextEncoder:
    """Latent semantic analysis of word and character n-grams (Deerwester et al., 1990).

    Args:
        dims: length of the vectors; at most one less than the texts and terms that ``fit`` sees, in which
            case ``description`` says so. The defaults are those of ``configs/text_encoder/ngram.yaml``.
        words: shortest and longest word n-gram, ``None`` for no words (the default).
        chars: the same for characters inside word boundaries.
        min_df: a term must stand in this many training texts.
        max_df: and in at most this share of them (1 is all of them).
        max_features: the most frequent terms kept, of words and of characters each; ``None`` keeps all.
        word_weight: how much the word part weighs beside the character part.
        singular_power: axis j is scaled by its singular value to this power: 1 is classical LSA (the
            default), 0 whitens.
        seed: of the randomised SVD.

    ``encode`` gives rows of unit length; a text without a single known term is a row of zeros.

    >>> texts = ["a chlorinated phenol", "a methyl phenol", "an acyclic alcohol", "a chlorinated alcohol"]
    >>> encoder = NgramTextEncoder(dims=2, min_df=1).fit(texts)
    >>> encoder.encode(["a brominated phenol"]).shape
    (1, 2)
    """

    kind = "ngram"

    def __init__(
        self,
        dims: int = 2048,
        words: tuple[int, int] | None = None,
        chars: tuple[int, int] | None = (3, 5),
        min_df: int = 2,
        max_df: float = 0.5,
        max_features: int | None = 20_000,
        word_weight: float = 1.0,
        singular_power: float = 1.0,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        check_number("dims", dims, 1)
        check_number("min_df", min_df, 1)
        check_number("max_df", max_df, 0, 1, whole=False)
        if max_features is not None:
            check_number("max_features", max_features, 1)
        check_number("word_weight", word_weight, 0, whole=False)
        check_number("singular_power", singular_power, 0, whole=False)
        check_number("seed", seed, 0, 2**32 - 1)
        if words is None and chars is None:
            raise NearfarError("text_encoder: words and chars cannot both be switched off.")
        _check_span("words", words)
        _check_span("chars", chars)
        self.options: Json = {
            "dims": dims,
            "words": None if words is None else list(words),
            "chars": None if chars is None else list(chars),
            "min_df": min_df,
            "max_df": float(max_df),  # scikit-learn reads a whole number as a count of texts
            "max_features": max_features,
            "word_weight": word_weight,
            "singular_power": singular_power,
            "seed": seed,
        }
        self._cache = cache
        self._fitted_on = ""  # key of the training texts
        self._blocks: list[
            tuple[float, TfidfVectorizer]
        ] = []  # (weight, vectoriser), in the order of the columns
        self._axes: np.ndarray | None = None  # (terms, d): right singular vectors, scaled

    @property
    def name(self) -> str:
        return "ngram"

    @property
    def description(self) -> str:
        parts = [
            f"{part} {span[0]}–{span[1]}-grams"
            for part, span in (("word", self.options["words"]), ("character", self.options["chars"]))
            if span is not None
        ]
        requested = self.options["dims"]
        if self._axes is None:
            return (
                f"TF-IDF over {' and '.join(parts)}, truncated SVD to {requested} dimensions (not fitted yet)"
            )
        terms, dims = self._axes.shape
        short = f", not {requested}: the training texts span no more" if dims < requested else ""
        return f"TF-IDF over {' and '.join(parts)} ({terms} terms), truncated SVD to {dims} dimensions{short}"

    def fit(self, texts: Sequence[str]) -> NgramTextEncoder:
        """Learn the terms, their weights and the axes from the training texts (kept in the cache)."""
        if len(texts) < 2:
            raise NearfarError(f"text_encoder=ngram is fitted on the training texts; it got {len(texts)}.")
        key = [_VERSION, self.options, list(texts)]
        self._restore(cached_arrays("text-ngram", key, lambda: self._fit(texts), self._cache))
        self._fitted_on = content_key(key)
        return self

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """(n, d) float32, rows of unit length."""
        if self._axes is None:
            raise NearfarError("text_encoder=ngram was not fitted: call fit(training_texts) or load it.")
        rows = [
            np.asarray(self._terms(texts[start : start + 4096]) @ self._axes, dtype=np.float32)
            for start in range(0, len(texts), 4096)
        ]
        out = np.concatenate(rows) if rows else np.zeros((0, self._axes.shape[1]), np.float32)
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return out / np.where(norms > 0, norms, 1)

    def fingerprint(self) -> str:
        if not self._fitted_on:
            raise NearfarError("text_encoder=ngram has no fingerprint before fit.")
        return f"ngram-{_VERSION}-{self._fitted_on[:32]}"

    def save(self, folder: str | Path) -> None:
        write_spec(folder, {"kind": self.kind, "options": self.options, "fitted_on": self._fitted_on})
        np.savez(Path(folder) / _ARRAYS_FILE, **self._state())  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: str | Path) -> NgramTextEncoder:
        """The encoder that ``save`` wrote."""
        spec = read_spec(folder)
        encoder = cls(**spec["options"])
        with np.load(Path(folder) / _ARRAYS_FILE, allow_pickle=False) as arrays:
            encoder._restore({name: arrays[name] for name in arrays.files})
        encoder._fitted_on = spec["fitted_on"]
        return encoder

    def _fit(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        from scipy import sparse

        self._blocks = []
        parts = []
        for weight, vectorizer in self._vectorizers():
            try:
                parts.append(vectorizer.fit_transform(texts) * np.float32(weight))
            except ValueError as error:
                if not any(words in str(error) for words in _NO_TERMS):
                    raise
                continue  # no term survives min_df and max_df: this part says nothing
            self._blocks.append((weight, vectorizer))
        if not self._blocks:
            raise NearfarError(
                f"No term stands in at least {self.options['min_df']} of the {len(texts)} training texts and "
                f"in at most {self.options['max_df']:.0%} of them. Set text_encoder.min_df=1 or raise max_df."
            )
        matrix = sparse.hstack(parts, format="csr")
        dims = min(self.options["dims"], min(matrix.shape) - 1) or 1
        values, axes = _right_singular_vectors(matrix, dims, self.options["seed"])
        real = values > values[0] * 1e-5  # axes beyond the rank of the texts are noise
        scale = values[real] ** (self.options["singular_power"] - 1)
        scale = (
            scale / scale[0]
        )  # rows are brought to unit length: only ratios matter, and float16 has its range
        # Rounded to what is stored, so that a saved encoder gives the very vectors that training saw.
        self._axes = np.ascontiguousarray((axes[real] * scale[:, None]).T, dtype=np.float16).astype(
            np.float32
        )
        return self._state()

    def _vectorizers(self) -> list[tuple[float, TfidfVectorizer]]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        options = self.options
        common: Json = {
            "min_df": options["min_df"],
            "max_df": options["max_df"],
            "max_features": options["max_features"],
            "sublinear_tf": True,
            "dtype": np.float32,
        }
        parts: list[tuple[float, TfidfVectorizer]] = []
        if options["words"] is not None:
            # Unlike the default pattern this keeps one-letter words and digits: locants are words here.
            vectorizer = TfidfVectorizer(ngram_range=tuple(options["words"]), token_pattern=r"\w+", **common)
            parts.append((options["word_weight"], vectorizer))
        if options["chars"] is not None:
            vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=tuple(options["chars"]), **common)
            parts.append((1.0, vectorizer))
        return parts

    def _terms(self, texts: Sequence[str]) -> sparse.csr_matrix:
        from scipy import sparse

        return sparse.hstack([v.transform(texts) * np.float32(w) for w, v in self._blocks], format="csr")

    def _state(self) -> dict[str, np.ndarray]:
        assert self._axes is not None
        state: dict[str, np.ndarray] = {"axes": self._axes.astype(np.float16)}
        for _, vectorizer in self._blocks:
            part = "words" if vectorizer.analyzer == "word" else "chars"
            terms = json.dumps(list(vectorizer.get_feature_names_out())).encode()
            state[f"{part}_terms"] = np.frombuffer(terms, dtype=np.uint8)
            state[f"{part}_idf"] = np.asarray(vectorizer.idf_, dtype=np.float32)
        return state

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        self._axes = state["axes"].astype(np.float32)
        self._blocks = []
        for weight, vectorizer in self._vectorizers():
            part = "words" if vectorizer.analyzer == "word" else "chars"
            if f"{part}_terms" in state:
                vectorizer.vocabulary = json.loads(state[f"{part}_terms"].tobytes())
                vectorizer.idf_ = state[f"{part}_idf"]
                self._blocks.append((weight, vectorizer))


def _check_span(option: str, span: object) -> None:
    """Raise unless ``span`` is None or two whole numbers that do not fall."""
    if span is None:
        return
    if (
        not isinstance(span, Sequence)
        or isinstance(span, str)
        or len(span) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in span)
        or not 1 <= span[0] <= span[1]
    ):
        raise NearfarError(
            f"text_encoder.{option}={span}: the shortest and the longest n-gram are needed, such as [1, 2]; "
            "null switches it off."
        )


def _right_singular_vectors(matrix: sparse.csr_matrix, dims: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Singular values, falling, and right singular vectors (dims, terms) of a sparse (texts, terms) matrix.

    Few texts: exactly, from the eigenvectors of the small Gram matrix, which for thousands of axes is also faster.
    """
    if matrix.shape[0] > _EXACT_UP_TO:
        from sklearn.utils.extmath import randomized_svd

        _, values, axes = randomized_svd(matrix, dims, n_iter=_POWER_ITERATIONS, random_state=seed)
        return values, axes
    from scipy.linalg import eigh

    texts = matrix.shape[0]
    gram = (matrix @ matrix.T).toarray().astype(np.float64)
    squares, left = eigh(gram, subset_by_index=[texts - dims, texts - 1])
    order = np.argsort(squares)[::-1]
    values = np.sqrt(np.maximum(squares[order], 0.0))
    left = left[:, order] * np.sign(left[:, order].sum(axis=0) + 1e-12)  # eigenvectors come with either sign
    axes = (matrix.T @ left).T / np.maximum(values, 1e-12)[:, None]
    return values, axes
