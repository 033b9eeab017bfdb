"""The options of the aspect system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nearfar.config import Encoding, RunOptions, column, fraction, group, option, path, raw_group, samplers
from nearfar.config.samplers import SamplerOptions
from nearfar.errors import NearfarError
from nearfar.systems.aspects.labels import code_words

__all__ = ["AspectData", "AspectOptions"]


class _Weight:
    """A weight of a loss: a number or a schedule, at least 0."""

    def check(self, name: str, value: object) -> None:
        from nearfar.losses import Objective

        try:
            weights = Objective({name: value}).weights(position=0.0, total=1.0)
        except NearfarError as error:
            raise NearfarError(f"{name}={value}: {error}") from None
        if weights[name] < 0:
            raise NearfarError(f"{name}={value}: a weight of at least 0 is needed.")

    def __str__(self) -> str:
        return "at least 0, or a schedule"


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
class AspectData:
    """Any table with a text column and labels: {ASPECT#Polarity} texts, a column per aspect, or a row per aspect.

    XML of SemEval or MAMS and text files of VLSP, too. Without files, reviews are generated: a first run without data,
    from whose scores nothing follows.
    """

    train: str | int | None = path(None, "file of the training reviews")
    val: str | int | None = path(None, "file of the validation reviews")
    test: str | int | None = path(None, "file of the test reviews")
    dir: str | int | None = path(None, "a folder with train, validation (or dev) and test files")
    text_column: str | int | None = column("column of the texts; null: found by name")
    label_column: str | int | None = column("column that holds all labels of a review")
    aspect_column: str | int | None = column(
        "where a row is one label of a review (in XML: category or term)"
    )
    polarity_column: str | int | None = column("the same for its polarity")
    polarities: dict[Any, str] | None = option(
        None,
        "what words or numbers mean, e.g. {1: positive, 2: negative, 3: neutral, 0: none}",
        rule=_Polarities(),
    )
    id_column: str | int | None = column("column of ids")
    encoding: str | None = option(
        None, "of text files, e.g. cp1252; null: UTF-8, or UTF-16 with its mark", rule=Encoding()
    )
    aspects: list[str] | None = option(
        None,
        "[Battery,Camera,…]; null: the columns whose cells are polarities, or what the labels name",
        rule=_Aspects(),
    )
    min_mentions: int = option(5, "an aspect that train mentions less often is left out", least=1)
    val_fraction: float = option(
        0.1, "share of train held out where there is no val file", least=0, most=1, inside=True
    )
    tune_fraction: float = option(
        0.1,
        "share of train for thresholds where there is no test file; 0: none are chosen",
        least=0,
        most=0.9,
    )
    split_seed: int = option(0, "of the splits", least=0, most=2**32 - 1)
    embedded_size: int | None = option(None, "generated reviews where no files are given", least=50)


@dataclass
class AspectOptions(RunOptions):
    """Aspect sentiment of reviews."""

    system: str = "aspects"
    epochs: int = 6
    lr: float = 3e-3
    warmup: float = 0.1
    focal_weight: Any = option(
        0.7, "of the focal loss in the total; a number or a schedule", rule=_Weight(), role="loss"
    )
    contrastive_weight: Any = option(
        0.3,
        'of the contrastive loss in the total; a number or a schedule ("0 -> 0.3")',
        rule=_Weight(),
        role="loss",
    )
    gamma: float = option(0.0, "focus of the focal loss; 0 is cross-entropy", least=0, role="loss")
    alpha: Literal["none", "counts", "sqrt"] = option(
        "none", "class weights from counts: N / n, or its root", role="loss"
    )
    reduction: Literal["weighted_mean", "mean"] = option(
        "weighted_mean",
        "of the focal loss: per aspect by the sum of its weights, or the plain mean",
        role="loss",
    )
    contrastive: Literal["none", "jaccard", "legacy"] = option(
        "none",
        "jaccard: by common aspect-polarity pairs; legacy: absent counts as neutral",
        role="loss",
    )
    temperature: float = option(0.1, "of the contrastive loss", least=1e-4, role="loss")
    projection_dim: int = option(128, "of the vectors that are contrasted", least=1)
    head_dropout: float = fraction(0.4, "in the heads")
    balance: Literal["none", "oversample"] = option(
        "none", "oversample: rare labels come several times an epoch", role="batches"
    )
    oversample_frequency: float = option(
        0.05,
        "share of the reviews below which a label is rare",
        least=0,
        most=1,
        inside=True,
        role="batches",
    )
    oversample_most: int = option(4, "copies of a review at most", least=1, role="batches")
    thresholds: Literal["one", "aspect", "none"] = option(
        "one",
        "from which probability an aspect is mentioned: one for all, aspect: one for each, none: one half",
    )
    logit_adjustment: float = option(
        0.3,
        "polarities by p / share^0.3, so that rare ones get their due; 0: the most probable",
        least=0,
        most=2,
    )

    data: AspectData = group(
        csv=AspectData(),
        aspects_embedded=AspectData(embedded_size=4000),
        visfd=AspectData(text_column="comment", label_column="label"),
        phone_aspects=AspectData(text_column="data"),
    )
    text_encoder: dict[str, Any] = raw_group({"kind": "words"}, "encoder of the reviews", models=("model",))
    sampler: SamplerOptions = group(random=samplers.random, role="batches")

    def check(self) -> None:
        super().check()
        from nearfar.systems.aspects.model import build_encoder

        build_encoder(**self.text_encoder)
