"""Spatial relations as a system: contrastive alignment of crops and boxes, and a probe on the frozen embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor

from nearfar.batching import BatchSampler
from nearfar.data.rejections import Rejections
from nearfar.errors import NearfarError
from nearfar.models.image import build_image_encoder
from nearfar.models.text import build_text_encoder, embed_texts
from nearfar.systems.relations.data import RelationData, load_data
from nearfar.systems.relations.dataset import RelationBatch, RelationDataset, Scaler, build_sampler
from nearfar.systems.relations.evaluator import Evaluator
from nearfar.systems.relations.features import crop_features, names_of, spatial_numbers
from nearfar.systems.relations.model import RelationModel, ViewLoss
from nearfar.systems.relations.options import RelationOptions
from nearfar.systems.relations.probe import LINEAR
from nearfar.systems.relations.report import sections
from nearfar.training.sections import Section
from nearfar.training.state import initial_model
from nearfar.training.system import Evaluation, Say, StepOutput, System, TrainSampler

__all__ = ["RelationSystem"]


class RelationSystem(System[RelationBatch, RelationModel]):
    """Aligns the views of a pair of objects; a probe on the embedding predicts their relation."""

    name = "relations"
    monitor = LINEAR

    config: RelationOptions

    def __init__(self, config: RelationOptions) -> None:
        self.config = config
        self.loss = ViewLoss(
            config.loss.name,
            config.temperature,
            getattr(config.loss, "symmetric", True),
            sum=getattr(config.loss, "sum", None),
        )
        self.data: RelationData
        self.datasets: dict[str, RelationDataset] = {}
        self._encoders: dict[str, str] = {}
        self.evaluator: Evaluator

    # -- data ------------------------------------------------------------------------------------------------
    def load_data(self, say: Say) -> RelationData:
        """The splits, from the configured files or composed; encodes nothing."""
        return load_data(self.config)

    def prepare(self, say: Say) -> None:
        """Read and check the data, encode crops and names (or take them from the cache), standardise."""
        config = self.config
        self.data = self.load_data(say)
        say(self.data.summary())
        splits = self.data.splits
        numbers = {
            name: spatial_numbers(part.subject_box, part.object_box, part.size, config.spatial)
            for name, part in splits.items()
        }
        self.loss.repeated = len(np.unique(splits["train"].group)) < len(splits["train"])
        scaler = Scaler.of(numbers["train"])
        visual, names = self._visual(say), self._names(say)
        for name, part in splits.items():
            self.datasets[name] = RelationDataset(
                part,
                self.data.labels(name),
                scaler(numbers[name]),
                visual.get(name),
                names.get(name),
                jitter=config.box_jitter if name == "train" else 0.0,
                variant=config.spatial,
                scaler=scaler,
                seed=config.seed,
            )
        if not self.datasets["train"].has_pixels.any() and not config.categories and not config.box_jitter:
            raise NearfarError(
                "no training pair has a second view: no photo was found, and categories=false and box_jitter=0. Give "
                "the photos with data.images=, or set box_jitter=0.05 or categories=true."
            )
        self.evaluator = Evaluator(config, self.data, self.datasets, self.embed)

    def _visual(self, say: Say) -> dict[str, ndarray]:
        """Standardised features of both crops, where there is any photo to train on."""
        config, splits = self.config, self.data.splits
        if not config.pixels or not splits["train"].photos:
            reason = "pixels=false" if not config.pixels else "no training pair has a photo"
            self._encoders["visual"] = f"none ({reason})"
            say(f"pixels: none, {reason}")
            return {}
        encoder = build_image_encoder(**config.image_encoder, frozen=True, seed=0)
        self._encoders["visual"] = encoder.description
        say(f"pixels: crops of {config.crop_size} × {config.crop_size} through {encoder.description}")
        damaged = Rejections()
        rows = crop_features(splits.values(), encoder, config.crop_size, say, damaged)
        if len(damaged):
            say(damaged.summary())
            self.data.rejections.extend(damaged)
        features = dict(zip(splits, rows, strict=True))
        scaler = Scaler.of(features["train"])
        return {name: scaler(part) for name, part in features.items()}

    def _names(self, say: Say) -> dict[str, ndarray]:
        """Vectors of subject and object, side by side; the encoder is fitted on names of the training pairs alone."""
        if not self.config.categories:
            return {}
        train = self.data.train
        encoder = build_text_encoder(**self.config.text_encoder)
        encoder = encoder.fit(sorted({*train.subject, *train.object}))
        self._encoders["names"] = encoder.description
        say(f"names: {encoder.description}")
        names_by_split = {}
        for name, part in self.data.splits.items():
            known = sorted({*part.subject, *part.object})
            vectors = dict(zip(known, embed_texts(encoder, known), strict=True))
            names_by_split[name] = np.stack(
                [
                    np.concatenate([vectors[a], vectors[b]])
                    for a, b in zip(part.subject, part.object, strict=True)
                ]
            ).astype(np.float32)
        return names_by_split

    def layout(self) -> dict[str, object]:
        """Counts, rejections, hashes, and which encoders are really used."""
        return self.data.layout() | {
            "data_hash": self.data.content_hash(),
            "spatial": {"variant": self.config.spatial, "numbers": list(names_of(self.config.spatial))},
            "encoders": self._encoders,
        }

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> BatchSampler:
        """Random batches, or equal shares of every relation."""
        train = self.datasets["train"]
        return build_sampler(self.config, train.label.numpy(), train.has_pixels.numpy())

    def check_sampler(self, sampler: TrainSampler, say: Say) -> None:
        """Announce how batches are composed; neither sampler has neighbours that could be misaligned."""
        same = self.same_class_negatives(sampler)
        how = f"batches of {self.config.batch_size}, {self.config.sampler.name}"
        say(f"{how}: {same:.0%} of negatives share the relation")

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> dict[str, object]:
        """Numbers on the batches of this epoch."""
        sampler.set_epoch(epoch)
        return {
            "sampler": self.config.sampler.name,
            "same_class_negatives": self.same_class_negatives(sampler),
        }

    def same_class_negatives(self, sampler: TrainSampler, batches: int = 200) -> float:
        """The share of other rows of a batch that have an anchor's relation."""
        assert isinstance(sampler, BatchSampler)
        label, same, every = self.datasets["train"].label.numpy(), 0, 0
        for batch in sampler.plan().batches()[:batches]:
            counts = np.bincount(label[batch])
            same, every = same + int((counts * (counts - 1)).sum()), every + len(batch) * (len(batch) - 1)
        return same / max(every, 1)

    # -- model and loss --------------------------------------------------------------------------------------
    def build_model(self) -> RelationModel:
        """A head for each view."""
        train = self.datasets["train"]
        return RelationModel.from_config(
            self.config,
            train.numbers.shape[1],
            None if train.visual is None else train.visual.shape[1],
            None if train.names is None else train.names.shape[1],
        )

    def encode(self, model: RelationModel, batch: RelationBatch) -> dict[str, Tensor]:
        """The embeddings of every view."""
        views: dict[str, Tensor] = model(batch)
        return views

    def embed(self, model: RelationModel, batch: RelationBatch) -> dict[str, Tensor]:
        """The same at unit length; a view that a pair lacks stays 0."""
        return {name: F.normalize(view, dim=1) for name, view in self.encode(model, batch).items()}

    def loss_of(
        self, model: RelationModel, embeddings: Mapping[str, Tensor], batch: RelationBatch
    ) -> StepOutput:
        """The contrastive loss between every two views of a pair."""
        return StepOutput(self.loss(embeddings, batch), self.loss.record)

    # -- evaluation ------------------------------------------------------------------------------------------
    def before_evaluation(self, model: RelationModel, split: str, final: bool) -> None:
        """Embed the training pairs on which the probes are fitted."""
        self.evaluator.embed_train(model, split, final, lambda: initial_model(self, self.config.seed))

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """Probe accuracy, with its controls when ``final``, and pair retrieval."""
        return self.evaluator.evaluate(outputs, split, final)

    # -- report ----------------------------------------------------------------------------------------------
    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """Probes and controls, the confusion table, pair retrieval, pictures of pairs with their boxes."""
        evaluator = self.evaluator
        return sections(self.data.splits[split], evaluator.predictions[split], evaluator.scores[split])

    def save_results(self, folder: Path) -> None:
        """The prediction for every pair, for re-scoring and pooled cross-validation."""
        for split, predictions in self.evaluator.predictions.items():
            predictions.save(folder / f"predictions_{split}.npz")
