"""Gene expression: as numbers, or as the names of the genes that are expressed most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import nn

from nearfar.data.batch import Inputs, Rows
from nearfar.data.files import Json, read_names
from nearfar.data.items import Column
from nearfar.errors import NearfarError, nearest_name
from nearfar.towers.base import Tower, TowerGraph, read_tower_spec, write_tower_spec
from nearfar.towers.text import TextTower
from nearfar.towers.vector import VectorTower

__all__ = ["EXPRESSION_ENCODERS", "ExpressionTower", "gene_sentences"]

EXPRESSION_ENCODERS = ("numbers", "sentences")


class ExpressionTower(Tower):
    """Rows of gene expression to vectors: counts or their logarithms, a column for each gene.

    Args:
        encoder: "numbers" (the expression itself) or "sentences" (the names of the most expressed genes as a text,
            Cell2Sentence, Levine et al. 2023).
        genes: the names of the columns in order, or a text file with one on each line. "sentences" needs them.
        sentence_genes: how many names a sentence has at most.
        text: of "sentences" the options of its `TextTower`, such as {"encoder": "minilm"}; None takes its default.
        standardize: numbers, and vectors of texts that are not trained, have mean 0 and variance 1 over the training
            rows.

    >>> tower = ExpressionTower(genes=["TP53", "KRT8"]).fit(np.array([[0.0, 5.0], [2.0, 5.0]]))
    >>> tower.build().width, tower.description
    (2, 'expression of 2 genes, standardised by the training rows')
    >>> ExpressionTower("sentences")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: encoder=sentences needs genes: the names of the columns, or a text file with one on ...
    """

    kind = "expression"

    def __init__(
        self,
        encoder: str = "numbers",
        genes: Sequence[str] | str | Path | None = None,
        sentence_genes: int = 50,
        text: Json | None = None,
        standardize: bool = True,
    ) -> None:
        if encoder not in EXPRESSION_ENCODERS:
            raise NearfarError(
                f"encoder={encoder!r} is unknown; {nearest_name(str(encoder), EXPRESSION_ENCODERS)}"
            )
        if isinstance(sentence_genes, bool) or not isinstance(sentence_genes, int) or sentence_genes < 1:
            raise NearfarError(f"sentence_genes={sentence_genes}: a whole number from 1 on is needed.")
        if text is not None and not isinstance(text, Mapping):
            raise NearfarError(
                f"text={text}: options of a text tower are needed, such as text.encoder=minilm."
            )
        if text and encoder != "sentences":
            raise NearfarError("text is for encoder=sentences; numbers need no text encoder.")
        self.encoder_kind, self.sentence_genes, self.genes = encoder, sentence_genes, _names(genes)
        self.text_options = dict(text or {})
        self.text: TextTower | None = None
        if encoder == "sentences":
            if self.genes is None:
                raise NearfarError(
                    "encoder=sentences needs genes: the names of the columns, or a text file with one on each line."
                )
            self.text = TextTower(**self.text_options)
            self.train, self.lr = self.text.train, self.text.lr
        self.rows = VectorTower(standardize)

    @property
    def description(self) -> str:
        how = ", standardised by the training rows" if self.rows.standardize else ""
        if self.text is None:
            known = "genes" if self.genes is None else f"{len(self.genes)} genes"
            return f"expression of {known}{how}"
        how = how if self.text.frozen else ""
        return f"sentences of {self.sentence_genes} gene names: {self.text.description}{how}"

    @property
    def options(self) -> Json:
        return {
            "encoder": self.encoder_kind,
            "genes": self.genes,
            "sentence_genes": self.sentence_genes,
            "text": self.text_options or None,
            "standardize": self.rows.standardize,
        }

    def check(self, values: Column) -> list[str | None]:
        return self.rows.check(values)

    def fit(self, values: Column) -> ExpressionTower:
        """Mean and spread of the training rows, or the text encoder on their sentences."""
        if self.text is None:
            self.rows.fit(self._matrix(values))
            return self
        sentences = self.sentences(values)
        self.text.fit(sentences)
        if self.text.frozen:
            vectors = self.text.read(sentences)
            assert isinstance(vectors, Rows)
            self.rows.fit(vectors.values.numpy())
        return self

    def read(self, values: Column) -> Inputs:
        """Expression as it is, or its sentences as the text encoder reads them."""
        if self.text is None:
            return self.rows.read(self._matrix(values))
        return self.text.read(self.sentences(values))

    def sentences(self, values: Column) -> list[str]:
        """The rows as texts, see `gene_sentences`."""
        assert self.genes is not None
        return gene_sentences(self._matrix(values), self.genes, self.sentence_genes)

    def _matrix(self, values: Column) -> Float[np.ndarray, "n g"]:
        matrix = self.rows.matrix(values)
        if self.genes is not None and len(matrix) and matrix.shape[1] != len(self.genes):
            raise NearfarError(
                f"{matrix.shape[1]} numbers of each item for {len(self.genes)} genes: a name for each column is needed."
            )
        return matrix

    def build(self) -> nn.Module:
        """Standardisation by the training rows; of a text encoder that is trained, its network."""
        if self.text is not None and not self.text.frozen:
            return self.text.build()
        return self.rows.build()

    def reference(self, values: Column) -> Float[np.ndarray, "n d"] | None:
        """Standardised expression; the vectors of sentences before any training, where the encoder has any."""
        if self.text is None:
            return self.rows.reference(self._matrix(values))
        return self.text.reference(self.sentences(values))

    def save(self, folder: Path) -> None:
        self.rows.save(folder / "rows")
        if self.text is not None:
            self.text.save(folder / "text")
        write_tower_spec(folder, self)

    def save_networks(self, folder: Path) -> None:
        if self.text is not None:
            self.text.save_networks(folder / "text")

    def graph(self) -> TowerGraph:
        """Expression as numbers, or its sentences as tokens."""
        genes = {} if self.genes is None else {"genes": self.genes}
        if self.text is None:
            rows = self.rows.graph()
            steps = [
                "expression of the genes in one row, in the order of 'genes', as the training data had it"
            ]
            return replace(
                rows,
                tensors=lambda values: {"values": self._matrix(values)},
                recipe={"kind": self.kind, "steps": steps, **genes},
            )
        inner = self.text.graph()
        first = (
            f"write the names of the {self.sentence_genes} most expressed genes, highest first, equal ones in the "
            "order of 'genes', with spaces between them; 'none' where no gene is expressed"
        )
        return replace(
            inner,
            tensors=lambda values: inner.tensors(self.sentences(values)),
            recipe={**inner.recipe, "kind": self.kind, "steps": [first, *inner.recipe["steps"]], **genes},
        )

    @classmethod
    def load(cls, folder: Path) -> ExpressionTower:
        tower = cls(**read_tower_spec(folder)["options"])
        tower.rows = VectorTower.load(folder / "rows")
        if tower.text is not None:
            tower.text = TextTower.load(folder / "text")
        return tower


def gene_sentences(expression: Float[np.ndarray, "n g"], genes: Sequence[str], count: int) -> list[str]:
    """For each row the names of its ``count`` most expressed genes, highest first, equal ones in order.

    Expression as text (Cell2Sentence, Levine et al. 2023). A row without any expressed gene gets the word "none".

    >>> gene_sentences(np.array([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]), ["TP53", "ERBB2", "KRT8"], 2)
    ['ERBB2 KRT8', 'none']
    """
    order = np.argsort(-expression, axis=1, kind="stable")[:, :count]
    names = np.asarray(genes)
    sentences = []
    for row, best in zip(expression, order, strict=True):
        sentences.append(" ".join(names[best[row[best] > 0]]) or "none")
    return sentences


def _names(genes: Sequence[str] | str | Path | None) -> list[str] | None:
    if genes is None:
        return None
    if isinstance(genes, (str, Path)):
        return read_names(Path(genes).expanduser(), "gene")
    names = [str(gene) for gene in genes]
    if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise NearfarError("genes: a name for each column is needed, each once.")
    return names
