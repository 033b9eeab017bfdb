"""The options of the relation system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nearfar.config import RunOptions, fraction, group, option, path, raw_group, samplers
from nearfar.config.samplers import SamplerOptions
from nearfar.errors import NearfarError
from nearfar.systems.relations.records import chosen_relations

__all__ = ["InfoNCEOptions", "RelationData", "RelationOptions", "SupConInsideOptions", "SupConOptions"]


class _Relations:
    """``top5``, ``all10`` or a list of names."""

    def check(self, name: str, value: object) -> None:
        chosen_relations(value)

    def __str__(self) -> str:
        return "top5, all10, or a list of names"


@dataclass
class RelationData:
    """Annotated pairs of boxes in one of four layouts, or composed scenes of drawn things with exact boxes."""

    layout: Literal["composed", "vrd", "scene_graph", "spatialsense", "coco"] = option(
        "composed", "how the annotations are laid out"
    )
    dir: str | int | None = path(None, "the folder; photos are found below it by name")
    train: str | int | None = path(None, "annotation file of the training split")
    val: str | int | None = path(None, "annotation file of the validation split")
    test: str | int | None = path(None, "annotation file of the test split")
    images: str | int | None = path(None, "where the photos are, if not below dir")
    photos: Literal["optional", "required", "none"] = option(
        "optional", "optional: pairs without a photo train the boxes alone"
    )
    synonyms: bool = option(
        True, "beneath is below, beside is next to, and so on; false: the ten names alone"
    )
    val_fraction: float = option(
        0.15, "share of the pictures, where no file says what is val", least=0, most=1, inside=True
    )
    test_fraction: float = option(0.2, "the same for test, where no file says what is train", least=0, most=1)
    split_seed: int = option(0, "of the splits", least=0, most=2**32 - 1)
    folds: int | None = option(
        None, "cross-validation by picture: so many folds, of which number fold is test", least=2
    )
    fold: int = option(0, "the fold that is test, from 0", least=0)
    size: int = option(1200, "pictures of composed scenes, all splits together; two pairs each", least=10)


@dataclass
class InfoNCEOptions:
    """Each pair's own view against all others of the batch."""

    name: Literal["infonce"] = option("infonce", "the loss")
    symmetric: bool = option(True, "both directions")


@dataclass
class SupConOptions:
    """Supervised contrastive: all items of a class are positives, sum outside the logarithm."""

    name: Literal["supcon"] = option("supcon", "the loss")
    sum: Literal["outside", "inside"] = option("outside", "where the sum over positives is, of the logarithm")


@dataclass
class SupConInsideOptions:
    """Cross-modal, sum inside the logarithm, an item's own partner left out: of which it was said that it fails."""

    name: Literal["supcon_inside"] = option("supcon_inside", "the loss")
    sum: Literal["outside", "inside"] = option("inside", "where the sum over positives is, of the logarithm")


@dataclass
class RelationOptions(RunOptions):
    """Spatial relations from crops and boxes."""

    system: str = "relations"
    epochs: int = 50
    batch_size: int = 24
    lr: float = 1e-4
    lr_schedule: str = "constant"
    patience: int | None = 12
    min_epochs: int = 30
    relations: Any = option(
        "top5",
        "top5: on, above, under, next to, below; all10; or a list such as [on,under]",
        rule=_Relations(),
    )
    temperature: float = option(0.07, "of the similarities", least=1e-3, role="loss")

    pixels: bool = option(True, "crops are a view where there is a photo; boxes always are one")
    categories: bool = option(False, "names of subject and object are a view")
    spatial: Literal["raw", "log", "iou", "relative"] = option("relative", "the numbers of two boxes")
    crop_size: int = option(128, "pixels of a crop each way", least=32, most=1024)
    box_jitter: float = option(
        0.05,
        "a pair with boxes alone has boxes moved by so much of their size as its second view",
        least=0,
        most=0.45,
    )
    visual_hidden: int = option(512, "width of the head over pixels", least=1)
    embedding_dim: int = option(256, "of the shared space", least=1)
    visual_dropout: float = fraction(0.4, "in the head over pixels")
    spatial_dropout: float = fraction(0.3, "in the head over boxes")
    keep_inputs: bool = option(
        True, "the probe sees the numbers of the boxes (and vectors of the names) beside what was learned"
    )
    probe_rows: int = option(5000, "training pairs that the support vector machine sees at most", least=10)
    monitor_rows: int = option(2000, "the same for the linear probe after each epoch", least=10)

    data: RelationData = group(
        composed=RelationData(test_fraction=0.25),
        vrd=RelationData("vrd"),
        scene_graph=RelationData("scene_graph"),
        spatialsense=RelationData("spatialsense"),
        coco=RelationData("coco"),
    )
    text_encoder: dict[str, Any] = raw_group({"kind": "ngram"}, "encoder of the names", models=("model",))
    image_encoder: dict[str, Any] = raw_group(
        {"kind": "efficientnet"}, "encoder of the crops", models=("name",)
    )
    sampler: SamplerOptions = group(random=samplers.random, balanced=samplers.balanced, role="batches")
    loss: InfoNCEOptions | SupConOptions | SupConInsideOptions = group(
        infonce=InfoNCEOptions(), supcon=SupConOptions(), supcon_inside=SupConInsideOptions(), role="loss"
    )

    def check(self) -> None:
        super().check()
        # No weights are read and nothing is fitted here: encoders look at their options alone.
        from nearfar.models.image import check_image_encoder
        from nearfar.models.text import build_text_encoder

        check_image_encoder(**self.image_encoder)
        build_text_encoder(**self.text_encoder)
        data = self.data
        if data.val_fraction + data.test_fraction >= 1:
            raise NearfarError(
                f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave nothing to "
                "train on."
            )
        if data.folds is not None and data.fold >= data.folds:
            raise NearfarError(f"data.fold={data.fold}: the folds are numbered 0 to {data.folds - 1}.")
        if data.folds is not None and data.layout == "composed":
            raise NearfarError(
                "data.folds: scenes hold kinds of things out of training, which folds would undo."
            )
        if not self.pixels and data.photos == "required":
            raise NearfarError("data.photos=required, but pixels=false looks at none.")
        boxes_alone = not self.pixels and not self.categories and not self.box_jitter
        if boxes_alone and self.loss.name == "infonce":
            raise NearfarError(
                "pixels=false, categories=false and box_jitter=0 leave the boxes as the only view: there is nothing to "
                "contrast. Set box_jitter=0.05 or categories=true."
            )
