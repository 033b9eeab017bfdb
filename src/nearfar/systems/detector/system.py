"""The detector as a system: cached maps at first, then the whole network; AP, AR and the gap of two groups."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nearfar.config.samplers import Items as SamplerItems
from nearfar.data.batch import Batch, ItemDataset
from nearfar.data.coco import CocoSplit
from nearfar.data.coco_results import box_rows
from nearfar.data.coco_splits import DetectionData
from nearfar.data.detection import KeptView, View, detection_dataset, targets_of
from nearfar.data.files import Json, read_json
from nearfar.data.items import Items
from nearfar.errors import NearfarError
from nearfar.metrics.detection import (
    Boxes,
    constant_boxes,
    detection_estimates,
    detection_evidence,
    predicted_boxes,
    true_boxes,
)
from nearfar.metrics.detection_evaluator import check_evidence
from nearfar.models.detection import DetectorOutput
from nearfar.models.detection.detector import corners, iou
from nearfar.models.detection.network import SmallDetector, cached_maps
from nearfar.systems.detector.data import PictureSystem, read_splits
from nearfar.systems.detector.model import build_detector, build_encoder
from nearfar.systems.detector.options import DetectorOptions
from nearfar.systems.detector.report import pictures_section
from nearfar.training.batches import build_sampler
from nearfar.training.sections import Section
from nearfar.training.system import Evaluation, Say, StepOutput, TrainSampler

__all__ = ["DetectorSystem"]


class DetectorSystem(PictureSystem[SmallDetector]):
    """Trains a small detector on boxes in COCO format."""

    name = "detector"
    monitor = "AP"

    config: DetectorOptions

    def __init__(self, config: DetectorOptions) -> None:
        self.config = config
        self.splits: dict[str, CocoSplit] = {}
        self.datasets: dict[str, ItemDataset] = {}
        self._true: dict[str, Boxes] = {}
        self._description = ""
        self._classes: tuple[str, ...] = ()  # of a run that was loaded

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read and check the data, and keep the maps of the frozen epochs."""
        config, size = self.config, int(self.config.data.image_size)
        data = self.load_data(say)
        say(data.summary())
        self.splits = data.splits
        self._true = {name: true_boxes(split) for name, split in self.splits.items()}
        encoder = build_encoder(config).eval()
        self._description = encoder.description
        say(f"image encoder: {encoder.description}")
        view = View(crop=float(config.crop), colours=float(config.colours))
        for name, split in self.splits.items():
            train = name == "train"
            kept: list[KeptView] = []
            if config.frozen_epochs and name in ("train", "val"):
                views = int(config.views) if train else 1
                kept = cached_maps(split, encoder, size, views, view, config.seed, say if train else _quiet)
            self.datasets[name] = detection_dataset(
                split,
                size,
                kept=kept,
                kept_until=int(config.frozen_epochs) if train else 0,
                augment=view if train else None,
                seed=int(config.seed),
            )

    def load_data(self, say: Say) -> DetectionData:
        """The splits of the configured files."""
        return DetectionData(read_splits(self.config.data, say))

    def layout(self) -> Json:
        """Counts, rejections, hashes, groups, and the encoder in use."""
        return {
            "system": self.name,
            **DetectionData(self.splits).layout(),
            "image_encoder": self._description,
        }

    @property
    def classes(self) -> tuple[str, ...]:
        """The categories, in the order of their labels."""
        return self.splits["train"].categories if self.splits else self._classes

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> TrainSampler:
        """Random batches, or batches in which the groups are evenly represented."""
        train = self.splits["train"]
        groups = (lambda: np.array([image.group for image in train.images])) if train.groups else None
        return build_sampler(self.config, SamplerItems(len(train), labels=groups))

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> Json:
        """Whether the encoder is frozen in this epoch."""
        frozen = epoch < self.config.frozen_epochs
        if epoch == self.config.frozen_epochs and epoch:
            say(f"epoch {epoch + 1}: the whole encoder learns from now on")
        return {"sampler": self.config.sampler.name, "frozen": frozen}

    # -- model and loss --------------------------------------------------------------------------------------
    def build_model(self) -> SmallDetector:
        """The image encoder with its weights, and the rest freshly initialised."""
        return build_detector(self.config, self.classes, trained=None if self.splits else False)

    def parameter_groups(self, model: nn.Module) -> list[Json]:
        """The encoder learns more slowly; weight decay for matrices alone."""
        rate = float(self.config.lr)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, weight in model.named_parameters():
            groups.setdefault((name.startswith("encoder."), weight.ndim >= 2), []).append(weight)
        return [
            {
                "params": weights,
                "lr": rate * float(self.config.encoder_lr) if encoder else rate,
                "weight_decay": float(self.config.weight_decay) if matrices else 0.0,
            }
            for (encoder, matrices), weights in groups.items()
        ]

    def training_step(self, model: SmallDetector, batch: Batch) -> StepOutput:
        """The set loss of all layers."""
        if model.training and "maps" not in batch:
            model.moved.fill_(True)
        output = self._output(model, batch)
        return StepOutput(model.set_loss(output, targets_of(batch)), lambda: _record(model, output, batch))

    def _output(self, model: SmallDetector, batch: Batch) -> DetectorOutput:
        """From kept maps while they are those of the encoder, else from pixels."""
        if "maps" in batch and not bool(model.moved):
            output: DetectorOutput = model.decode(batch.tensor("maps"))
        elif "pixels" in batch:
            output = model(batch.tensor("pixels"))
        else:
            raise NearfarError(
                "the kept maps are those of the untrained encoder, and this one has learned: frozen_epochs was raised "
                "beyond the epoch that the run had reached. Set it back."
            )
        return output

    def embed(self, model: SmallDetector, batch: Batch) -> dict[str, Tensor]:
        """Boxes, scores and labels of all queries."""
        output = self._output(model, batch)
        scores, labels = output.probabilities().max(-1)
        return {
            "boxes": corners(output.boxes).clamp(0, 1),
            "scores": scores[..., None],
            "labels": labels[..., None],
        }

    # -- evaluation ------------------------------------------------------------------------------------------
    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """AP, AP50, AP75, AR; with groups those of each and the gap; beside them what one constant box scores."""
        data, true = self.splits[split], self._true[split]
        predicted = predicted_boxes(data, outputs)
        evidence = detection_evidence(predicted, true, len(data), data.groups)
        constant = constant_boxes(self.splits["train"], data)
        baseline = detection_evidence(constant, true, len(data), data.groups).statistics()
        # A constant prediction has a gap, too, but it is no level that a gap should exceed.
        chance = {name: float(value[0]) for name, value in baseline.items() if not name.endswith("/gap")}
        estimates, per_item = detection_estimates(
            evidence,
            split=data.content,
            chance=chance,
            resamples=int(self.config.bootstrap) if final else 0,
        )
        facts: Json = {}
        if final:
            facts["baselines"] = {name: value for name, value in chance.items() if name in estimates}
            if data.groups:
                facts["groups"] = {
                    metric: {group: estimates[f"{metric}/{group}"].value for group in data.groups}
                    for metric in ("AP", "AR")
                    if all(f"{metric}/{group}" in estimates for group in data.groups)
                }
            if self.config.check_evaluator:
                own = {name: float(value[0]) for name, value in evidence.statistics().items()}
                far = check_evidence(predicted, true, len(data), data.groups, own)
                facts["evaluator"] = {"name": "faster-coco-eval", "largest_difference": far}
        return Evaluation(split, estimates, data.ids, per_item, facts)

    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """Pictures with their true and their predicted boxes."""
        return [
            pictures_section(
                self.splits[split], self._true[split], predicted_boxes(self.splits[split], outputs)
            )
        ]

    def save_assets(self, folder: Path) -> None:
        """Classes and description, without which the weights could not be loaded."""
        about = {"classes": list(self.classes), "description": f"trained over {self._description}"}
        (folder / "detector.json").write_text(json.dumps(about, ensure_ascii=False, indent=1))

    # -- use of a trained run --------------------------------------------------------------------------------
    def load_assets(self, folder: Path) -> None:
        about = read_json(folder / "detector.json", {"classes": [str], "description": str})
        self._classes = tuple(about["classes"])
        self._description = about["description"].removeprefix("trained over ")

    @property
    def image_size(self) -> int:
        """Pixels that pictures are resized to each way."""
        return int(self.config.data.image_size)

    def predictions(self, outputs: Mapping[str, Tensor], items: Items) -> dict[str, list[object]]:
        """A row for each box: picture, category, score, and left, top, width and height in pixels."""
        scores, labels = outputs["scores"][..., 0], outputs["labels"][..., 0]
        return box_rows(outputs["boxes"], scores, labels, self.classes, items)


def _record(model: SmallDetector, output: DetectorOutput, batch: Batch) -> dict[str, float]:
    """Of the pairs of the last layer: mean IoU and mean probability of the true class."""
    targets = targets_of(batch)
    matches = model.match(output, targets)
    fits, scores = [], []
    probabilities, boxes = output.probabilities().detach(), corners(output.boxes.detach())
    for i, (match, target) in enumerate(zip(matches, targets, strict=True)):
        true = corners(target.boxes[match.targets])
        fits.append(iou(boxes[i, match.queries], true))
        scores.append(probabilities[i, match.queries, target.labels[match.targets]])
    if not any(len(fit) for fit in fits):
        return {}
    return {"matched_iou": float(torch.cat(fits).mean()), "matched_score": float(torch.cat(scores).mean())}


def _quiet(_: str) -> None:
    pass
