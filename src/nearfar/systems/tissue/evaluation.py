"""Metrics of a split: retrieval, the contrastive loss, expression predicted by retrieval and by ridge regression.

Predicted expression follows the protocol of BLEEP (Xie et al., NeurIPS 2023): a patch gets the mean expression of the
training spots whose gene embeddings are nearest to its image embedding. Each gene is correlated over the spots of a
slide, and the correlations are averaged over genes, then over slides. The training spots are kept with a run, for new
patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.data.batch import Rows
from nearfar.data.files import Json, read_json, write_atomically, write_text
from nearfar.errors import NearfarError
from nearfar.functional import info_nce
from nearfar.metrics import Estimate, Ranks, few_runs, rank_estimates, retrieval_ranks
from nearfar.metrics.correlation import pearson_estimate
from nearfar.metrics.intervals import t_quantile
from nearfar.models.probes import retrieved_expression, ridge_predictions
from nearfar.systems.tissue.data import TissueData
from nearfar.systems.tissue.options import TissueOptions
from nearfar.towers.image import ImageTower
from nearfar.training.system import Evaluation

__all__ = [
    "DIRECTIONS",
    "KS",
    "MOST_BYTES",
    "RIDGE",
    "Evaluator",
    "References",
    "Scores",
    "chosen_genes",
    "information",
    "retrieval",
]


FOLDER = "references"
#: expression of more bytes than this is not kept with the run, but read from its data; 130,000 spots of 1,000 genes
MOST_BYTES = 2**29


@dataclass(frozen=True)
class References:
    """Training spots: embeddings (n, d) of their expression by the best weights, and their expression (n, g).

    ``retrieve``: how many of the nearest are averaged for a patch.
    """

    embeddings: Float[Tensor, "n d"]
    expression: Float[np.ndarray, "n g"]
    retrieve: int

    def predict(self, images: Float[Tensor, "m d"]) -> Float[np.ndarray, "m g"]:
        """Expression of patches from their embeddings, as the evaluation of the run predicts it."""
        return retrieved_expression(images, self.embeddings, self.expression, self.retrieve)

    def save(self, folder: Path) -> bool:
        """Write the folder ``references``, 4 bytes a number; False where that would be more than ``MOST_BYTES``."""
        if self.expression.nbytes > MOST_BYTES:
            return False
        arrays = {"embeddings": self.embeddings.numpy(), "expression": np.asarray(self.expression)}
        for name, array in arrays.items():
            write_atomically(folder / FOLDER / f"{name}.npy", partial(_write, np.ascontiguousarray(array)))
        write_text(folder / FOLDER / "references.json", f'{{"retrieve": {self.retrieve}}}\n')
        return True

    @classmethod
    def load(cls, folder: Path, genes: int) -> References | None:
        """What ``save`` wrote, its expression mapped from disk; None where there is nothing.

        Raises:
            NearfarError: files that are damaged or do not belong together.
        """
        about = folder / FOLDER / "references.json"
        if not about.is_file():
            return None
        retrieve = read_json(about, {"retrieve": int})["retrieve"]
        embeddings, expression = (
            _mapped(folder / FOLDER / f"{name}.npy") for name in ("embeddings", "expression")
        )
        n = len(embeddings)
        if expression.shape != (n, genes) or embeddings.ndim != 2 or not 1 <= retrieve <= n:
            raise NearfarError(
                f"{folder / FOLDER}: {expression.shape} expression and {embeddings.shape} embeddings do not belong to "
                f"{genes} genes: a file was exchanged or damaged."
            )
        return cls(torch.from_numpy(np.array(embeddings)), expression, retrieve)


def _write(array: np.ndarray, file: IO[bytes]) -> None:
    np.lib.format.write_array(file, array, allow_pickle=False)


def _mapped(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NearfarError(
            f"{path} cannot be read ({error}): the file is missing, cut off or damaged."
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 2:
        raise NearfarError(f"{path} is no matrix of float32: a file was exchanged or damaged.")
    return array


KS = (1, 5, 10)
DIRECTIONS = ("image_to_gene", "gene_to_image")


@dataclass
class Scores:
    """Estimates, the scores of single spots behind them, and means of single slides, all by the metric's name."""

    estimates: dict[str, Estimate] = field(default_factory=dict)
    per_item: dict[str, np.ndarray] = field(default_factory=dict)
    by_slide: dict[str, dict[str, float]] = field(default_factory=dict)


def retrieval(
    images: Float[Tensor, "n d"],
    genes: Float[Tensor, "n d"],
    slides: Int[np.ndarray, " n"],
    names: Sequence[str],
    neighbors: Int[np.ndarray, "n k"],
    *,
    split: str,
    bootstrap: int,
) -> Scores:
    """R@k, MRR and median rank in both directions, with three galleries and answers.

    - ``image_to_gene/R@k``: the whole split as gallery; the own spot is right.
    - ``own_slide/image_to_gene/R@k``: the query's own slide as gallery (split of several slides alone); the interval
      is over slides, each slide's mean is in ``by_slide``.
    - ``vicinity/image_to_gene/R@k``: the whole split; the own spot or one of its neighbours is right.

    ``neighbors`` are positions in the split, -1 for none.
    """
    scores = Scores()
    both = retrieval_ranks(images, genes, both=True)
    for direction, ranks in zip(DIRECTIONS, both, strict=True):
        _add(scores, direction, ranks, split, bootstrap)
    near = [[at, *(j for j in row if j >= 0)] for at, row in enumerate(neighbors.tolist())]
    both = retrieval_ranks(images, genes, near, both=True)
    for direction, ranks in zip(DIRECTIONS, both, strict=True):
        _add(scores, f"vicinity/{direction}", ranks, split, bootstrap)
    if len(names) > 1:
        _own_slides(scores, images, genes, slides, names, split)
    else:
        for direction in DIRECTIONS:
            for metric in (*(f"R@{k}" for k in KS), "MRR"):
                name = f"{direction}/{metric}"
                scores.by_slide[name] = {names[0]: scores.estimates[name].value}
    return scores


def _add(scores: Scores, name: str, ranks: Ranks, split: str, bootstrap: int) -> None:
    numbers = rank_estimates(ranks, KS, bootstrap=bootstrap, split=split)
    scores.estimates |= {f"{name}/{metric}": estimate for metric, estimate in numbers.items()}
    scores.per_item |= {f"{name}/R@{k}": ranks.hits(k) for k in KS}
    scores.per_item[f"{name}/MRR"] = ranks.reciprocal()


def _own_slides(
    scores: Scores,
    images: Float[Tensor, "n d"],
    genes: Float[Tensor, "n d"],
    slides: Int[np.ndarray, " n"],
    names: Sequence[str],
    split: str,
) -> None:
    """Each slide a gallery of its own, and the mean over slides with an interval over slides."""
    metrics = [*(f"R@{k}" for k in KS), "MRR"]
    values_of = {f"{d}/{m}": np.zeros(len(slides)) for d in DIRECTIONS for m in metrics}
    chances: dict[str, list[float]] = {name: [] for name in values_of}
    trivial = dict.fromkeys(values_of, True)
    galleries = []
    for slide, name in enumerate(names):
        own = np.flatnonzero(slides == slide)
        galleries.append(len(own))
        at = torch.from_numpy(own)
        for direction, ranks in zip(
            DIRECTIONS, retrieval_ranks(images[at], genes[at], both=True), strict=True
        ):
            guess = ranks.chance()
            for metric in metrics:
                each, chance = _of(ranks, metric), _of(guess, metric)
                full = f"{direction}/{metric}"
                values_of[full][own] = each
                chances[full].append(float(chance.mean()))
                trivial[full] &= bool((chance == 1).all())
                scores.by_slide.setdefault(full, {})[name] = float(each.mean())
    for full, spot_values in values_of.items():
        means = list(scores.by_slide[full].values())
        low, high = few_runs(means)
        share = np.array(galleries)[slides] * len(names) / len(slides)  # every slide has the same weight
        protocol = {
            "direction": full.split("/")[0], "gallery": round(float(np.mean(galleries)), 1), "slides": len(names),
            "relevant_per_query": 1, "similarity": "cosine", "ties": "expected", "split": split,
            "interval": "t over slides", "confidence": 0.95,
        }  # fmt: skip
        name = f"own_slide/{full}"
        scores.per_item[name] = spot_values / share
        scores.estimates[name] = Estimate(
            float(np.mean(means)), max(low, 0.0), min(high, 1.0), float(np.mean(chances[full])), len(spot_values),
            trivial[full], full.split("/")[1], protocol,
        )  # fmt: skip


def _of(ranks: Ranks, metric: str) -> np.ndarray:
    return ranks.reciprocal() if metric == "MRR" else ranks.hits(int(metric.split("@")[1]))


def information(
    images: Float[Tensor, "n d"], genes: Float[Tensor, "n d"], scale: float, *, split: str
) -> tuple[Estimate, Float[np.ndarray, " n"]]:
    """How far the loss of CLIP over the whole split lies below guessing, in nats: ln n − ClipLoss.

    Every arm is measured by this same loss, at its own scale, whatever it was trained with: losses with different
    targets have different floors. It bounds the mutual information of the two views from below (van den Oord et al.
    2018); 0 is guessing, below 0 is worse than that.
    """
    loss = info_nce(images.float(), genes.float(), scale=scale, reduction="none")
    values = math.log(len(images)) - loss.double().numpy()
    n, mean = len(values), float(values.mean())
    half = t_quantile(0.975, max(n - 1, 1)) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    protocol = {
        "gallery": n, "loss": "ClipLoss", "split": split, "interval": "normal over spots", "confidence": 0.95,
    }  # fmt: skip
    return Estimate(
        mean, mean - half, mean + half, 0.0, n, n < 2, "ln n - ClipLoss", protocol, True, "nats"
    ), values


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


class Evaluator:
    """Computes the metrics of a split from embeddings of it and of the training spots.

    ``references``: embeddings of the training spots' expression by the weights that are evaluated, (n, d).
    """

    references: Tensor

    def __init__(self, config: TissueOptions, data: TissueData) -> None:
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
        scores = retrieval(
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
        scores.estimates["information"], scores.per_item["information"] = estimate, values
        predicted = self.retrieved(images)
        self._correlate(scores, predicted, split, "gene_pearson", {"retrieve": self.retrieve}, resamples)
        facts: Json = {}
        if final:
            beside = Scores()
            self._correlate(
                beside, self.ridge(split), split, RIDGE, {"ridge": "colour statistics"}, resamples
            )
            scores.estimates |= {
                name: replace(estimate, control=True) for name, estimate in beside.estimates.items()
            }
            facts = {"slides": scores.by_slide | beside.by_slide}
        return Evaluation(split, scores.estimates, tissue.ids, scores.per_item, facts)

    def retrieved(self, images: Tensor) -> Float[np.ndarray, "n g"]:
        """Expression of patches: the mean of the nearest training spots'."""
        return retrieved_expression(
            images, self.references, self.data.splits["train"].expression, self.retrieve
        )

    def ridge(self, split: str) -> Float[np.ndarray, "n g"]:
        """Expression of a split's patches by ridge regression on their colour statistics; no network."""
        if split not in self._ridge:
            train, test = self.data.splits["train"], self.data.splits[split]
            colors = ImageTower("colors", size="own")
            features = [cast(Rows, colors.read(part.patches)).values.numpy() for part in (train, test)]
            self._ridge[split] = ridge_predictions(features[0], train.expression, features[1])
        return self._ridge[split]

    def _correlate(
        self,
        scores: Scores,
        predicted: Float[np.ndarray, "n g"],
        split: str,
        metric: str,
        protocol: dict[str, object],
        resamples: int,
    ) -> None:
        tissue = self.data.splits[split]
        for kind, genes in self.genes.items():
            name = f"{metric}/{kind}"
            scores.estimates[name], scores.per_item[name], by_slide = pearson_estimate(
                predicted[:, genes], tissue.expression[:, genes], tissue.slides, name,
                split=self.data.hash_of(split), protocol=protocol, resamples=resamples,
            )  # fmt: skip
            scores.by_slide[name] = {tissue.slide_names[slide]: value for slide, value in by_slide.items()}

    def values_of_ridge(self, split: str) -> dict[str, Float[np.ndarray, " n"]]:
        """The values of the spots behind the baseline's correlations, by the metric's name."""
        scores = Scores()
        self._correlate(scores, self.ridge(split), split, RIDGE, {}, 0)
        return scores.per_item
