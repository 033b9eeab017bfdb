"""What is asked of a model of relations: probes beside their controls, and pair retrieval, on one split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from nearfar.systems.relations.data import RelationData
from nearfar.systems.relations.dataset import RelationDataset
from nearfar.systems.relations.evaluation import PAIR, Judged, Predictions, judge, pair_retrieval
from nearfar.systems.relations.probe import FUSED, LINEAR, Rows, blocks_of, looks_at, sample_rows, scored
from nearfar.training.system import Evaluation

__all__ = ["Examiner"]

Embed = Callable[[nn.Module, Any], Mapping[str, Tensor]]
_CHUNK = 2048  # training rows embedded at a time
_PAIRS_WATCHED = 480  # pairs of pair retrieval after each epoch; all of them in the end


class Examiner:
    """Judges the embeddings of the splits; what it saw in the last evaluation of each stays for report and files.

    Args:
        config: the options of the run.
        data: the pairs.
        datasets: the same by split, as batches see them.
        embed: a model's embeddings of a batch.
    """

    def __init__(
        self, config: Any, data: RelationData, datasets: Mapping[str, RelationDataset], embed: Embed
    ) -> None:
        self.config, self.data, self.datasets, self.embed = config, data, datasets, embed
        self.label = datasets["train"].label.numpy()
        self.constant = int(np.bincount(self.label).argmax())
        self.predictions: dict[str, Predictions] = {}
        self.judged: dict[str, Judged] = {}
        self._pairs_asked = self._smallest_split()
        self._at: ndarray
        self._train: Rows = {}
        self._untrained: dict[str, Rows] = {}
        self._hashes: dict[str, str] = {}  # of the splits: asked for after every epoch

    def _smallest_split(self) -> int:
        """Pairs in a batch of pair retrieval: one size in every split, so that their chance is the same."""
        judged = [d for name, d in self.datasets.items() if name != "train"]
        second = [
            np.ones(len(d), bool) if d.names is not None and d.visual is None else d.seen.numpy()
            for d in judged
        ]
        return min(int(self.config.batch_size), *(int(rows.sum()) for rows in second), len(second[0]))

    # -- before ----------------------------------------------------------------------------------------------
    def look_at_train(
        self, model: nn.Module, split: str, final: bool, fresh: Callable[[], nn.Module]
    ) -> None:
        """Embed training pairs, on which the probes are fitted; for the last evaluation an untrained model's too."""
        self._at = sample_rows(self.label, self.config.probe_rows if final else self.config.monitor_rows)
        self._train = self._embedded(model, "train", self._at)
        if final and self._is_last(split):
            untrained = fresh().to(next(model.parameters()).device).eval()
            every = np.arange(len(self.datasets[split]))
            self._untrained = {
                "train": self._embedded(untrained, "train", self._at),
                split: self._embedded(untrained, split, every),
            }

    @torch.no_grad()
    def _embedded(self, model: nn.Module, split: str, at: ndarray) -> Rows:
        dataset, device = self.datasets[split], next(model.parameters()).device
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(at), _CHUNK):
            batch = dataset.__getitems__(at[start : start + _CHUNK].tolist()).to(device)
            parts.append({name: view.float().cpu() for name, view in self.embed(model, batch).items()})
        outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return blocks_of(dataset, outputs, at)

    def _is_last(self, split: str) -> bool:
        """Whether the results of a run are those of this split."""
        return split == "test" or "test" not in self.data.splits

    # -- judging ---------------------------------------------------------------------------------------------
    def examine(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Probe accuracy, with its controls when ``final``, and pair retrieval."""
        part, label = self.data.splits[split], self.data.labels(split)
        scores = self._scores(outputs, split, final)
        judged = self._judge({metric: found.argmax(axis=1) for metric, found in scores.items()}, split, final)
        pair = self._pair_retrieval(outputs, split, final)
        if pair is not None:
            judged.estimates[PAIR], judged.per_image[PAIR] = pair
        if final:
            seen = self.datasets[split].seen.numpy()
            self.predictions[split] = Predictions(
                part.ids, part.image, label, seen, self.data.relations, scores
            )
            self.judged[split] = judged
        always = float((label == self.constant).mean())
        # Controls may well be no better than that: it is what they are for.
        baselines = {metric: always for metric in (FUSED, LINEAR) if metric in judged.estimates}
        return Evaluation(split, judged.estimates, judged.images, judged.per_image, {"baselines": baselines})

    def _scores(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> dict[str, ndarray]:
        """What each probe says of every pair."""
        blocks = blocks_of(self.datasets[split], outputs, np.arange(len(self.data.splits[split])))
        label, count = self.label[self._at], len(self.data.relations)
        wanted = looks_at(list(blocks), self.config.keep_inputs)
        scores = {LINEAR: scored("linear", self._train, blocks, wanted[FUSED], label, count)}
        if not final:
            return scores
        # Controls belong to the split that the result is read from.
        here = wanted if self._is_last(split) else {FUSED: wanted[FUSED]}
        for metric, names in here.items():
            first, second = self._train, blocks
            if metric.startswith("untrained"):
                first, second = self._untrained["train"], self._untrained[split]
            scores[metric] = scored("rbf", first, second, names, label, count)
        return scores

    def _judge(self, predicted: Mapping[str, ndarray], split: str, final: bool) -> Judged:
        part, label, relations = self.data.splits[split], self.data.labels(split), self.data.relations
        order = [FUSED, LINEAR, *predicted]
        ordered = {metric: predicted[metric] for metric in dict.fromkeys(order) if metric in predicted}
        seen, every = self.datasets[split].seen.numpy(), np.ones(len(part), bool)
        parts = {"": every} | ({"with_photo/": seen} if final and seen.any() and not seen.all() else {})
        judged = Judged(list(dict.fromkeys(part.image)), {}, {})
        for prefix, rows in parts.items():
            found = judge(
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
            judged.estimates |= found.estimates
            judged.per_image |= found.per_image
        return judged

    def _pair_retrieval(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Any:
        second = "visual" if "visual" in outputs else "names" if "names" in outputs else None
        if second is None:
            return None
        part = self.data.splits[split]
        rows = self.datasets[split].seen.numpy() if second == "visual" else np.ones(len(part), bool)
        if not final:  # a curve needs no more
            rows = rows & (np.cumsum(rows) <= _PAIRS_WATCHED)
        return pair_retrieval(
            outputs["spatial"],
            outputs[second],
            rows,
            part.image,
            self._pairs_asked,
            split=self._hash(split),
            bootstrap=self.config.bootstrap if final else 0,
        )

    def _hash(self, split: str) -> str:
        if split not in self._hashes:
            self._hashes[split] = self.data.content_hash(split)
        return self._hashes[split]
