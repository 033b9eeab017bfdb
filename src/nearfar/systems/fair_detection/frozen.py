"""The frozen detector (given, or trained first), its outputs, and the three losses of the perturbation.

Contrast by score, the gap of the groups' scores, and detection itself.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nearfar.config.options import read_options, to_dict
from nearfar.data.batch import Batch
from nearfar.data.cache import cache_dir, content_key
from nearfar.data.coco import CocoSplit
from nearfar.data.detection import targets_of
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses import AdaptiveScoreContrastiveLoss, BidirectionalScoreContrastiveLoss, Objective
from nearfar.metrics.detection import detection_boxes, detection_estimates, detection_evidence, true_boxes
from nearfar.models.detection import Detector, DetectorOutput, Match, Target
from nearfar.models.detection.detector import corners
from nearfar.models.perturbation import FairModel, perturbed
from nearfar.systems.detector.model import load_detector
from nearfar.systems.detector.options import DetectorOptions, DetectorRecipe, PictureData, SceneData
from nearfar.systems.fair_detection.evaluation import PictureSplit, clean_pixels
from nearfar.systems.fair_detection.options import (
    FairDetectionOptions,
    FairPictures,
    SceneRecipe,
    term_weights,
)

__all__ = [
    "DetectorOutputs",
    "FairObjective",
    "Losses",
    "chosen",
    "frozen_detector",
    "lower_group",
    "picture_scores",
    "shuffled",
    "weights_key",
]


def picture_scores(
    output: DetectorOutput, targets: Sequence[Target], matches: Sequence[Match]
) -> Float[Tensor, " n"]:
    """Score of each picture: the mean over matched queries of the probability of the true class.

    A picture without true boxes has the score 0; the data of this system has none.
    """
    probabilities = output.probabilities()
    scores = []
    for of_picture, target, match in zip(probabilities, targets, matches, strict=True):
        true = of_picture[match.queries, target.labels[match.targets]]
        scores.append(true.mean() if len(true) else of_picture.sum() * 0.0)
    return torch.stack(scores)


@dataclass
class Losses:
    """The losses by name, and the scores and features that they were computed from."""

    values: dict[str, Tensor]
    scores: Float[Tensor, " n"]
    features: Float[Tensor, "n d"]


class FairObjective:
    """λ_c · w(t) · contrastive + λ_w · wasserstein + β(t) · detection.

    A loss of weight 0 is computed for the log all the same where it costs nothing more: all three come from one pass of
    the detector.
    """

    def __init__(self, config: FairDetectionOptions) -> None:
        kind = BidirectionalScoreContrastiveLoss if config.bidirectional else AdaptiveScoreContrastiveLoss
        self.contrastive = kind(
            config.temperature,
            config.top_fraction,
            config.bottom_fraction,
            config.min_samples,
            config.middle,
            config.detach_positives,
            config.threshold,
        )
        self.sum = Objective(term_weights(config))

    def __call__(
        self,
        model: FairModel,
        detector: Detector,
        output: DetectorOutput,
        targets: Sequence[Target],
        lower: Int[Tensor, " n"],
    ) -> Losses:
        """``lower``: 1 for pictures of the group with the lower AP, 0 for the others."""
        scores = picture_scores(output, targets, detector.match(output, targets))
        features = output.features.mean(dim=1)
        is_lower = lower.bool()
        values = {
            "contrastive": self.contrastive(model.head(features), scores),
            "wasserstein": model.wasserstein(scores[is_lower], scores[~is_lower]),
            "detection": detector.set_loss(output, targets),
        }
        return Losses(values, scores, features)

    def anchors(self, scores: Float[Tensor, " n"]) -> Int[Tensor, " k"]:
        """Positions of the anchors among these scores."""
        return self.contrastive.split(scores).anchors

    def record(self) -> dict[str, float]:
        """Numbers of the last batch under the names of the system's page."""
        record = self.contrastive.record
        assert record is not None
        extra = record.extra
        return {
            "n_anchor": extra["anchors"],
            "n_positive": extra["positives"],
            "middle_share": extra["middle_share"],
            "score_gap": extra["score_gap"],
        }


Say = Callable[[str], None]
_VERSION = 1  # part of the key of a trained detector
_ROWS = 32  # pictures that go through the detector at a time


def frozen_detector(config: FairDetectionOptions, splits: dict[str, CocoSplit], say: Say) -> Detector:
    """``config.detector`` by name (see ``load_detector``), or a small one trained on the training pictures.

    What is trained is kept in the cache under pictures and options, so that all runs of a sweep use the same detector.
    """
    if config.detector is not None:
        return load_detector(str(config.detector))
    data = config.used_data
    kind = "scenes" if isinstance(data, SceneData) else "photos"
    options = _training_options(config, data)
    # Where pictures lie and how the run is carried out does not count.
    places = ("dir", "train", "val", "test", "images") if kind == "photos" else ()
    plain = to_dict(options)
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in places}
    key = content_key([_VERSION, plain | {"trainer": None}, *(s.content for s in splits.values())])
    folder = cache_dir() / "detectors" / key[:16]
    if not (folder / "metrics.json").exists():
        try:
            _train(options, folder, say)
        except NearfarError as error:
            raise NearfarError(
                f"training a detector first, with the options of detector_training.{kind}: {error}"
            ) from None
    say(f"detector: kept in {folder}")
    return load_detector(folder)


def _training_options(config: FairDetectionOptions, data: PictureData | SceneData) -> DetectorOptions:
    """Options of ``experiment=detector``: those of ``detector_training``, our data, our devices."""
    recipe = (
        config.detector_training.scenes if isinstance(data, SceneData) else config.detector_training.photos
    )
    own = {each.name: getattr(recipe, each.name) for each in fields(DetectorRecipe)}
    if isinstance(recipe, SceneRecipe):  # in a lighter haze than the one it is judged in
        data = read_options(SceneData, to_dict(data) | recipe.data)
    elif isinstance(data, FairPictures):
        data = PictureData(**{each.name: getattr(data, each.name) for each in fields(PictureData)})
    trainer = replace(
        config.trainer,
        gradient_clip=1.0,
        eval_batch_size=32,
        probe_rows=64,
        max_steps=None,
        log_every=20,
        accumulate=1,
        cached_chunk=None,
    )
    # The seed is not the run's: a different seed of the generator is no different detector.
    options = DetectorOptions(**own, data=data, trainer=trainer, seed=0)
    options.check()
    return options


def _train(config: DetectorOptions, folder: Path, say: Say) -> None:
    from nearfar.systems import build_system
    from nearfar.training.fit import fit
    from nearfar.training.run_folder import RunFolder

    say("no detector= is given: one is trained on these pictures first, and kept")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".training-"))
    try:
        system = build_system(config)
        system.prepare(lambda text: say(f"  {text}"))
        fit(system, config, RunFolder(temporary), say=lambda text: say(f"  {text}"))
        try:
            os.replace(temporary, folder)
        except OSError:  # a different run of the sweep has trained the same detector meanwhile
            if not (folder / "metrics.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lower_group(
    config: FairDetectionOptions, detector_outputs: DetectorOutputs, split: CocoSplit, say: Say
) -> tuple[str, str]:
    """The group with the lower AP (``lower_group``, or measured on clean validation pictures), and the other."""
    names = split.groups
    if config.lower_group is not None:
        lower = str(config.lower_group)
        if lower not in names:
            raise NearfarError(f"lower_group={lower}: there is no such group; {nearest_name(lower, names)}")
        return lower, next(name for name in names if name != lower)
    pair = (names[0], names[1])
    detections = torch.cat(
        [part["detections"] for part in _clean(detector_outputs, len(split), config)]
    ).cpu()
    evidence = detection_evidence(detection_boxes(detections, split), true_boxes(split), len(split), pair)
    numbers, _ = detection_estimates(evidence, resamples=0)
    a, b = (numbers[f"AP/{name}"].value for name in pair)
    gap = numbers["AP/gap"]
    say(
        f"clean validation pictures: AP {names[0]} {a:.3f}, {names[1]} {b:.3f}, "
        f"difference {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    )
    return pair if a <= b else (pair[1], pair[0])


def _clean(
    detector_outputs: DetectorOutputs, n: int, config: FairDetectionOptions
) -> list[dict[str, torch.Tensor]]:
    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    device = torch.device("cuda" if on_gpu else "cpu")
    dataset = detector_outputs.parts["val"].dataset()
    rows = [list(range(start, min(start + _ROWS, n))) for start in range(0, n, _ROWS)]
    return [detector_outputs.clean(dataset.__getitems__(positions).to(device)) for positions in rows]


def weights_key(detector: Detector) -> str:
    """Names the detector's weights: sixteen hexadecimal digits."""
    state = detector.state_dict()
    return content_key({name: tensor.cpu().numpy() for name, tensor in state.items()})[:16]


def chosen(groups: Float[np.ndarray, " n"] | Sequence[int], count: int, seed: int) -> list[int]:
    """Positions of ``count`` pictures, drawn by ``seed``, as many of each of the two groups as there can be.

    >>> sorted(chosen([0, 1, 1, 1, 0], 4, 0))[0] in (0, 1, 2)
    True
    """
    values = np.asarray(groups)
    rng = np.random.default_rng([seed, len(values)])
    parts = [rng.permutation(np.flatnonzero(values == value)).tolist() for value in np.unique(values)]
    mixed = [part[i] for i in range(max(map(len, parts), default=0)) for part in parts if i < len(part)]
    return mixed[:count]


class DetectorOutputs:
    """Outputs of the frozen detector for clean, perturbed and randomly perturbed pictures.

    The detector never changes, so its outputs for clean pictures are computed once and kept. Of a few pictures of each
    split (``shown``) the last perturbation is kept for the report.

    ``labels``: the detector's label of each category.
    """

    def __init__(
        self,
        detector: Detector,
        labels: Sequence[int],
        config: FairDetectionOptions,
        parts: Mapping[str, PictureSplit],
    ) -> None:
        # The detector's label -> position of the category, -1 for classes that are not used.
        self._category = torch.full((len(detector.classes),), -1)
        self._category[list(labels)] = torch.arange(len(labels))
        self.detector, self.seed, self.control = detector, int(config.seed), str(config.control)
        #: by number of a split, for positions of pictures: the last perturbed picture (h, w, 3)
        self.shown: dict[int, dict[int, np.ndarray | None]] = {
            part.number: dict.fromkeys(chosen(part.group, config.pictures, self.seed))
            for part in parts.values()
        }
        self.parts, self.bound = dict(parts), 0.0
        self._clean: dict[int, dict[int, dict[str, Tensor]]] = {part.number: {} for part in parts.values()}

    def detect(self, pixels: Float[Tensor, "n 3 h w"]) -> DetectorOutput:
        """The detector's output, on the device of the pictures; gradients reach the pictures."""
        if next(self.detector.parameters()).device != pixels.device:
            self.detector.to(pixels.device)
        return self.detector(pixels)

    def perturbation(
        self, model: FairModel, batch: Batch, pixels: Float[Tensor, "n 3 h w"]
    ) -> Float[Tensor, "n 3 h w"]:
        """δ: the generator's or, as a control, none, or ± the bound at random, the same for a picture every time."""
        if self.control == "none":
            return torch.zeros_like(pixels)
        if self.control == "random":
            signs = [
                torch.randint(0, 2, pixels.shape[1:], generator=self._generator(i))
                for i in batch.positions.tolist()
            ]
            return (2.0 * torch.stack(signs) - 1.0).to(pixels) * model.epsilon
        return model.perturbation(pixels)

    @torch.no_grad()
    def of_batch(self, model: FairModel, batch: Batch) -> dict[str, Tensor]:
        """Of each kind of picture (``clean``, ``random``, ``perturbed``) detections (n, queries, 6): corners as shares,
        score, category; of clean and perturbed ones ``features`` and image scores; sizes of the perturbation.

        The random perturbation is the picture's own with its pixels in a different order: every norm is the same.
        """
        pixels = clean_pixels(batch)
        changed = perturbed(pixels, self.perturbation(model, batch, pixels))
        delta = changed - pixels
        self.bound = float(model.epsilon)
        shown = self.shown[_split_of(batch)]
        for row, position in enumerate(batch.positions.tolist()):
            if position in shown:
                shown[position] = changed[row].permute(1, 2, 0).cpu().numpy()
        clean, after = self.clean(batch, pixels), self._run(changed, batch)
        moved = [
            shuffled(d, self._generator(i)) for d, i in zip(delta, batch.positions.tolist(), strict=True)
        ]
        noisy = self._run(perturbed(pixels, torch.stack(moved)), batch)
        flat = delta.flatten(1)
        sizes = torch.stack([flat.abs().amax(dim=1), flat.norm(dim=1)], dim=1)
        return {
            "clean": clean["detections"],
            "random": noisy["detections"],
            "perturbed": after["detections"],
            "features": after["features"],
            "clean_features": clean["features"],
            # Three axes, since matrices are taken for embeddings.
            "scores": torch.stack([clean["scores"], after["scores"]], dim=1)[..., None],
            "sizes": sizes[..., None],
        }

    @torch.no_grad()
    def clean(self, batch: Batch, pixels: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs for the clean pictures, computed once and kept."""
        kept, positions = self._clean[_split_of(batch)], batch.positions.tolist()
        if any(position not in kept for position in positions):
            outputs = self._run(clean_pixels(batch) if pixels is None else pixels, batch)
            for row, position in enumerate(positions):
                kept[position] = {name: part[row].cpu() for name, part in outputs.items()}
        names = kept[positions[0]]
        return {
            name: torch.stack([kept[i][name] for i in positions]).to(batch.positions.device) for name in names
        }

    @torch.no_grad()
    def of_new(self, model: FairModel, batch: Batch) -> dict[str, Tensor]:
        """Detections (n, queries, 6) of new pictures, perturbed: the same numbers as ``of_batch`` has."""
        pixels = clean_pixels(batch)
        changed = perturbed(pixels, self.perturbation(model, batch, pixels))
        return {"perturbed": self._detections(self.detect(changed))}

    def _detections(self, output: DetectorOutput) -> Float[Tensor, "n q 6"]:
        scores, labels = output.probabilities().max(dim=-1)
        category = self._category.to(labels.device)[labels]
        boxes = corners(output.boxes).clamp(0, 1)
        return torch.cat([boxes, scores[..., None], category[..., None].to(boxes)], dim=-1).float()

    def _run(self, pixels: Tensor, batch: Batch) -> dict[str, Tensor]:
        output = self.detect(pixels)
        matches = self.detector.match(output, targets_of(batch))
        return {
            "detections": self._detections(output),
            "features": output.features.mean(dim=1).float(),
            "scores": picture_scores(output, targets_of(batch), matches).float(),
        }

    def _generator(self, position: int) -> torch.Generator:
        """The generator of one picture: its noise depends neither on the batch nor on the epoch."""
        return torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, position]).generate_state(1)[0])
        )


def _split_of(batch: Batch) -> int:
    """The number of the split that a batch is of."""
    return int(batch.tensor("split")[0])


def shuffled(delta: Float[Tensor, "3 h w"], generator: torch.Generator) -> Float[Tensor, "3 h w"]:
    """The same perturbation with its pixels in a different order, colours together.

    >>> delta = torch.arange(12.0).reshape(3, 2, 2)
    >>> other = shuffled(delta, torch.Generator().manual_seed(1))
    >>> bool(other.norm() == delta.norm()), bool((other[1] - other[0] == 4).all())
    (True, True)
    """
    order = torch.randperm(delta[0].numel(), generator=generator).to(delta.device)
    return delta.flatten(1)[:, order].reshape(delta.shape)
