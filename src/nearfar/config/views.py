"""Options of systems that contrast views of items: loss, memory, shared space, labels to judge embeddings by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nearfar.config.options import column, fraction, group, option, path, raw_group
from nearfar.config.rules import Encoding, shown
from nearfar.config.samplers import HardBatchOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["LabelledDataOptions", "LabelledOptions", "ViewOptions"]


@dataclass
class ViewOptions(HardBatchOptions):
    """Options of every system whose items have views; a system adds its data, its towers and its losses."""

    temperature: float = option(
        0.07,
        "temperature of the loss, by which similarities are divided; with learn_temperature its first value",
        least=1e-4,
        role="loss",
    )
    learn_temperature: bool = option(False, "the temperature is a parameter", role="loss")
    memory: int = option(
        0, "items of earlier batches that are further negatives, e.g. 4096; 0: none", least=0, role="batches"
    )
    mask_duplicates: bool = option(
        True, "rows with the same value in a view are never each other's negatives", role="loss"
    )
    embedding_dim: int = option(512, "dimensions of the shared embedding space", least=1)


@dataclass(frozen=True)
class _TowerOptions:
    """Options of a tower by their names, which the tower checks."""

    def check(self, name: str, value: object) -> None:
        if not isinstance(value, Mapping):
            raise NearfarError(
                f"{name}={shown(value)}: options of the tower are needed, such as {name}.size=64."
            )

    def __str__(self) -> str:
        return "options of the tower"


@dataclass
class LabelledDataOptions:
    """Tables, folders of pictures by class, shards, IDX files or data sets; without any, the embedded digits."""

    train: str | int | None = path(None, "what is trained on: a table, a folder, shards, or hf:OWNER/NAME")
    val: str | int | None = path(None, "the same for validation")
    test: str | int | None = path(None, "the same for the test")
    dir: str | int | None = path(
        None, "a folder with train, validation (or val) and test, or of pictures by class"
    )
    id_column: str | int | None = column("column of ids; null: the number of the row")
    group_column: str | int | None = column(
        "column whose equal values stay in one split when a part is held out; null: each item by itself"
    )
    encoding: str | None = option(
        None,
        "encoding of text files, e.g. cp1252; null: UTF-8, or UTF-16 with a byte-order mark",
        rule=Encoding(),
    )
    separator: str | None = option(
        ";", "what separates several labels in one cell; null: a cell is one label, whatever is in it"
    )
    val_fraction: float = option(
        0.1, "share of train held out where there is no validation", least=0, most=1, inside=True
    )
    test_fraction: float = fraction(
        0.1, "share of train held out where there is neither validation nor test; 0: none"
    )
    split_seed: int = option(0, "seed of what is held out", least=0, most=2**32 - 1)
    limit: int | None = option(
        None, "training items that are used, drawn with split_seed; null: all", least=2
    )


@dataclass
class LabelledOptions(ViewOptions):
    """One view of each item, and what its embedding is judged by."""

    epochs: int = 10
    batch_size: int = 128
    warmup: float = 0.1
    embedding_dim: int = 128
    view: str | None = option(
        None, "the column that is embedded; null: the one beside labels, ids and groups"
    )
    label: str | None = option(None, "the column of labels; null: the one called label, labels or class")
    tower: Json = option(
        {},
        "what differs from the encoder of its kind: tower.size=64; tower.tower=KIND for a different kind",
        rule=_TowerOptions(),
    )
    head: Literal["linear", "mlp", "none"] = option(
        "linear", "what is trained above the tower; of train=frozen none"
    )
    hidden: int = option(512, "width of the hidden layer of head=mlp", least=1)
    dropout: float = fraction(0.0, "dropout of what the tower gives, and of the hidden layer of head=mlp")
    judged: Literal["embedding", "features"] = option(
        "embedding", "what is judged: the embedding, or what the tower gives beneath the head"
    )
    knn: int = option(5, "nearest training items whose vote is judged", least=1)

    data: LabelledDataOptions = group(labelled=LabelledDataOptions(), help="items with one view and labels")
    text_encoder: Json = raw_group({"kind": "ngram"}, "encoder of a view of texts", models=("model",))
    image_encoder: Json = raw_group({"kind": "small"}, "encoder of a view of pictures", models=("name",))

    def check(self) -> None:
        super().check()
        if self.view is not None and self.view == self.label:
            raise NearfarError(f"view={self.view} and label={self.label} are one column.")
        if self.learn_temperature:
            raise NearfarError("learn_temperature=true: the temperature of this loss does not learn.")
