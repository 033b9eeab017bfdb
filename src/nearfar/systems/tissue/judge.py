"""All numbers of a split: retrieval, the loss of CLIP, predicted expression, and ridge regression on colour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.systems.tissue.colors import ridge_predictions
from nearfar.systems.tissue.data import TissueData
from nearfar.systems.tissue.evaluation import Scores, information, retrieval
from nearfar.systems.tissue.expression import pearson_estimate, retrieved_expression
from nearfar.systems.tissue.features import color_features
from nearfar.training.system import Evaluation

__all__ = ["RIDGE", "Judge", "chosen_genes"]

#: the baseline's name among the metrics
RIDGE = "ridge/gene_pearson"


def chosen_genes(
    expression: Float[np.ndarray, "n g"], variable: int, expressed: int
) -> dict[str, Int[np.ndarray, " c"]]:
    """Genes to average over: most variable, and most expressed, over the training spots; positions in falling order.

    >>> chosen = chosen_genes(np.array([[0.0, 5.0, 1.0], [4.0, 5.0, 2.0]]), 2, 1)
    >>> {name: genes.tolist() for name, genes in chosen.items()}
    {'variable': [0, 2], 'expressed': [1]}
    """
    ranked = {
        "variable": (expression.var(axis=0), variable),
        "expressed": (expression.mean(axis=0), expressed),
    }
    return {name: np.argsort(-by, kind="stable")[:count] for name, (by, count) in ranked.items()}


class Judge:
    """Judges a split by embeddings of it and of the training spots.

    ``references``: embeddings of the training spots' expression by the weights that are judged, (n, d).
    """

    references: Tensor

    def __init__(self, config: Any, data: TissueData) -> None:
        self.config, self.data = config, data
        train = data.splits["train"]
        self.retrieve = min(config.retrieve, len(train))
        self.genes = chosen_genes(train.expression, config.variable_genes, config.expressed_genes)
        self._ridge: dict[str, Float[np.ndarray, "n g"]] = {}

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Estimates of a split; ``final`` asks for resampled intervals and for the baseline."""
        tissue, split_hash = self.data.splits[split], self.data.hash_of(split)
        images, genes = outputs["images"], outputs["genes"]
        resamples = self.config.bootstrap if final else 0
        found = retrieval(
            images,
            genes,
            tissue.slides,
            tissue.slide_names,
            tissue.neighbors,
            split=split_hash,
            bootstrap=resamples,
        )
        scale = float(outputs["scale"].double().mean())
        estimate, values = information(images, genes, scale, split=split_hash)
        found.estimates["information"], found.per_item["information"] = estimate, values
        predicted = self.retrieved(images)
        self._correlate(found, predicted, split, "gene_pearson", {"retrieve": self.retrieve}, resamples)
        facts: dict[str, Any] = {}
        if final:
            beside = Scores()
            self._correlate(
                beside, self.ridge(split), split, RIDGE, {"ridge": "colour statistics"}, resamples
            )
            found.estimates |= beside.estimates
            facts = {"slides": found.by_slide | beside.by_slide}
        return Evaluation(split, found.estimates, tissue.ids, found.per_item, facts)

    def retrieved(self, images: Tensor) -> Float[np.ndarray, "n g"]:
        """Expression of patches: the mean of the nearest training spots'."""
        return retrieved_expression(
            images, self.references, self.data.splits["train"].expression, self.retrieve
        )

    def ridge(self, split: str) -> Float[np.ndarray, "n g"]:
        """Expression of a split's patches by ridge regression on their colour statistics; no network."""
        if split not in self._ridge:
            train, test = self.data.splits["train"], self.data.splits[split]
            features = [color_features(part) for part in (train, test)]
            self._ridge[split] = ridge_predictions(features[0], train.expression, features[1])
        return self._ridge[split]

    def _correlate(
        self,
        found: Scores,
        predicted: Float[np.ndarray, "n g"],
        split: str,
        metric: str,
        protocol: dict[str, Any],
        resamples: int,
    ) -> None:
        tissue = self.data.splits[split]
        for kind, genes in self.genes.items():
            name = f"{metric}/{kind}"
            found.estimates[name], found.per_item[name], by_slide = pearson_estimate(
                predicted[:, genes], tissue.expression[:, genes], tissue.slides, name,
                split=self.data.hash_of(split), protocol=protocol, resamples=resamples,
            )  # fmt: skip
            found.by_slide[name] = {tissue.slide_names[slide]: value for slide, value in by_slide.items()}

    def values_of_ridge(self, split: str) -> dict[str, Float[np.ndarray, " n"]]:
        """The values of the spots behind the baseline's correlations, by the metric's name."""
        found = Scores()
        self._correlate(found, self.ridge(split), split, RIDGE, {}, 0)
        return found.per_item
