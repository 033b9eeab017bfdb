"""Metrics of a split: probe accuracy beside controls and the majority, pair retrieval, and a run evaluated again."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn

from nearfar.errors import NearfarError
from nearfar.metrics import (
    Difference,
    Estimate,
    by_group,
    count_estimate,
    f1_macro,
    f1_micro,
    item_values,
    paired_difference,
    retrieval_ranks,
    share,
)
from nearfar.systems.relations.data import RelationData
from nearfar.systems.relations.dataset import RelationDataset
from nearfar.systems.relations.options import RelationOptions
from nearfar.systems.relations.probe import FUSED, LINEAR, Rows, blocks_of, looks_at, sample_rows, scored
from nearfar.systems.relations.records import chosen_relations
from nearfar.training.run_folder import RunFolder, write_atomically
from nearfar.training.system import Evaluation

__all__ = ["Examiner", "Judged", "Predictions", "confusion", "judge", "pair_retrieval", "pool", "rescore"]


@dataclass(frozen=True)
class Predictions:
    """Pairs, their relation, and by metric how much each classifier found to speak for every class."""

    ids: Sequence[str]
    image: Sequence[str]
    truth: Int[ndarray, " n"]
    seen: Bool[ndarray, " n"]  # whether there is a photo
    relations: Sequence[str]
    scores: Mapping[str, Float[ndarray, "n classes"]]

    def __len__(self) -> int:
        return len(self.ids)

    def said(self, among: Sequence[int] | None = None) -> dict[str, Int[ndarray, " n"]]:
        """The class with the highest score, by metric; ``among`` leaves only some classes to choose from."""
        out = {}
        for metric, scores in self.scores.items():
            if among is None:
                out[metric] = scores.argmax(axis=1)
            else:
                out[metric] = np.asarray(among)[scores[:, list(among)].argmax(axis=1)]
        return out

    def save(self, path: Path) -> None:
        """Write a compressed ``.npz``."""
        arrays = {f"scores/{metric}": scores.astype(np.float32) for metric, scores in self.scores.items()}
        texts = {"ids": self.ids, "image": self.image, "relations": self.relations}
        arrays |= {name: np.asarray(list(column), dtype=np.str_) for name, column in texts.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, truth=self.truth, seen=self.seen, **arrays)  # type: ignore[arg-type]
        write_atomically(path, lambda file: file.write(buffer.getvalue()))

    @classmethod
    def load(cls, run: Path, split: str) -> Predictions:
        """Of a finished run."""
        path = run / f"predictions_{split}.npz"
        if not path.is_file():
            raise NearfarError(
                f"{path}: there are no predictions; is {run} a finished run of the relation system?"
            )
        with np.load(path, allow_pickle=False) as entry:
            return cls(
                entry["ids"].tolist(),
                entry["image"].tolist(),
                entry["truth"],
                entry["seen"],
                entry["relations"].tolist(),
                {name[7:]: entry[name] for name in entry.files if name.startswith("scores/")},
            )

    @classmethod
    def pooled(cls, parts: Sequence[Predictions]) -> Predictions:
        """Several test sets as one; of the metrics those that all have."""
        metrics = [name for name in parts[0].scores if all(name in part.scores for part in parts)]
        if len({tuple(part.relations) for part in parts}) != 1:
            raise NearfarError("these runs have different relations; they cannot be pooled")
        ids = [name for part in parts for name in part.ids]
        if len(set(ids)) != len(ids):
            raise NearfarError("these test sets share pairs: they are not the folds of one cross-validation")
        return cls(
            ids,
            [image for part in parts for image in part.image],
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.seen for part in parts]),
            parts[0].relations,
            {name: np.concatenate([part.scores[name] for part in parts]) for name in metrics},
        )


PAIR = "pair_retrieval/R@1"


@dataclass
class Judged:
    """Estimates and, by metric, the value of every picture, in the order of ``images``."""

    images: list[str]
    estimates: dict[str, Estimate]
    per_image: dict[str, Float[ndarray, " images"]]

    def difference(self, metric: str, other: str) -> Difference:
        """Of two metrics of the same pictures, paired, with an interval over pictures."""
        return paired_difference(self.per_image[metric][None], self.per_image[other][None], metric=metric)


def judge(
    predicted: Mapping[str, Int[ndarray, " n"]],
    truth: Int[ndarray, " n"],
    images: Sequence[str],
    relations: Sequence[str],
    constant: int,
    *,
    detailed: Sequence[str] = (),
    split: str = "",
    bootstrap: int = 1000,
    rows: Bool[ndarray, " n"] | None = None,
) -> Judged:
    """Accuracy of every classifier in ``predicted`` (metric name → classes).

    Args:
        constant: the most frequent relation of the training pairs; how often it is right is the chance level.
        detailed: metrics for which macro F1 and the F1 of every relation come along.
        split: hash of the split.
        bootstrap: resamples of pictures; 0 for none.
        rows: judge these pairs alone; pictures without any count nothing.
    """
    kept = np.ones(len(truth), bool) if rows is None else rows
    names = list(dict.fromkeys(images))
    constant_hits = (truth == constant) & kept
    protocol = {"pairs": int(kept.sum()), "interval_over": "pictures", "relations": list(relations)}
    majority = float(constant_hits.sum() / max(kept.sum(), 1))
    found = Judged(names, {}, {})

    def add(metric: str, counts: ndarray, statistic: Any, chance: float) -> None:
        _, sums = by_group(counts.astype(np.float64), images)
        estimate = count_estimate(
            sums, statistic, metric, chance=chance, split=split, protocol=protocol, resamples=bootstrap
        )
        control = metric.removeprefix("with_photo/").split("/")[0] in (*CONTROLS, "majority")
        found.estimates[metric] = replace(estimate, control=control)
        found.per_image[metric] = item_values(sums, statistic)

    for metric, classes in predicted.items():
        hits = (classes == truth) & kept
        add(metric, np.stack([hits, kept], axis=1), share, majority)
        if metric in detailed:
            stem = metric.removesuffix("/accuracy")
            table = _per_class(classes, truth, len(relations), kept)
            always = _per_class(np.full_like(truth, constant), truth, len(relations), kept).sum(axis=0)
            there = np.flatnonzero(
                table.sum(axis=(0, 2)) > 0
            )  # a relation that is neither there nor said has no F1
            add(f"{stem}/macro_F1", table[:, there], f1_macro, float(f1_macro(always[there].astype(float))))
            for c in there.tolist():
                by_chance = float(f1_micro(always[[c]].astype(float)))
                add(f"{stem}/F1_{relations[c].replace(' ', '_')}", table[:, [c]], f1_micro, by_chance)
    return found


def _per_class(
    classes: Int[ndarray, " n"], truth: Int[ndarray, " n"], count: int, kept: Bool[ndarray, " n"]
) -> Int[ndarray, "n classes 3"]:
    """For every pair and class: true positive, false positive, missed."""
    said, there = (values[:, None] == np.arange(count) for values in (classes, truth))
    return np.stack([said & there, said & ~there, ~said & there], axis=2) & kept[:, None, None]


def pair_retrieval(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    rows: Bool[ndarray, " n"],
    images: Sequence[str],
    batch_size: int,
    *,
    split: str = "",
    bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[Estimate, Float[ndarray, " images"]] | None:
    """Is a pair's own second view the nearest of a batch? Mean of both directions, ties by expectation.

    Batches are random but the same at every call; what does not fill one is left out, so that the chance is 1/B
    throughout. Where there are fewer rows than ``batch_size`` they are one smaller batch; None below two rows.
    """
    at = np.flatnonzero(rows)
    size = min(batch_size, len(at))
    if size < 2:
        return None
    order = np.random.default_rng([seed, len(at)]).permutation(at)
    hits = np.zeros((len(rows), 2))
    for start in range(0, len(at) - size + 1, size):
        batch = torch.from_numpy(order[start : start + size])
        both = retrieval_ranks(first[batch], second[batch], both=True)
        hits[batch.numpy(), 0] = np.mean([ranks.hits(1) for ranks in both], axis=0)
        hits[batch.numpy(), 1] = 1
    _, sums = by_group(hits, list(images))
    protocol = {
        "gallery": size,
        "pairs": int(hits[:, 1].sum()),
        "interval_over": "pictures",
        "question": "which pair",
    }
    estimate = count_estimate(
        sums, share, PAIR, chance=1 / size, split=split, protocol=protocol, resamples=bootstrap
    )
    return estimate, item_values(sums, share)


def confusion(
    classes: Int[ndarray, " n"], truth: Int[ndarray, " n"], count: int
) -> Int[ndarray, "classes classes"]:
    """How often a pair of relation i (row) was called j (column).

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    table = np.zeros((count, count), dtype=np.int64)
    np.add.at(table, (truth, classes), 1)
    return table


CONTROLS = ("spatial_only", "visual_only", "categories_only", "raw_features", "numbers_only", "untrained")


def rescore(run: str | Path, relations: Any = "top5", split: str | None = None) -> dict[str, Estimate]:
    """An older model on the pairs of some of its relations: what fewer classes are worth without any training.

    "all classes": the classes to choose from stay what they were, and one outside ``relations`` is wrong. "these
    classes": the best of ``relations`` alone. A new model on these relations has to beat the second.

    Raises ``NearfarError`` for a run of another system, or relations that it does not know.
    """
    folder = RunFolder(Path(run))
    split = split or ("test" if (folder.path / "predictions_test.npz").exists() else "val")
    found = Predictions.load(folder.path, split)
    wanted = chosen_relations(relations)
    unknown = [name for name in wanted if name not in found.relations]
    if unknown:
        raise NearfarError(
            f"{folder}: the model does not know {', '.join(unknown)}; it knows {', '.join(found.relations)}."
        )
    among = [list(found.relations).index(name) for name in wanted]
    rows = np.isin(found.truth, among)
    if not rows.any():
        raise NearfarError(f"{folder}: no pair of {split} has one of {', '.join(wanted)}.")
    kept = found.truth[rows]
    images = [image for image, row in zip(found.image, rows, strict=True) if row]
    constant = int(np.bincount(kept).argmax())
    out: dict[str, Estimate] = {}
    for words, choice in (("all_classes", None), ("these_classes", among)):
        said = {metric: classes[rows] for metric, classes in found.said(choice).items() if metric == FUSED}
        renamed = {
            f"{metric.removesuffix('/accuracy')}_{words}/accuracy": classes
            for metric, classes in said.items()
        }
        out |= judge(renamed, kept, images, found.relations, constant).estimates
    return out


def pool(runs: Sequence[Path], bootstrap: int = 1000) -> tuple[Judged, list[dict[str, Any]]]:
    """Cross-validation: every pair judged by the model that did not see its picture; with differences, paired.

    Returns what was judged, and rows of differences of the fused probe from each control, on all pairs and on those
    with a photo.
    """
    found = Predictions.pooled([Predictions.load(path, "test") for path in runs])
    constant = int(np.bincount(found.truth).argmax())
    said = found.said() | {"majority/accuracy": np.full_like(found.truth, constant)}
    judged = judge(
        said, found.truth, found.image, found.relations, constant, detailed=(FUSED,), bootstrap=bootstrap
    )
    kinds: list[tuple[str, Judged]] = [("", judged)]
    if found.seen.any() and not found.seen.all():
        some = {f"with_photo/{metric}": classes for metric, classes in said.items()}
        here = judge(
            some, found.truth, found.image, found.relations, constant, rows=found.seen, bootstrap=bootstrap
        )
        judged.estimates |= here.estimates
        judged.per_image |= here.per_image
        kinds.append(("with_photo/", judged))
    return judged, [row for prefix, part in kinds for row in differences(part, prefix)]


def differences(judged: Judged, prefix: str = "") -> list[dict[str, Any]]:
    """The fused probe minus each control on the same pairs."""
    rows = []
    for control in (*CONTROLS, "majority"):
        metric, other = f"{prefix}{FUSED}", f"{prefix}{control}/accuracy"
        if other not in judged.per_image:
            continue
        found = judged.difference(metric, other)
        rows.append(
            {
                "pairs": "with a photo" if prefix else "all",
                "minus": control.replace("_", " "),
                "difference": found.value,
                "low": found.low,
                "high": found.high,
                "verdict": found.verdict,
            }
        )
    return rows


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
        self,
        config: RelationOptions,
        data: RelationData,
        datasets: Mapping[str, RelationDataset],
        embed: Embed,
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
