"""Pictures with boxes and a group each; AP and AR of two groups on clean, perturbed and randomly perturbed pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from nearfar.data.batch import Batch, Inputs, ItemDataset, Rows
from nearfar.data.coco import CocoSplit
from nearfar.data.detection import PicturesAt, Target, TrueBoxes, relative_boxes
from nearfar.data.files import Json
from nearfar.data.images import File
from nearfar.metrics import Estimate
from nearfar.metrics.detection import (
    Change,
    DetectionEvidence,
    constant_boxes,
    detection_boxes,
    detection_change,
    detection_estimates,
    detection_evidence,
    gap_closed,
    ordered,
    true_boxes,
)
from nearfar.models.detection.detector import to_centre

__all__ = ["GOAL", "METRICS", "FairResults", "PictureSplit", "clean_pixels", "gap_verdict", "with_group"]


@dataclass(frozen=True)
class PictureSplit:
    """A split as the detector sees it: pictures of ``size`` × ``size`` pixels, read on demand.

    Attributes:
        number: which split it is; every batch says it in the field ``split``.
        labels: the detector's label of each category.
    """

    split: CocoSplit
    number: int
    size: int
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.split)

    @property
    def group(self) -> Int[np.ndarray, " n"]:
        """The position of each picture's group in ``split.groups``."""
        return np.array([image.group for image in self.split.images])

    def target(self, position: int) -> Target:
        """True boxes of one picture: centre and size as shares of it; crowds are no boxes to learn."""
        boxes, labels = relative_boxes(self.split, position)
        centred = to_centre(torch.from_numpy(boxes.astype(np.float32)))
        return Target(torch.from_numpy(np.asarray(self.labels, np.int64)[labels]), centred)

    def dataset(self, lower: int | None = None) -> ItemDataset:
        """Batches of ``pixels``, ``targets``, ``split``, and ``lower``: 1 for the group ``lower`` (that with the lower
        AP), left out where it is not known yet.
        """
        n = len(self)
        inputs: dict[str, Inputs] = {
            "pixels": PicturesAt([File(image.path) for image in self.split.images], self.size),
            "targets": TrueBoxes([self.target(position) for position in range(n)]),
            "split": Rows(np.full(n, self.number)),
        }
        if lower is not None:
            inputs["lower"] = Rows((self.group == lower).astype(np.int64))
        return ItemDataset(inputs)


def clean_pixels(batch: Batch) -> Float[Tensor, "b 3 h w"]:
    """The pictures of a batch, values from 0 to 1."""
    return batch.tensor("pixels").float() / 255


def with_group(split: CocoSplit) -> CocoSplit:
    """The pictures that belong to one of the groups and have a box that is no crowd."""
    learnt = set(split.image[~split.crowd].tolist())
    kept = [i for i, image in enumerate(split.images) if image.group >= 0 and i in learnt]
    return split if len(kept) == len(split) else split.take(kept)


#: share of the gap that is to be closed
GOAL = 0.15
METRICS = ("AP", "AR")
KINDS = ("perturbed", "clean", "random")


@dataclass
class FairResults:
    """The results of a split: evidence by kind of picture (``perturbed``, ``clean``, ``random``), estimates, a verdict.

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
    ) -> FairResults:
        """From the detections of a split, see ``detection_boxes``.

        ``groups``: the group with the lower AP, and the other. The chance level is the score of the mean box of
        ``train``, predicted for every picture. Only ``final`` asks for every interval and for changes.
        """
        true = ordered(true_boxes(split), split.groups, groups)
        evidence = {
            kind: detection_evidence(detection_boxes(outputs[kind], split), true, len(split), groups)
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
            made.reached, made.verdict = gap_verdict(made.changes["AP"], estimates["clean/AP/gap"], groups)
        return made

    def facts(self) -> Json:
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
                metric: {group: changes[f"{metric}/{group}"].value for group in groups}
                for metric, changes in self.changes.items()
            },
            "comparison": {
                f"{metric} gap": changes[f"{metric}/gap"].as_dict()
                for metric, changes in self.changes.items()
            },
            "modes": {
                metric: {
                    name: changes[name].as_dict() for name in ("common mode", "gap size", f"{metric}/gap")
                }
                for metric, changes in self.changes.items()
            },
            "verdict": {"reached": self.reached, "goal": GOAL, "words": self.verdict},
        }


def gap_verdict(
    changes: Mapping[str, Change], clean_gap: Estimate, groups: tuple[str, str]
) -> tuple[bool, str]:
    """Whether the goal is reached, in words: the AP gap at least 15 % smaller, its change not 0, no group lower.

    The relative change is that of the gap's size. Whether it changed at all is decided by the signed gap,
    whose direction was fixed on other pictures: the interval of a size is no guide near a size of 0.
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
