"""AP and AR of two groups on clean, perturbed and noisy pictures, the gap between the groups, and a verdict."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from nearfar.data.coco import CocoSplit
from nearfar.metrics import Estimate
from nearfar.metrics.detection import (
    Boxes,
    Change,
    DetectionEvidence,
    detection_change,
    detection_estimates,
    detection_evidence,
)
from nearfar.metrics.intervals import bootstrap_levels, normal_quantile
from nearfar.models.detection import Detector, DetectorOutput
from nearfar.models.detection.detector import corners
from nearfar.systems.detector.system import constant_boxes, found_boxes, true_boxes
from nearfar.systems.fair_detection.data import PictureBatch, PictureDataset
from nearfar.systems.fair_detection.model import FairModel, perturbed
from nearfar.systems.fair_detection.objective import picture_scores
from nearfar.systems.fair_detection.options import FairDetectionOptions
from nearfar.training.sections import Picture

__all__ = [
    "GOAL",
    "METRICS",
    "Findings",
    "Looks",
    "chosen",
    "detected",
    "gap_closed",
    "judge",
    "ordered",
    "panel",
    "shuffled",
]


#: share of the gap that is to be closed
GOAL = 0.15
METRICS = ("AP", "AR")
KINDS = ("perturbed", "clean", "random")


@dataclass
class Findings:
    """Evidence of a split by kind of picture (``perturbed``, ``clean``, ``random``) and what came of it.

    ``changes[metric]``: of perturbed against clean pictures, as ``detection_change`` names them; ``controls`` the same
    of random perturbations of the same size.
    """

    evidence: dict[str, DetectionEvidence]
    estimates: dict[str, Estimate]
    per_item: dict[str, NDArray[np.float64]]
    changes: dict[str, dict[str, Change]]
    controls: dict[str, dict[str, Change]]
    verdict: str = ""
    reached: bool = False

    @classmethod
    def of(
        cls,
        outputs: Mapping[str, Tensor],
        split: CocoSplit,
        train: CocoSplit,
        groups: tuple[str, str],
        resamples: int,
        final: bool,
        seed: int = 0,
    ) -> Findings:
        """From the detections of a split, see ``detected``.

        ``groups``: the one that is found less well, and the other. What the mean box of ``train``, given for every
        picture, scores is the chance level. Only ``final`` asks for every interval and for changes.
        """
        true = ordered(true_boxes(split), split.groups, groups)
        evidence = {
            kind: detection_evidence(detected(outputs[kind], split), true, len(split), groups)
            for kind in (KINDS if final else KINDS[:2])
        }
        constant = detection_evidence(constant_boxes(train, split), true, len(split), groups).statistics()
        chance = {name: float(value[0]) for name, value in constant.items() if not name.endswith("/gap")}
        hashed = split.content
        estimates: dict[str, Estimate] = {}
        per_item: dict[str, NDArray[np.float64]] = {}
        for kind, matched in evidence.items():
            draws = resamples if final else 0
            numbers, items = detection_estimates(
                matched, split=hashed, chance=chance, resamples=draws, seed=seed
            )
            prefix = "" if kind == "perturbed" else f"{kind}/"
            kept = [name for name in numbers if name.split("/")[0] in METRICS and (final or not prefix)]
            estimates |= {prefix + name: numbers[name] for name in kept}
            if kind == "perturbed":
                # A gap of either sign is no score: what compares runs is how much of it is closed.
                per_item |= {name: items[name] for name in kept if not name.endswith("/gap")}
        for metric in METRICS:
            estimate, values = gap_closed(
                evidence["clean"], evidence["perturbed"], metric, resamples if final else 0, hashed, seed
            )
            estimates[estimate.metric], per_item[estimate.metric] = estimate, values
        made = cls(evidence, estimates, per_item, {}, {})
        if final:
            draws = max(resamples, 100)
            for metric in METRICS:
                for kind, into in (("perturbed", made.changes), ("random", made.controls)):
                    into[metric] = detection_change(
                        evidence["clean"], evidence[kind], metric, resamples=draws, seed=seed
                    )
            made.reached, made.verdict = judge(made.changes["AP"], estimates["clean/AP/gap"], groups)
        return made

    def facts(self) -> dict[str, Any]:
        """For the top level of ``metrics.json``: what the doctor's rules on groups and differences read."""
        groups = self.evidence["clean"].groups
        return {
            "baselines": {
                name: self.estimates[name].chance
                for name in self.estimates
                if "/" not in name or name.split("/")[1] in groups
            },
            "groups": {
                metric: {group: self.estimates[f"{metric}/{group}"].value for group in groups}
                for metric in METRICS
            },
            "change": {
                metric: {group: found[f"{metric}/{group}"].value for group in groups}
                for metric, found in self.changes.items()
            },
            "comparison": {
                f"{metric} gap": found[f"{metric}/gap"].as_dict() for metric, found in self.changes.items()
            },
            "modes": {
                metric: {name: found[name].as_dict() for name in ("common mode", "gap size", f"{metric}/gap")}
                for metric, found in self.changes.items()
            },
            "verdict": {"reached": self.reached, "goal": GOAL, "words": self.verdict},
        }


def judge(changes: Mapping[str, Change], clean_gap: Estimate, groups: tuple[str, str]) -> tuple[bool, str]:
    """Whether the goal is reached, in words: the AP gap at least 15 % smaller, its change not 0, no group lower.

    How much smaller is said of the gap's size; whether it changed at all, of the signed gap, whose direction was fixed
    on other pictures: the interval of a size is no guide near a size of 0.
    """
    gap, size, common = changes["AP/gap"], changes["gap size"], changes["common mode"]
    each = {group: changes[f"AP/{group}"] for group in groups}
    lost = [group for group, change in each.items() if change.value < 0]
    share = -size.relative
    listed = ", ".join(f"{g} {c.value:+.4f} [{c.low:+.4f}, {c.high:+.4f}]" for g, c in each.items())
    words = (
        f"AP gap ({groups[1]} − {groups[0]}) {gap.before:+.4f} → {gap.after:+.4f}, {gap.value:+.4f} "
        f"[{gap.low:+.4f}, {gap.high:+.4f}], its size {size.relative:+.1%}; {listed}."
    )
    if gap.distinguishable and size.value >= 0:
        turned = gap.before * gap.after < 0
        return False, f"The gap {'turned over and ' if turned else ''}grew. {words}"
    if gap.distinguishable:
        short = [] if share >= GOAL else [f"by less than {GOAL:.0%}"]
        short += [f"{group} scores lower than on clean pictures" for group in lost]
        if not short:
            return True, f"Reached: the gap is smaller by {share:.0%} and no group scores lower. {words}"
        return False, f"The gap is smaller, but the goal is missed ({'; '.join(short)}). {words}"
    why = "The change of the gap is not distinguishable from none"
    if clean_gap.low <= 0 <= clean_gap.high:
        why += f", and so is the gap itself on clean pictures ([{clean_gap.low:+.4f}, {clean_gap.high:+.4f}])"
    if common.distinguishable:
        why += f"; what changed is common to both groups ({common.value:+.4f} [{common.low:+.4f}, {common.high:+.4f}])"
    return False, f"{why}. {words}"


def gap_closed(
    clean: DetectionEvidence,
    perturbed: DetectionEvidence,
    metric: str = "AP",
    resamples: int = 0,
    split: str | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[Estimate, NDArray[np.float64]]:
    """By how much the gap became smaller, less what either group lost for it; and a value of every picture.

        |gap on clean pictures| − |gap on perturbed ones| − Σ_group max(0, its score on clean ones − on perturbed ones)

    Raising the group behind by x gives x, lowering the group ahead gives 0, and so does raising both alike. No
    perturbation gives 0, which is the chance level. The epoch is chosen by this number.
    """
    lower, upper = clean.groups

    def parts(weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        a, b = clean.statistics(weights), perturbed.statistics(weights)
        gain = np.abs(a[f"{metric}/gap"]) - np.abs(b[f"{metric}/gap"])
        for group in (lower, upper):
            gain = gain - np.maximum(0.0, a[f"{metric}/{group}"] - b[f"{metric}/{group}"])
        return gain

    value = float(parts(None)[0])
    without = parts(1.0 - np.eye(clean.n))
    pull = np.where(np.isfinite(without), (clean.n - 1) * (value - without), 0.0)
    items = value + pull - pull.mean()
    if resamples:
        drawn = parts(clean.resamples(resamples, seed))
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, bootstrap_levels(drawn, value, items - value, confidence))
        method = "bootstrap over pictures (BCa), paired"
    else:
        spread = normal_quantile(0.5 + confidence / 2) * float(items.std(ddof=1)) / clean.n**0.5
        low, high, method = value - spread, value + spread, "normal, jackknife over pictures"
    protocol = {"split": split, "interval": method, "confidence": confidence, "detections": 100}
    name = f"{metric}/gap_closed"
    return Estimate(value, float(low), float(high), 0.0, clean.n, False, name, protocol), items


# -- boxes ---------------------------------------------------------------------------------------------------
def ordered(true: Boxes, names: tuple[str, ...], groups: tuple[str, str]) -> Boxes:
    """The same boxes with their groups as positions in ``groups`` instead of ``names``."""
    assert true.group is not None
    place = np.array([groups.index(name) for name in names] + [-1])
    return replace(true, group=place[true.group])


def detected(detections: Tensor, split: CocoSplit) -> Boxes:
    """Detections (n, queries, 6) of a split: corners as shares of the picture, score, position of the category."""
    parts = {
        "boxes": detections[..., :4],
        "scores": detections[..., 4:5],
        "labels": detections[..., 5:].long(),
    }
    return found_boxes(split, parts)


#: least side of a picture in the report, in pixels
SIDE = 224
TRUE, FOUND = (70, 200, 110), (250, 140, 40)


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


def panel(
    clean: UInt8[np.ndarray, "h w 3"],
    perturbed: Float[np.ndarray, "h w 3"],
    true: Float[np.ndarray, "k 4"],
    before: Float[np.ndarray, "q 6"],
    after: Float[np.ndarray, "q 6"],
    bound: float,
    caption: str,
) -> Picture:
    """Three pictures side by side. The middle one is the perturbation: grey is none, black and white are ∓ ``bound``.

    ``true``: corners as shares of the picture. ``before``, ``after``: detections (corners, score, label),
    of which as many as there are true boxes are drawn, best first.
    """
    from PIL import Image

    delta = perturbed - clean / 255.0
    shown = 0.5 + 0.5 * delta / max(bound, 1e-9)
    scale = max(1, -(-SIDE // clean.shape[1]))
    parts = []
    for pixels, boxes in (
        (clean / 255.0, before),
        (shown, None),
        (perturbed, after),
    ):
        image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if boxes is not None:
            _draw(image, true, boxes)
        parts.append(np.asarray(image))
    gutter = np.full((parts[0].shape[0], 6, 3), 255, np.uint8)
    whole = np.concatenate([parts[0], gutter, parts[1], gutter, parts[2]], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(whole).save(buffer, "JPEG", quality=88)
    return Picture(buffer.getvalue(), caption)


def _draw(image: Any, true: Float[np.ndarray, "k 4"], found: Float[np.ndarray, "q 6"]) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(image)
    size = np.array([image.width, image.height] * 2)
    for box in true * size:
        draw.rectangle(tuple(box), outline=TRUE, width=2)
    for row in found[np.argsort(-found[:, 4], kind="stable")][: max(1, len(true))]:
        left, top, right, bottom = row[:4] * size
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=FOUND, width=2)
        draw.text((left + 4, max(0, top) + 2), f"{row[4]:.2f}", fill=FOUND)


class Looks:
    """What the detector says of a batch, and what of it need not be asked twice.

    The detector never changes, so that clean pictures of validation and test are looked at once. Of a few pictures of
    each split (``shown``) the last perturbation is kept for the report.
    ``labels``: the detector's label of each category.
    """

    def __init__(
        self,
        detector: Detector,
        labels: Sequence[int],
        config: FairDetectionOptions,
        datasets: Mapping[str, PictureDataset],
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
