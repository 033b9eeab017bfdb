"""The frozen detector's look at pictures: clean, perturbed, and perturbed at random by as much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.models.detection import Detector, DetectorOutput
from nearfar.models.detection.boxes import corners
from nearfar.systems.fair_detection.data import PictureBatch, PictureDataset
from nearfar.systems.fair_detection.generator import perturbed
from nearfar.systems.fair_detection.model import FairModel
from nearfar.systems.fair_detection.objective import picture_scores
from nearfar.systems.fair_detection.pictures import chosen

__all__ = ["Looks", "shuffled"]


class Looks:
    """What the detector says of a batch, and what of it need not be asked twice.

    The detector never changes, so that clean pictures of validation and test are looked at once. Of a few pictures of
    each split (``shown``) the last perturbation is kept for the report.
    ``labels``: the detector's label of each category.
    """

    def __init__(
        self, detector: Detector, labels: Sequence[int], config: Any, datasets: Mapping[str, PictureDataset]
    ) -> None:
        # The detector's label -> position of the category, -1 for classes that are not asked for.
        self._category = torch.full((len(detector.classes),), -1)
        self._category[list(labels)] = torch.arange(len(labels))
        self.detector, self.seed, self.control = detector, int(config.seed), str(config.control)
        #: by split, for positions of pictures: the last perturbed picture (h, w, 3)
        self.shown: dict[str, dict[int, np.ndarray | None]] = {
            name: dict.fromkeys(chosen(dataset.group, config.pictures, self.seed))
            for name, dataset in datasets.items()
        }
        self.datasets, self.bound = dict(datasets), 0.0
        self._clean: dict[str, dict[int, dict[str, Tensor]]] = {name: {} for name in datasets}

    def detect(self, pixels: Float[Tensor, "n 3 h w"]) -> DetectorOutput:
        """The detector's answer, wherever the pictures are; gradients reach them."""
        if next(self.detector.parameters()).device != pixels.device:
            self.detector.to(pixels.device)
        return self.detector(pixels)

    def perturbation(
        self, model: FairModel, batch: PictureBatch, pixels: Float[Tensor, "n 3 h w"]
    ) -> Float[Tensor, "n 3 h w"]:
        """δ: the generator's or, as a control, none, or ± the bound at random, of a picture always alike."""
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
    def at(self, model: FairModel, batch: PictureBatch) -> dict[str, Tensor]:
        """Of each kind of picture (``clean``, ``random``, ``perturbed``) detections (n, queries, 6): corners as shares,
        score, category; of clean and perturbed ones ``features`` and image scores; sizes of the perturbation.

        The random perturbation is the picture's own with its pixels in another order: of the same size by any norm.
        """
        pixels = batch.pixels
        changed = perturbed(pixels, self.perturbation(model, batch, pixels))
        delta = changed - pixels
        self.bound = float(model.epsilon)
        for row, position in enumerate(batch.positions.tolist()):
            if position in self.shown[batch.split]:
                self.shown[batch.split][position] = changed[row].permute(1, 2, 0).cpu().numpy()
        clean, after = self.clean(batch, pixels), self._look(changed, batch)
        moved = [
            shuffled(d, self._generator(i)) for d, i in zip(delta, batch.positions.tolist(), strict=True)
        ]
        noisy = self._look(perturbed(pixels, torch.stack(moved)), batch)
        flat = delta.flatten(1)
        sizes = torch.stack([flat.abs().amax(dim=1), flat.norm(dim=1)], dim=1)
        return {
            "clean": clean["found"],
            "random": noisy["found"],
            "perturbed": after["found"],
            "features": after["features"],
            "clean_features": clean["features"],
            # Three axes, since matrices are taken for embeddings.
            "scores": torch.stack([clean["scores"], after["scores"]], dim=1)[..., None],
            "sizes": sizes[..., None],
        }

    @torch.no_grad()
    def clean(self, batch: PictureBatch, pixels: Tensor | None = None) -> dict[str, Tensor]:
        """The look at the pictures as they are."""
        kept, positions = self._clean[batch.split], batch.positions.tolist()
        if any(position not in kept for position in positions):
            found = self._look(batch.pixels if pixels is None else pixels, batch)
            for row, position in enumerate(positions):
                kept[position] = {name: part[row].cpu() for name, part in found.items()}
        names = kept[positions[0]]
        return {
            name: torch.stack([kept[i][name] for i in positions]).to(batch.pictures.device) for name in names
        }

    def _look(self, pixels: Tensor, batch: PictureBatch) -> dict[str, Tensor]:
        output = self.detect(pixels)
        scores, labels = output.probabilities().max(dim=-1)
        category = self._category.to(labels.device)[labels]
        boxes = corners(output.boxes).clamp(0, 1)
        matches = self.detector.match(output, batch.targets)
        return {
            "found": torch.cat([boxes, scores[..., None], category[..., None].to(boxes)], dim=-1).float(),
            "features": output.features.mean(dim=1).float(),
            "scores": picture_scores(output, batch.targets, matches).float(),
        }

    def _generator(self, position: int) -> torch.Generator:
        """Of a picture: its noise depends on no batch and no epoch."""
        return torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, position]).generate_state(1)[0])
        )


def shuffled(delta: Float[Tensor, "3 h w"], generator: torch.Generator) -> Float[Tensor, "3 h w"]:
    """The same perturbation with its pixels in another order, colours together.

    >>> delta = torch.arange(12.0).reshape(3, 2, 2)
    >>> other = shuffled(delta, torch.Generator().manual_seed(1))
    >>> bool(other.norm() == delta.norm()), bool((other[1] - other[0] == 4).all())
    (True, True)
    """
    order = torch.randperm(delta[0].numel(), generator=generator).to(delta.device)
    return delta.flatten(1)[:, order].reshape(delta.shape)
