"""Metrics of a split: retrieval, the contrastive loss, expression predicted by retrieval and by ridge regression.

Predicted expression follows the protocol of BLEEP (Xie et al., NeurIPS 2023): a patch gets the mean expression of the
training spots whose gene embeddings are nearest to its image embedding. Each gene is correlated over the spots of a
slide, and the correlations are averaged over genes, then over slides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from nearfar.data.batch import Rows
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.functional import info_nce
from nearfar.metrics import Estimate, Ranks, few_runs, rank_estimates, retrieval_ranks
from nearfar.metrics.intervals import bootstrap_levels, t_quantile
from nearfar.systems.tissue.data import TissueData
from nearfar.systems.tissue.options import TissueOptions
from nearfar.towers.image import ImageTower
from nearfar.training.system import Evaluation

__all__ = [
    "DIRECTIONS",
    "KS",
    "RIDGE",
    "Evaluator",
    "Scores",
    "chosen_genes",
    "correlation_values",
    "information",
    "pearson",
    "pearson_estimate",
    "retrieval",
    "retrieved_expression",
    "ridge_predictions",
]


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


def ridge_predictions(
    train: Float[np.ndarray, "n d"],
    values: Float[np.ndarray, "n g"],
    test: Float[np.ndarray, "m d"],
    penalty: float = 1.0,
) -> Float[np.ndarray, "m g"]:
    """Ridge regression of ``values`` on ``train``, for the rows of ``test``.

    Features are standardised by the training rows; the penalty on squared weights is ``penalty`` per hundred rows.

    >>> x = np.arange(6.0)[:, None]
    >>> ridge_predictions(x, 2 * x + 1, np.array([[10.0]]), penalty=1e-9).round(3)
    array([[21.]])
    """
    mean, sd = train.mean(0), train.std(0)
    sd = np.where(sd > 1e-8 * np.maximum(1.0, np.abs(mean)), sd, 1.0)
    x, centre = (train - mean) / sd, values.mean(0)
    gram = x.T @ x + penalty * len(x) / 100 * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (values - centre))
    predicted: Float[np.ndarray, "m g"] = (test - mean) / sd @ weights + centre
    return predicted


_ROWS = 4096  # queries at a time: their similarities to all training spots are what memory goes into


def retrieved_expression(
    images: Float[Tensor, "m d"],
    genes: Float[Tensor, "n d"],
    expression: Float[np.ndarray, "n g"],
    k: int,
) -> Float[np.ndarray, "m g"]:
    """Mean ``expression`` of the ``k`` training spots whose embeddings ``genes`` are nearest to a patch's, by cosine.

    >>> means = retrieved_expression(torch.eye(2), torch.eye(2), np.array([[1.0], [3.0]]), k=1)
    >>> means.tolist()
    [[1.0], [3.0]]
    """
    if not 1 <= k <= len(genes):
        raise NearfarError(
            f"retrieve={k}: there are {len(genes)} training spots to average over; take 1 to that many."
        )
    images, genes = (torch.nn.functional.normalize(x.float(), dim=1) for x in (images, genes))
    means = np.empty((len(images), expression.shape[1]))
    for start in range(0, len(images), _ROWS):
        part = images[start : start + _ROWS]
        nearest = (part @ genes.T).topk(k, dim=1).indices.numpy()
        # One matrix product instead of a gather of (rows, k, genes).
        weight = np.zeros((len(part), len(genes)), expression.dtype)
        np.put_along_axis(weight, nearest, 1.0 / k, axis=1)
        means[start : start + len(part)] = weight @ expression
    return means


def pearson(
    predicted: Float[np.ndarray, "n g"], measured: Float[np.ndarray, "n g"]
) -> Float[np.ndarray, " g"]:
    """Correlation of each gene over the spots: 0 where the prediction is constant, NaN where the measurement is.

    >>> pearson(np.array([[1.0, 1], [2, 1], [3, 1]]), np.array([[2.0, 1], [4, 2], [6, 3]])).round(6).tolist()
    [1.0, 0.0]
    """
    a, b = _standardised(predicted), _standardised(measured)
    r: NDArray[np.float64] = np.mean(a * b, axis=0)
    r[~b.any(axis=0)] = np.nan
    return r


def correlation_values(
    predicted: Float[np.ndarray, "n g"], measured: Float[np.ndarray, "n g"], slides: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " n"], dict[int, float]]:
    """A value for every spot whose mean is the mean correlation, and the mean correlation of each slide.

    A correlation is no mean, but to first order spot i pulls it by a_i b_i − r (a_i² + b_i²) / 2, a and b standardised
    (its influence function; Devlin et al. 1975). With these as scores of items, models are compared in pairs. All
    slides have the same weight, whatever the number of their spots. On each slide, genes that are constant there are
    left out.
    """
    values, by_slide = np.empty(len(predicted)), {}
    names = np.unique(slides)
    for slide in names.tolist():
        own = np.flatnonzero(slides == slide)
        a, b = _standardised(predicted[own]), _standardised(measured[own])
        varies = b.any(axis=0)
        if not varies.any():
            raise NearfarError(
                f"slide {slide}: no gene varies over its {len(own)} spots, so that nothing correlates."
            )
        a, b = a[:, varies], b[:, varies]
        r = np.mean(a * b, axis=0)
        by_slide[slide] = float(r.mean())
        pull = a * b - r * (a**2 + b**2) / 2
        # The mean of a² + b² is 2, but 1 where the prediction is constant; there r is 0 and nothing pulls.
        values[own] = (r.mean() + pull.mean(axis=1)) * len(predicted) / (len(names) * len(own))
    return values, by_slide


def pearson_estimate(
    predicted: Float[np.ndarray, "n g"],
    measured: Float[np.ndarray, "n g"],
    slides: Int[np.ndarray, " n"],
    metric: str,
    *,
    split: str,
    protocol: dict[str, object],
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Estimate, Float[np.ndarray, " n"], dict[int, float]]:
    """The mean correlation, the values of the spots behind it, and that of each slide.

    The interval is over slides (t) where there are several; of one slide it is over its spots, resampled (BCa), as if
    they were independent. Spots side by side are not, so different slides can differ by more.
    """
    values, by_slide = correlation_values(predicted, measured, slides)
    value = float(np.mean(list(by_slide.values())))
    if len(by_slide) > 1:
        low, high = few_runs(list(by_slide.values()), confidence)
        method = "t over slides"
    elif resamples:
        drawn = _resampled(predicted, measured, resamples, seed)
        low, high = np.quantile(drawn, bootstrap_levels(drawn, value, values - value, confidence)).tolist()
        method = "bootstrap over spots (BCa)"
    else:
        half = (
            t_quantile(0.5 + confidence / 2, len(values) - 1) * float(values.std(ddof=1)) / len(values) ** 0.5
        )
        low, high, method = value - half, value + half, "normal over spots"
    stated = {"genes": predicted.shape[1], "slides": len(by_slide), "split": split, "interval": method}
    stated |= {"confidence": confidence} | protocol
    return (
        Estimate(value, max(low, -1.0), min(high, 1.0), 0.0, len(values), False, metric, stated),
        values,
        by_slide,
    )


def _resampled(
    predicted: NDArray[np.float64], measured: NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """The mean correlation of spots drawn with replacement, from weighted sums."""
    a, b = _standardised(predicted), _standardised(measured)
    a, b = a[:, b.any(axis=0)], b[:, b.any(axis=0)]
    n = len(a)
    moments = np.concatenate([a, b, a * a, b * b, a * b], axis=1)
    rng = np.random.default_rng(seed)
    correlations = []
    rows = max((1 << 22) // moments.shape[1], 1)  # 32 MB of sums at a time
    for start in range(0, resamples, rows):
        weight = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, resamples - start)) / n
        ma, mb, aa, bb, ab = np.split(weight @ moments, 5, axis=1)
        spread = (aa - ma**2) * (bb - mb**2)
        r = np.divide(
            ab - ma * mb, np.sqrt(np.maximum(spread, 0)), out=np.zeros_like(ab), where=spread > 1e-12
        )
        correlations.append(r.mean(axis=1))
    return np.concatenate(correlations)


def _standardised(x: Float[np.ndarray, "n g"]) -> Float[np.ndarray, "n g"]:
    """Mean 0 and variance 1 over the spots; all zeros where a column is constant."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=0)
    sd = centred.std(axis=0)
    varies = sd > 1e-9 * np.maximum(1.0, np.abs(x).max(axis=0, initial=0.0))
    return np.divide(centred, sd, out=np.zeros_like(centred), where=varies)
