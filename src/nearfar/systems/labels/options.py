"""The options of `experiment=labels`: one view and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nearfar.config import fraction, group, option
from nearfar.config.rules import shown
from nearfar.config.views import LabelledOptions
from nearfar.errors import NearfarError

__all__ = ["CrossEntropyOptions", "LabelOptions", "MultiLabelOptions", "SupConOptions"]


@dataclass
class SupConOptions:
    """Items of a class are positives of each other (Khosla et al. 2020)."""

    name: Literal["supcon"] = option("supcon", "the loss")
    sum: Literal["outside", "inside"] = option(
        "outside", "sum over positives outside or inside the logarithm"
    )


@dataclass
class MultiLabelOptions:
    """Items with several labels: positives weigh the share of labels that they have in common (Jaccard)."""

    name: Literal["multilabel"] = option("multilabel", "the loss")


@dataclass
class CrossEntropyOptions:
    """A linear classifier above the embedding, of one or of several labels an item; no contrast."""

    name: Literal["cross_entropy"] = option("cross_entropy", "the loss")
    smoothing: float = fraction(0.0, "of the labels, where an item has one", role="loss")


@dataclass(frozen=True)
class UnseenClasses:
    """True, false, or a share of the classes."""

    def check(self, name: str, value: object) -> None:
        if isinstance(value, bool):
            return
        if not isinstance(value, (int, float)) or not 0 < value < 1:
            raise NearfarError(f"{name}={shown(value)}: true, false, or a share of the classes such as 0.5.")

    def __str__(self) -> str:
        return "true, false, or a share between 0 and 1"


@dataclass
class LabelOptions(LabelledOptions):
    """One view and labels."""

    system: str = "labels"
    temperature: float = 0.1
    unseen_classes: bool | float = option(
        False,
        "test on classes that are in neither training nor validation; true: those of data.test, or half of them; a "
        "number: this share, drawn with split_seed",
        rule=UnseenClasses(),
    )
    loss: SupConOptions | MultiLabelOptions | CrossEntropyOptions = group(
        supcon=SupConOptions(),
        multilabel=MultiLabelOptions(),
        cross_entropy=CrossEntropyOptions(),
        role="loss",
    )

    def check(self) -> None:
        super().check()
        if self.memory:
            raise NearfarError("memory: experiment=labels keeps none; leave it out.")
        if isinstance(self.loss, MultiLabelOptions) and self.sampler.name == "balanced":
            raise NearfarError(
                "sampler=balanced draws as many items of each class, and with loss=multilabel an item has several; "
                "take sampler=random."
            )
