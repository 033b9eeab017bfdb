"""The options of `experiment=augmented`: one view, seen twice under augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nearfar.config import group, option, section
from nearfar.config.samplers import SamplerOptions, hard, partition, random
from nearfar.config.views import LabelledOptions
from nearfar.errors import NearfarError

__all__ = ["AugmentOptions", "AugmentedOptions", "MoCoOptions", "SimCLROptions"]


@dataclass
class SimCLROptions:
    """Both views of every item of the batch are candidates of each (NT-Xent; SimCLR, Chen et al. 2020)."""

    name: Literal["simclr"] = option("simclr", "the loss")


@dataclass
class MoCoOptions:
    """Keys by an encoder of moving averages, and those of earlier batches in a queue (MoCo, He et al. 2020)."""

    name: Literal["moco"] = option("moco", "the loss")
    momentum: float = option(
        0.99, "share of itself that the key encoder keeps in a step", least=0, most=1, role="loss"
    )
    queue: int = option(4096, "keys of earlier batches that are further negatives", least=1, role="batches")


@dataclass
class AugmentOptions:
    """How pictures are changed; other views, and pictures of a frozen encoder, have dropout instead."""

    crop: float = option(0.2, "least share of the area in a random crop; 1: no crop", least=0.01, most=1)
    flip: float = option(0.5, "probability that left and right are exchanged", least=0, most=1)
    jitter: float = option(0.5, "strength of changed brightness, contrast, saturation, hue", least=0, most=2)
    grey: float = option(0.2, "probability that colours are lost", least=0, most=1)
    blur: float = option(0.0, "probability of a blur", least=0, most=1)


@dataclass
class AugmentedOptions(LabelledOptions):
    """One view under augmentation; labels, where there are any, judge and do not teach."""

    system: str = "augmented"
    epochs: int = 20
    batch_size: int = 256
    temperature: float = 0.5
    head: Literal["linear", "mlp", "none"] = "mlp"
    dropout: float = 0.0
    judged: Literal["embedding", "features"] = "features"
    view_dropout: float = option(
        0.1,
        "dropout of what the tower gives, where pixels are not augmented: the second view is a second pass",
        least=0,
        most=0.9,
    )
    augment: AugmentOptions = section(AugmentOptions(), "how pictures are changed")
    sampler: SamplerOptions = group(random=random, hard=hard, partition=partition, role="batches")
    loss: SimCLROptions | MoCoOptions = group(simclr=SimCLROptions(), moco=MoCoOptions(), role="loss")

    def check(self) -> None:
        super().check()
        if self.memory:
            raise NearfarError(
                "memory: the negatives of earlier batches are those of loss=moco (loss.queue)."
            )
        if self.sampler.name == "balanced":
            raise NearfarError(
                "sampler=balanced goes by labels, which do not teach here; take sampler=random."
            )
