"""The fair-detection system: a perturbation trained against a frozen detector, evaluated by group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nearfar.batching import BalancedBatchSampler
from nearfar.data.batch import Batch, ItemDataset
from nearfar.data.cache import content_key
from nearfar.data.coco import CocoSplit
from nearfar.data.coco_results import box_rows
from nearfar.data.coco_splits import DetectionData
from nearfar.data.detection import targets_of
from nearfar.data.files import Json, Maybe, read_json
from nearfar.data.items import Items
from nearfar.data.splits import check_disjoint
from nearfar.errors import NearfarError
from nearfar.metrics import group_signals
from nearfar.models.detection import Detector
from nearfar.models.detection.network import SmallDetector
from nearfar.models.perturbation import FairModel, perturbed
from nearfar.systems.detector.data import PictureSystem, read_splits
from nearfar.systems.detector.model import load_detector, load_frozen, save_frozen
from nearfar.systems.fair_detection.evaluation import FairResults, PictureSplit, clean_pixels, with_group
from nearfar.systems.fair_detection.frozen import (
    DetectorOutputs,
    FairObjective,
    Losses,
    frozen_detector,
    lower_group,
    weights_key,
)
from nearfar.systems.fair_detection.options import FairDetectionOptions, epsilon_schedule
from nearfar.systems.fair_detection.report import report_sections
from nearfar.systems.new_items import prepare_again
from nearfar.training.sections import Section
from nearfar.training.system import Evaluation, Say, StepOutput, TrainSampler

__all__ = ["FairDetectionSystem"]

ASSETS, DETECTOR = "fair_detection.json", "detector"


class FairDetectionSystem(PictureSystem[FairModel]):
    """Trains a generator of bounded perturbations that closes the gap of a frozen detector between two groups."""

    name = "fair_detection"
    monitor = "AP/gap_closed"

    config: FairDetectionOptions

    def __init__(self, config: FairDetectionOptions) -> None:
        self.config = config
        self.objective = FairObjective(config)
        self.bound = epsilon_schedule(config)
        self.detector: Detector
        self.splits: dict[str, CocoSplit] = {}
        # of a run that was loaded
        self._categories: tuple[str, ...] = ()
        self._image_size: int | None = None
        self.groups: tuple[str, str]  # the one with the lower AP, the other
        self.epoch = 0
        self.parts: dict[str, PictureSplit] = {}
        self.datasets: dict[str, ItemDataset] = {}
        self._results: dict[str, FairResults] = {}

    # -- data ------------------------------------------------------------------------------------------------
    def prepare(self, say: Say) -> None:
        """Read the pictures, load (or, for generated scenes, train) the detector, find the group with the lower AP."""
        config = self.config
        read = self.load_data(say)
        say(read.summary())
        self.splits = read.splits
        if "val" not in self.splits:
            raise NearfarError("there is no validation split to choose the epoch by: set data.val_fraction.")
        self.detector = frozen_detector(config, self.splits, say)
        say(f"detector: {self.detector.description}, frozen")
        labels = [self.detector.label(name) for name in self.splits["train"].categories]
        size = config.used_data.image_size
        self.parts = {
            name: PictureSplit(split, number, size, labels)
            for number, (name, split) in enumerate(self.splits.items())
        }
        self.detector_outputs = DetectorOutputs(self.detector, labels, config, self.parts)
        self.groups = lower_group(config, self.detector_outputs, self.splits["val"], say)
        self.datasets = {
            name: part.dataset(part.split.groups.index(self.groups[0])) for name, part in self.parts.items()
        }
        self._weights = weights_key(self.detector)

    def load_data(self, say: Say) -> DetectionData:
        """The splits; of their pictures those that have a group and a box."""
        data = self.config.used_data
        read = read_splits(data, say)
        splits = {name: with_group(split) for name, split in read.items()}
        for name, split in read.items():
            if not len(splits[name]):
                raise NearfarError(
                    f"{split.source}: of {len(split)} pictures none has a box and belongs to one of the groups "
                    f"{split.groups}: with boxes of both, a picture belongs to neither. "
                    f"data.group_key={data.group_key} names the attribute."
                )
            if less := len(split) - len(splits[name]):
                say(f"{name}: {less} pictures without a group or a box to find are left out")
        return DetectionData(splits)

    def layout(self) -> Json:
        """Counts, rejections and hashes of the splits, and the detector really used."""
        digests = {name: [image.digest for image in split.images] for name, split in self.splits.items()}
        return {
            "data_hash": content_key([split.content for split in self.splits.values()], self._weights)[:16],
            "splits": {name: split.layout() | {"rows": len(split)} for name, split in self.splits.items()},
            "leaks": check_disjoint(digests, "picture", on_leak="count"),
            "detector": {
                "description": self.detector.description,
                "weights": self._weights,
                "classes": len(self.detector.classes),
                "width": self.detector.width,
            },
            "lower_group": self.groups[0],
            "upper_group": self.groups[1],
        }

    # -- batches ---------------------------------------------------------------------------------------------
    def build_sampler(self) -> BalancedBatchSampler:
        """Batches with equal shares of the two groups; of an odd batch, one more of either in turn."""
        train, size = self.parts["train"], self.config.batch_size
        if size > len(train):
            raise NearfarError(
                f"batch_size={size} is larger than the training set of {len(train)} pictures; lower it."
            )
        return BalancedBatchSampler(
            train.group, size, repeat=True, seed=self.config.seed, ids=self.splits["train"].ids
        )

    def on_epoch(self, epoch: int, sampler: TrainSampler, say: Say) -> Json:
        """The bound of the perturbation and the weights of the losses of this epoch."""
        self.epoch = epoch
        control = self.config.control
        if epoch == 0 and control in ("none", "random"):
            say(f"control={control}: nothing is trained, every epoch is the same but for its bound")
        weights = self.objective.sum.weights(epoch, self.config.epochs)
        return {"epsilon": self.bound(epoch)} | {f"{name}/weight": w for name, w in weights.items()}

    # -- model and loss --------------------------------------------------------------------------------------
    def build_model(self) -> FairModel:
        """Generator, projection head and score queues."""
        config = self.config
        return FairModel(
            self.detector.width,
            channels=config.generator.channels,
            levels=config.generator.levels,
            head_norm=config.head_norm,
            head_hidden=config.head_hidden,
            head_dim=config.head_dim,
            queue=config.score_queue,
            form=config.wasserstein_form,
            rescale_gradient=config.rescale_gradient,
        )

    def training_step(self, model: FairModel, batch: Batch) -> StepOutput:
        """One batch: perturb, detect, and descend the three losses."""
        if model.training:  # in eval mode the bound is that of the checkpoint
            model.epsilon.fill_(self.bound(self.epoch))
        pixels = clean_pixels(batch)
        delta = self.detector_outputs.perturbation(model, batch, pixels)
        if self.config.control in ("none", "random"):
            zero = 0.0 * torch.stack([parameter.sum() for parameter in model.parameters()]).sum()
            return StepOutput(zero, lambda: _sizes(perturbed(pixels, delta) - pixels))
        changed = perturbed(pixels, delta)
        output = self.detector_outputs.detect(changed)
        losses = self.objective(model, self.detector, output, targets_of(batch), batch.tensor("lower"))
        place = {"position": self.epoch, "total": self.config.epochs}
        total = self.objective.sum(losses.values, **place)
        return StepOutput(
            total,
            lambda: self._record(losses, changed - pixels, batch, model),
            lambda: self.objective.sum.measure_shares(losses.values, delta, **place).to_dict(),
        )

    def _record(self, losses: Losses, delta: Tensor, batch: Batch, model: FairModel) -> dict[str, float]:
        """Numbers of a step, by the names of docs/systems/fair_detection.md and by those that the doctor reads."""
        values = {name: value.item() for name, value in losses.values.items()}
        assert self.objective.sum.record is not None
        assert self.objective.contrastive.record is not None
        lower, scores = batch.tensor("lower").bool(), losses.scores.detach()
        named = [self.groups[0] if is_lower else self.groups[1] for is_lower in lower.tolist()]
        by_group = group_signals(named, scores, self.objective.anchors(scores), losses.features)
        record = {
            "loss_contrastive": values["contrastive"],
            "loss_wasserstein": values["wasserstein"],
            "loss_det": values["detection"],
            "score_f": by_group.get(f"score/{self.groups[0]}", float("nan")),
            "score_m": by_group.get(f"score/{self.groups[1]}", float("nan")),
            "epsilon": float(model.epsilon),
        }
        terms = {k: v for k, v in self.objective.sum.record.to_dict().items() if k != "total"}
        return record | self.objective.record() | _sizes(delta) | by_group | terms

    # -- evaluation ------------------------------------------------------------------------------------------
    def embed(self, model: FairModel, batch: Batch) -> dict[str, Tensor]:
        """Detections, image scores and features of clean, perturbed and randomly perturbed pictures; of new pictures
        the detections when they are perturbed."""
        if "split" not in batch:
            return self.detector_outputs.of_new(model, batch)
        return self.detector_outputs.of_batch(model, batch)

    def evaluate(self, outputs: Mapping[str, Tensor], split: str, final: bool) -> Evaluation:
        """AP and AR per group and their gap, perturbed against clean."""
        part = self.splits[split]
        results = FairResults.of(
            outputs, part, self.splits["train"], self.groups, self.config.bootstrap, final, self.config.seed
        )
        self._results[split] = results
        return Evaluation(
            split, results.estimates, part.ids, results.per_item, results.facts() if final else {}
        )

    def report_sections(self, outputs: Mapping[str, Tensor], split: str) -> Sequence[Section]:
        """AP and AR of each group, the gap, and pictures."""
        return report_sections(
            outputs, self.parts[split], self.groups, self._results[split], self.detector_outputs
        )

    def save_assets(self, folder: Path) -> None:
        """Categories, groups, and the frozen detector: one that was trained here with its weights, a transformers model
        by its name and a hash of its weights."""
        about = {
            "categories": list(self.categories),
            "lower_group": self.groups[0],
            "upper_group": self.groups[1],
            "image_size": self.image_size,
            "detector": None if isinstance(self.detector, SmallDetector) else str(self.config.detector),
            "weights": self._weights,
        }
        if isinstance(self.detector, SmallDetector):
            save_frozen(self.detector, folder / DETECTOR)
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / ASSETS).write_text(text, encoding="utf-8")

    # -- use of a trained run --------------------------------------------------------------------------------
    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that are found, in the order of their positions in detections."""
        return self.splits["train"].categories if self.splits else self._categories

    @property
    def image_size(self) -> int:
        """Pixels that pictures are resized to each way."""
        return self._image_size or self.config.used_data.image_size

    def load_assets(self, folder: Path) -> None:
        """The frozen detector; of a run of before it was kept, by the run's data."""
        if not (folder / ASSETS).is_file():
            whole = FairDetectionSystem(self.config)
            prepare_again(whole, folder, "the detector that it was trained against")
            self.detector, self.groups, self._weights = whole.detector, whole.groups, whole._weights
            self._categories = whole.categories
        else:
            shape = {
                "categories": [str], "lower_group": str, "upper_group": str, "image_size": int,
                "detector": Maybe(str), "weights": str,
            }  # fmt: skip
            about = read_json(folder / ASSETS, shape)
            self._categories, self._image_size = tuple(about["categories"]), about["image_size"]
            self.groups, self._weights = (about["lower_group"], about["upper_group"]), about["weights"]
            name = about["detector"]
            self.detector = load_frozen(folder / DETECTOR) if name is None else load_detector(name)
            if weights_key(self.detector) != self._weights:
                raise NearfarError(
                    f"{folder}: the detector ({name or folder / DETECTOR}) has other weights than those that this run "
                    "was trained against; bring back those of then, or train again."
                )
        labels = [self.detector.label(name) for name in self._categories]
        self.detector_outputs = DetectorOutputs(self.detector, labels, self.config, {})

    def predictions(self, outputs: Mapping[str, Tensor], items: Items) -> dict[str, list[object]]:
        """A row for each box that the detector finds in the perturbed picture, see `box_rows`."""
        boxes = outputs["perturbed"]
        return box_rows(boxes[..., :4], boxes[..., 4], boxes[..., 5].long(), self.categories, items)


def _sizes(delta: Tensor) -> dict[str, float]:
    """The largest change of a value in the batch, and the mean length of a picture's perturbation."""
    flat = delta.detach().flatten(1)
    return {"delta_linf": flat.abs().max().item(), "delta_l2": flat.norm(dim=1).mean().item()}
