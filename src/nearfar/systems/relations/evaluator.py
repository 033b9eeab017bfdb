"""Evaluation of embeddings during training: probes and their controls, pair retrieval, predictions of every pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from nearfar.data.batch import Batch, ItemDataset
from nearfar.data.scenes.relation_data import RelationData
from nearfar.data.scenes.triples import NAMES, SPATIAL, VISUAL
from nearfar.metrics import Estimate
from nearfar.metrics.classification import fitted_temperature
from nearfar.models.parts_probe import Blocks, PartsProbe, sample_rows
from nearfar.models.views import ViewModel
from nearfar.systems.relations.evaluation import PAIR, Predictions, Scores, pair_retrieval, score_predictions
from nearfar.systems.relations.options import RelationOptions
from nearfar.systems.relations.probe import FUSED, LINEAR, Predictor, blocks_of, has_pixels, probe_inputs
from nearfar.systems.view_system import LABEL
from nearfar.training.system import Evaluation

__all__ = ["Evaluator"]


#: a model's embeddings of a batch, by view
Embed = Callable[[ViewModel, Batch], Mapping[str, Tensor]]
_CHUNK = 2048  # training rows embedded at a time
_PAIRS_AFTER_EPOCH = 480  # pairs of pair retrieval after each epoch; the final evaluation takes all


class Evaluator:
    """Evaluates the embeddings of the splits, and keeps predictions and scores of the final evaluation of each.

    Args:
        config: the options of the run.
        data: the pairs.
        datasets: the same by split, as batches see them.
        embed: a model's embeddings of a batch.
    """

    def __init__(
        self,
        config: RelationOptions,
        data: RelationData,
        datasets: Mapping[str, ItemDataset],
        embed: Embed,
    ) -> None:
        self.config, self.data, self.datasets, self.embed = config, data, datasets, embed
        self.label = datasets["train"].tensor(LABEL).numpy()
        self.constant = int(np.bincount(self.label).argmax())
        self.predictions: dict[str, Predictions] = {}
        self.scores: dict[str, Scores] = {}
        #: the probe of the embedding, as the last final evaluation fitted it
        self.probe: PartsProbe | None = None
        self._retrieval_size = self._smallest_split()
        self._at: ndarray
        self._train: Blocks = {}
        self._untrained: dict[str, Blocks] = {}
        self._hashes: dict[str, str] = {}  # of the splits: needed after every epoch

    def _smallest_split(self) -> int:
        """Pairs in a batch of pair retrieval: one size in every split, so that their chance is the same."""
        evaluated = [d for name, d in self.datasets.items() if name != "train"]
        second = [
            np.ones(len(d), bool) if NAMES in d.inputs and VISUAL not in d.inputs else has_pixels(d)
            for d in evaluated
        ]
        return min(int(self.config.batch_size), *(int(rows.sum()) for rows in second), len(second[0]))

    # -- before ----------------------------------------------------------------------------------------------
    def embed_train(
        self, model: ViewModel, split: str, final: bool, untrained_model: Callable[[], ViewModel]
    ) -> None:
        """Embed the training pairs on which probes are fitted; for the final evaluation also by an untrained model."""
        self._at = sample_rows(self.label, self.config.probe_rows if final else self.config.monitor_rows)
        self._train = self._embedded(model, "train", self._at)
        if final and self._is_last(split):
            untrained = untrained_model().to(next(model.parameters()).device).eval()
            every = np.arange(len(self.datasets[split]))
            self._untrained = {
                "train": self._embedded(untrained, "train", self._at),
                split: self._embedded(untrained, split, every),
            }

    @torch.no_grad()
    def _embedded(self, model: ViewModel, split: str, at: ndarray) -> Blocks:
        dataset, device = self.datasets[split], next(model.parameters()).device
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(at), _CHUNK):
            batch = dataset.__getitems__(at[start : start + _CHUNK].tolist()).to(device)
            parts.append({name: view.float().cpu() for name, view in self.embed(model, batch).items()})
        outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return blocks_of(dataset, outputs, at)

    def _is_last(self, split: str) -> bool:
        """Whether this is the reported split."""
        return split == "test" or "test" not in self.data.splits

    # -- scores ----------------------------------------------------------------------------------------------
    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Probe accuracy, with its controls when ``final``, and pair retrieval."""
        part, label = self.data.splits[split], self.data.labels(split)
        scores = self._probe_scores(outputs, split, final)
        result = self._score(
            {metric: of_metric.argmax(axis=1) for metric, of_metric in scores.items()}, split, final
        )
        pair = self._pair_retrieval(outputs, split, final)
        if pair is not None:
            result.estimates[PAIR], result.per_image[PAIR] = pair
        if final:
            self.predictions[split] = Predictions(
                part.ids, part.image, label, has_pixels(self.datasets[split]), self.data.relations, scores
            )
            self.scores[split] = result
        majority = float((label == self.constant).mean())
        # Only of the probes: controls may well be no better than the majority.
        baselines = {metric: majority for metric in (FUSED, LINEAR) if metric in result.estimates}
        return Evaluation(split, result.estimates, result.images, result.per_image, {"baselines": baselines})

    def _probe_scores(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> dict[str, ndarray]:
        """Each probe's scores of every pair."""
        blocks = blocks_of(self.datasets[split], outputs, np.arange(len(self.data.splits[split])))
        label, count = self.label[self._at], len(self.data.relations)
        wanted = probe_inputs(list(blocks), self.config.keep_inputs)

        def of(kind: str, train: Blocks, rows: Blocks, names: Sequence[str]) -> tuple[PartsProbe, ndarray]:
            probe = PartsProbe(kind).fit({name: train[name] for name in names}, label)
            return probe, probe.scores({name: rows[name] for name in names}, count)

        scores = {LINEAR: of("linear", self._train, blocks, wanted[FUSED])[1]}
        if not final:
            return scores
        # Controls only for the split that is reported.
        reported = wanted if self._is_last(split) else {FUSED: wanted[FUSED]}
        for metric, names in reported.items():
            first, second = self._train, blocks
            if metric.startswith("untrained"):
                first, second = self._untrained["train"], self._untrained[split]
            probe, scores[metric] = of("rbf", first, second, names)
            if metric == FUSED:
                self.probe = probe
        return scores

    def predictor(self) -> Predictor | None:
        """What predicts new pairs: the probe of the final evaluation; None before there was one."""
        if self.probe is None:
            return None
        known = self.predictions["val"]
        temperature = fitted_temperature(known.scores[FUSED], known.truth)
        return Predictor(self.probe, self.data.relations, temperature)

    def fit_predictor(self, model: ViewModel) -> Predictor:
        """The same for a model whose run did not keep it, from the training and validation pairs."""
        self._at = sample_rows(self.label, self.config.probe_rows)
        train = self._embedded(model, "train", self._at)
        val = self._embedded(model, "val", np.arange(len(self.datasets["val"])))
        names = probe_inputs(list(train), self.config.keep_inputs)[FUSED]
        probe = PartsProbe().fit({name: train[name] for name in names}, self.label[self._at])
        scores = probe.scores({name: val[name] for name in names}, len(self.data.relations))
        temperature = fitted_temperature(scores, self.data.labels("val"))
        return Predictor(probe, self.data.relations, temperature)

    def _score(self, predicted: Mapping[str, ndarray], split: str, final: bool) -> Scores:
        part, label, relations = self.data.splits[split], self.data.labels(split), self.data.relations
        order = [FUSED, LINEAR, *predicted]
        ordered = {metric: predicted[metric] for metric in dict.fromkeys(order) if metric in predicted}
        pixels, every = has_pixels(self.datasets[split]), np.ones(len(part), bool)
        parts = {"": every} | ({"with_photo/": pixels} if final and pixels.any() and not pixels.all() else {})
        scores = Scores(list(dict.fromkeys(part.image)), {}, {})
        for prefix, rows in parts.items():
            part_scores = score_predictions(
                {prefix + metric: classes for metric, classes in ordered.items()},
                label,
                part.image,
                relations,
                self.constant,
                detailed=(FUSED, LINEAR) if final else (),
                split=self._hash(split),
                bootstrap=self.config.bootstrap if final else 0,
                rows=rows,
            )
            scores.estimates |= part_scores.estimates
            scores.per_image |= part_scores.per_image
        return scores

    def _pair_retrieval(
        self, outputs: Mapping[str, Tensor], split: str, final: bool
    ) -> tuple[Estimate, ndarray] | None:
        second = next((view for view in (VISUAL, NAMES) if view in outputs), None)
        if second is None:
            return None
        part = self.data.splits[split]
        rows = has_pixels(self.datasets[split]) if second == VISUAL else np.ones(len(part), bool)
        if not final:  # enough for a curve
            rows = rows & (np.cumsum(rows) <= _PAIRS_AFTER_EPOCH)
        return pair_retrieval(
            outputs[SPATIAL],
            outputs[second],
            rows,
            part.image,
            self._retrieval_size,
            split=self._hash(split),
            bootstrap=self.config.bootstrap if final else 0,
        )

    def _hash(self, split: str) -> str:
        if split not in self._hashes:
            self._hashes[split] = self.data.content_hash(split)
        return self._hashes[split]
