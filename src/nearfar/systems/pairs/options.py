"""The options of `experiment=pairs`: two or more columns of a table, each read by a tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nearfar.config import Encoding, column, fraction, group, option, path, raw_group
from nearfar.config.rules import shown
from nearfar.config.views import ViewOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["PairDataOptions", "PairOptions", "column_names"]


@dataclass(frozen=True)
class ColumnNames:
    """Names of columns, one or a list; null leaves the choice to the data."""

    def check(self, name: str, value: object) -> None:
        column_names(name, value)

    def __str__(self) -> str:
        return "names of columns"


@dataclass(frozen=True)
class ByView:
    """Names of views, each with a value: ``{word: text, picture: {tower: image, encoder: mobilenet}}``."""

    def check(self, name: str, value: object) -> None:
        if not isinstance(value, Mapping):
            raise NearfarError(
                f"{name}={shown(value)}: names of views with a value each are needed, such as {name}.VIEW=…"
            )

    def __str__(self) -> str:
        return "by view"


@dataclass(frozen=True)
class Lengths:
    """Lengths of embeddings, one or a list; null for none."""

    def check(self, name: str, value: object) -> None:
        for each in lengths(value):
            if isinstance(each, bool) or not isinstance(each, int) or each < 1:
                raise NearfarError(f"{name}={shown(value)}: lengths are needed, such as {name}=[32,64].")
        if len(set(lengths(value))) != len(lengths(value)):
            raise NearfarError(f"{name}={shown(value)}: a length is named twice.")

    def __str__(self) -> str:
        return "lengths"


def lengths(value: Any) -> list[int]:
    """Lengths given as one or as a list; none for null.

    >>> lengths(64), lengths(None)
    ([64], [])
    """
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def column_names(name: str, value: object) -> list[str]:
    """Names of columns given as one or as a list; none for null.

    >>> column_names("views", ["word", 2]), column_names("views", None)
    (['word', '2'], [])
    """
    if value is None:
        return []
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(
        isinstance(each, bool) or not isinstance(each, (str, int)) or not str(each).strip() for each in given
    ):
        raise NearfarError(
            f"{name}={shown(value)}: names of columns are needed, such as {name}=[word,definition]."
        )
    names = [str(each) for each in given]
    if len(set(names)) != len(names):
        raise NearfarError(f"{name}={names}: a column is named twice.")
    return names


@dataclass
class PairDataOptions:
    """Tables, folders of pictures, shards or data sets of the library datasets; without any, the embedded emoji."""

    train: str | int | None = path(None, "what is trained on: a table, a folder, shards, or hf:OWNER/NAME")
    val: str | int | None = path(None, "the same for validation")
    test: str | int | None = path(None, "the same for the test")
    dir: str | int | None = path(None, "a folder with train, validation (or val) and test")
    id_column: str | int | None = column("column of ids; null: the number of the row")
    group_column: str | int | None = column(
        "column whose equal values stay in one split when a part is held out; null: each item by itself"
    )
    encoding: str | None = option(
        None,
        "encoding of text files, e.g. cp1252; null: UTF-8, or UTF-16 with a byte-order mark",
        rule=Encoding(),
    )
    val_fraction: float = option(
        0.1, "share of train held out where there is no validation", least=0, most=1, inside=True
    )
    split_seed: int = option(0, "seed of what is held out", least=0, most=2**32 - 1)


@dataclass
class NegativeOptions:
    """How a loss of one positive sums over negatives."""

    tau_plus: float = fraction(
        0.0, "share of negatives that are positives in truth, taken off their sum (Chuang et al. 2020)"
    )
    beta: float = option(
        0.0, "negatives weigh exp(beta · logit): hard ones more (Robinson et al. 2021)", least=0
    )


@dataclass
class InfoNCEOptions(NegativeOptions):
    """Each item's own partner against all others of the batch (van den Oord et al. 2018)."""

    name: Literal["infonce"] = option("infonce", "the loss")
    symmetric: bool = option(True, "both directions")


@dataclass
class ClipOptions(NegativeOptions):
    """The same in both directions with a learned temperature (CLIP, Radford et al. 2021)."""

    name: Literal["clip"] = option("clip", "the loss")


@dataclass
class SigLipOptions:
    """Is this a pair, asked of every pair of the batch (SigLIP, Zhai et al. 2023), with a learned scale and bias."""

    name: Literal["siglip"] = option("siglip", "the loss")
    bias: float = option(-10.0, "of the logits at the start")


@dataclass
class SupConOptions:
    """Several positives: rows with the same value in the column `positives` (Khosla et al. 2020)."""

    name: Literal["supcon"] = option("supcon", "the loss")
    sum: Literal["outside", "inside"] = option(
        "outside", "sum over positives outside or inside the logarithm"
    )


@dataclass
class PairOptions(ViewOptions):
    """Two or more views of the same items."""

    system: str = "pairs"
    epochs: int = 10
    batch_size: int = 128
    warmup: float = 0.1
    embedding_dim: int = 256
    learn_temperature: bool | None = option(  # type: ignore[assignment]
        None, "the temperature is a parameter; null: with loss=clip and loss=siglip", role="loss"
    )
    views: str | int | list[str | int] | None = option(
        None,
        "columns that are contrasted, such as [word,definition]; null: the two columns of the data",
        rule=ColumnNames(),
    )
    towers: Json = option(
        {},
        "by view, what differs from the encoder of its kind: towers.picture.encoder=mobilenet",
        rule=ByView(),
    )
    share: bool = option(
        False, "views with the same kind of tower and the same options share one, and its head"
    )
    anchor: str | None = option(None, "the view that each other one is contrasted with; null: every two")
    head: Literal["linear", "mlp", "none"] = option(
        "linear", "what is trained above a tower; of train=frozen none"
    )
    hidden: int = option(512, "width of the hidden layer of head=mlp", least=1)
    dropout: float = fraction(0.0, "dropout of the hidden layer of head=mlp")
    negatives: Json = option(
        {},
        "by view, columns of further negatives, each of its own row: negatives.definition=[wrong_1,wrong_2]",
        rule=ByView(),
    )
    margins: Json = option(
        {},
        "by view, for each column of `negatives` a column of a teacher's margin, its score of the own value less that "
        "of the negative: margins.definition=[margin_1,margin_2]",
        rule=ByView(),
        role="loss",
    )
    margin_weight: float = option(
        1.0, "of margins: weight of their squared error beside the contrastive loss", least=0, role="loss"
    )
    margin_scale: float = option(
        1.0, "of margins: what differences of cosines are multiplied by", least=1e-6, role="loss"
    )
    guide: Json = option(
        {},
        "by view, a second, frozen model: a column of its vectors, guide.definition=vector, or options of a tower that "
        "reads the view, guide.definition.encoder=minilm",
        rule=ByView(),
        role="loss",
    )
    guide_margin: float | None = option(
        0.0,
        "of guide: negatives that it scores as high as the own positive less this are left out; null: none are, and "
        "the guide teaches alone (distill)",
        role="loss",
    )
    guide_kind: Literal["absolute", "relative"] = option(
        "absolute", "of guide: whether guide_margin is a cosine, or a share of the positive's", role="loss"
    )
    guide_softness: float = option(
        0.0,
        "of guide: above 0 negatives are not left out but weigh sigmoid((threshold - score) / guide_softness)",
        least=0,
        role="loss",
    )
    exclude: str | int | None = path(
        None,
        "a table of pairs of training items that are no negatives of each other (columns query_id, negative_id, and "
        "false_negative, in which they are marked), as nearfar doctor RUN --false-negatives writes it",
        role="loss",
    )
    distill: float = option(
        0.0,
        "weight of the KL from the guide's distribution over the batch to the model's, beside the contrastive loss",
        least=0,
        role="loss",
    )
    teacher_temperature: float | None = option(
        None,
        "of distill: what the guide's cosines are divided by; null: as the loss",
        least=1e-4,
        role="loss",
    )
    matryoshka: int | list[int] | None = option(
        None,
        "lengths of embeddings that are trained and judged beside the whole, such as [32,64]",
        rule=Lengths(),
        role="loss",
    )
    positives: str | None = option(
        None,
        "a column: rows with the same value in it are positives of each other, and answers of each other's query",
    )
    neighbors: str | None = option(
        None,
        "the view whose frozen vectors make hard batches and tell likely false negatives; null: the first with any",
        role="batches",
    )

    data: PairDataOptions = group(pairs=PairDataOptions(), help="items with views")
    text_encoder: Json = raw_group({"kind": "ngram"}, "encoder of the views of texts", models=("model",))
    image_encoder: Json = raw_group(
        {"kind": "efficientnet"}, "encoder of the views of pictures", models=("name",)
    )
    loss: InfoNCEOptions | ClipOptions | SigLipOptions | SupConOptions = group(
        infonce=InfoNCEOptions(),
        clip=ClipOptions(),
        siglip=SigLipOptions(),
        supcon=SupConOptions(),
        role="loss",
    )

    def check(self) -> None:
        super().check()
        names = column_names("views", self.views)
        if len(names) == 1:
            raise NearfarError(
                f"views={names}: a second view is needed to contrast with. One view and labels: experiment=labels; one "
                "view under augmentation: experiment=augmented."
            )
        for what, given in (
            ("towers", self.towers),
            ("negatives", self.negatives),
            ("margins", self.margins),
            ("guide", self.guide),
        ):
            for view in given:
                if names and view not in names:
                    raise NearfarError(f"{what}.{view}: no view has this name; views={names}.")
        for name in ("anchor", "neighbors"):
            view = getattr(self, name)
            if view is not None and names and view not in names:
                raise NearfarError(f"{name}={view}: no view has this name; views={names}.")
        if isinstance(self.loss, SupConOptions) != (self.positives is not None):
            raise NearfarError(
                "loss=supcon needs positives=COLUMN, whose equal values make rows positives of each other."
                if self.positives is None
                else f"positives={self.positives} is for loss=supcon: take that, or leave positives out."
            )
        if self.learns_temperature and isinstance(self.loss, SupConOptions):
            raise NearfarError("learn_temperature=true: the temperature of loss=supcon does not learn.")
        if self.learns_temperature and self.temperature < 0.01:
            raise NearfarError(
                f"temperature={self.temperature}: a learned temperature is kept at .01 or more; start at that or above."
            )
        further = "negatives" if self.negatives else "memory" if self.memory else ""
        if further and not isinstance(self.loss, InfoNCEOptions | ClipOptions):
            raise NearfarError(f"{further}: further negatives are for loss=infonce and loss=clip.")
        if self.negatives and self.memory:
            raise NearfarError("negatives and memory cannot be combined; leave one of them out.")

        if self.exclude is not None and self.memory:
            raise NearfarError(
                "exclude and memory: pairs are left out within a batch alone; leave one of them out."
            )
        self._check_teachers()

    def _check_teachers(self) -> None:
        """What guides, margins and lengths need."""
        single = isinstance(self.loss, InfoNCEOptions | ClipOptions)
        if self.guide:
            if not single:
                raise NearfarError(
                    "guide: a guide judges the negatives of one positive, for loss=infonce and loss=clip."
                )
            if len(self.guide) == 1:
                raise NearfarError(
                    f"guide names the view {next(iter(self.guide))} alone: it compares a negative with the own "
                    "positive, and needs vectors of both views. For likeness in one view take false_negative_threshold."
                )
            if self.memory and self.guide_margin is not None:
                raise NearfarError(
                    "guide and memory: the guide does not know earlier items. Leave memory out, or set "
                    "guide_margin=null."
                )
            if self.guide_margin is None and not self.distill:
                raise NearfarError(
                    "guide with guide_margin=null and distill=0 has no effect; set one of them, or leave it out."
                )
        if self.distill and not self.guide:
            raise NearfarError("distill needs a teacher: guide.VIEW=COLUMN, or guide.VIEW.encoder=NAME.")
        for view, names in self.margins.items():
            columns, negatives = (
                column_names("margins", names),
                column_names("negatives", self.negatives.get(view)),
            )
            if len(columns) != len(negatives):
                raise NearfarError(
                    f"margins.{view} names {len(columns)} columns and negatives.{view} {len(negatives)}; one for each "
                    "is needed."
                )

    @property
    def learns_temperature(self) -> bool:
        """Whether the temperature is a parameter."""
        if self.learn_temperature is not None:
            return self.learn_temperature
        return isinstance(self.loss, ClipOptions | SigLipOptions)
