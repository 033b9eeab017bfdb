"""The options of the aspect system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nearfar.config import (
    Encoding,
    RunOptions,
    Scheduled,
    column,
    fraction,
    group,
    option,
    path,
    raw_group,
    samplers,
)
from nearfar.config.samplers import SamplerOptions
from nearfar.data.files import Json
from nearfar.data.reviews.labels import code_words
from nearfar.errors import NearfarError

__all__ = ["AspectDataOptions", "AspectOptions"]


class _Aspects:
    """A list of names, each once."""

    def check(self, name: str, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, list) or not value:
            raise NearfarError(f"{name}={value}: a list of names is needed, such as [Battery,Camera].")
        if len({str(each).casefold() for each in value}) < len(value):
            raise NearfarError(f"{name}={value}: an aspect is named twice.")

    def __str__(self) -> str:
        return "a list of names"


class _Polarities:
    """What words or numbers mean."""

    def check(self, name: str, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, dict):
            raise NearfarError(
                f"{name}={value}: what words or numbers mean is needed, such as "
                f"'{name}={{1: positive, 2: negative, 3: neutral, 0: none}}'."
            )
        code_words(value)

    def __str__(self) -> str:
        return "a mapping"


@dataclass
class AspectDataOptions:
    """Any table with a text column and labels: {ASPECT#Polarity} texts, a column per aspect, or a row per aspect.

    Also XML of SemEval or MAMS and text files of VLSP. Without files, reviews are generated: for a first run without
    data, whose scores mean nothing for real reviews.
    """

    train: str | int | None = path(None, "file of the training reviews")
    val: str | int | None = path(None, "file of the validation reviews")
    test: str | int | None = path(None, "file of the test reviews")
    dir: str | int | None = path(None, "a folder with train, validation (or dev) and test files")
    text_column: str | int | None = column("column of the texts; null: the usual names")
    label_column: str | int | None = column(
        "column of fields with all labels of a review; null: the usual names"
    )
    aspect_column: str | int | None = column(
        "column of aspects, in a table of one row per label; in XML: category or term"
    )
    polarity_column: str | int | None = column("column of polarities, in a table of one row per label")
    polarities: dict[Any, str] | None = option(
        None,
        "meaning of further words or numbers, e.g. {1: positive, 2: negative, 3: neutral, 0: none}",
        rule=_Polarities(),
    )
    id_column: str | int | None = column("column of ids; null: the usual names")
    encoding: str | None = option(
        None,
        "encoding of text files, e.g. cp1252; null: UTF-8, or UTF-16 with a byte-order mark",
        rule=Encoding(),
    )
    aspects: list[str] | None = option(
        None,
        "aspects, e.g. [Battery,Camera]; null: the columns whose cells are polarities, or the aspects in the labels",
        rule=_Aspects(),
    )
    min_mentions: int = option(5, "mentions in train below which an aspect is left out", least=1)
    val_fraction: float = option(
        0.1, "share of train held out where there is no val file", least=0, most=1, inside=True
    )
    tune_fraction: float = option(
        0.1,
        "share of train held out for choosing thresholds where there is no test file; 0: none are chosen",
        least=0,
        most=0.9,
    )
    split_seed: int = option(0, "seed of the splits", least=0, most=2**32 - 1)
    embedded_size: int | None = option(None, "number of generated reviews, without files", least=50)


@dataclass
class AspectOptions(RunOptions):
    """Aspect sentiment of reviews."""

    system: str = "aspects"
    epochs: int = 6
    lr: float = 3e-3
    warmup: float = 0.1
    focal_weight: float | str | Json = option(
        0.7,
        "weight of the focal loss in the total; a number or a schedule",
        rule=Scheduled(0, what="a weight"),
        role="loss",
    )
    contrastive_weight: float | str | Json = option(
        0.3,
        'weight of the contrastive loss in the total; a number or a schedule ("0 -> 0.3")',
        rule=Scheduled(0, what="a weight"),
        role="loss",
    )
    gamma: float = option(0.0, "focusing exponent of the focal loss; 0: cross-entropy", least=0, role="loss")
    alpha: Literal["none", "counts", "sqrt"] = option(
        "none", "class weights of the focal loss; counts: N / n, sqrt: its root", role="loss"
    )
    reduction: Literal["weighted_mean", "mean"] = option(
        "weighted_mean",
        "mean of the focal loss: weighted within each aspect, or plain",
        role="loss",
    )
    contrastive: Literal["none", "jaccard", "legacy"] = option(
        "none",
        "contrastive loss; jaccard: positives by common aspect-polarity pairs; legacy: absent counts as neutral",
        role="loss",
    )
    temperature: float = option(0.1, "temperature of the contrastive loss", least=1e-4, role="loss")
    projection_dim: int = option(128, "dimensions of the vectors in the contrastive loss", least=1)
    head_dropout: float = fraction(0.4, "dropout before the heads")
    balance: Literal["none", "oversample"] = option(
        "none", "oversample: reviews with rare labels are repeated within an epoch", role="batches"
    )
    oversample_frequency: float = option(
        0.05,
        "share of the reviews below which a label is rare",
        least=0,
        most=1,
        inside=True,
        role="batches",
    )
    oversample_most: int = option(4, "most copies of a review", least=1, role="batches")
    thresholds: Literal["one", "aspect", "none"] = option(
        "one",
        "thresholds for a mention; one: for all aspects; aspect: for each aspect; none: not chosen, one half",
    )
    logit_adjustment: float = option(
        0.3,
        "exponent t of the decision by p / share^t, which favours rare polarities; 0: the most probable",
        least=0,
        most=2,
    )

    data: AspectDataOptions = group(
        csv=AspectDataOptions(),
        aspects_embedded=AspectDataOptions(embedded_size=4000),
        visfd=AspectDataOptions(text_column="comment", label_column="label"),
        phone_aspects=AspectDataOptions(text_column="data"),
    )
    text_encoder: Json = raw_group({"kind": "words"}, "encoder of the reviews", models=("model",))
    sampler: SamplerOptions = group(random=samplers.random, role="batches")

    def check(self) -> None:
        super().check()
        from nearfar.systems.aspects.tower import text_tower

        text_tower(**self.text_encoder, run_lr=self.lr)
