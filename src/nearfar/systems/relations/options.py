"""The options of the relation system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nearfar.config import fraction, group, option, path, raw_group, samplers
from nearfar.config.samplers import SamplerOptions
from nearfar.config.views import ViewOptions
from nearfar.data.files import Json
from nearfar.data.scenes.triples import chosen_relations
from nearfar.errors import NearfarError

__all__ = ["InfoNCEOptions", "RelationDataOptions", "RelationOptions", "SupConInsideOptions", "SupConOptions"]


class _Relations:
    """``top5``, ``all10`` or a list of names."""

    def check(self, name: str, value: object) -> None:
        chosen_relations(value)

    def __str__(self) -> str:
        return "top5, all10, or a list of names"


@dataclass
class RelationDataOptions:
    """Annotated pairs of boxes in one of four layouts, or composed scenes of drawn things with exact boxes."""

    layout: Literal["composed", "vrd", "scene_graph", "spatialsense", "coco"] = option(
        "composed", "format of the annotations"
    )
    dir: str | int | None = path(None, "folder of annotations and photos; photos are found below it by name")
    train: str | int | None = path(None, "annotation file of the training split")
    val: str | int | None = path(None, "annotation file of the validation split")
    test: str | int | None = path(None, "annotation file of the test split")
    images: str | int | None = path(None, "folder of the photos, if not below data.dir")
    photos: Literal["optional", "required", "none"] = option(
        "optional",
        "photos; optional: pairs without one train the boxes alone; required: such pairs are left out; none: no pixels",
    )
    synonyms: bool = option(
        True, "synonyms of relations (beneath: below, beside: next to, …); false: the ten names alone"
    )
    val_fraction: float = option(
        0.15, "share of the pictures for val, where the files declare none", least=0, most=1, inside=True
    )
    test_fraction: float = option(
        0.2, "share of the pictures for test, where the files declare no splits", least=0, most=1
    )
    split_seed: int = option(0, "seed of the splits", least=0, most=2**32 - 1)
    folds: int | None = option(
        None, "number of folds for cross-validation by picture; data.fold is test", least=2
    )
    fold: int = option(0, "the fold that is test, from 0", least=0)
    size: int = option(1200, "number of composed scenes over all splits, with two pairs each", least=10)


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
    """Cross-modal, sum inside the logarithm, an item's own partner left out; reported to fail."""

    name: Literal["supcon_inside"] = option("supcon_inside", "the loss")
    sum: Literal["outside", "inside"] = option("inside", "where the sum over positives is, of the logarithm")


@dataclass
class RelationOptions(ViewOptions):
    """Spatial relations from crops and boxes."""

    system: str = "relations"
    epochs: int = 50
    batch_size: int = 24
    lr: float = 1e-4
    lr_schedule: str = "constant"
    patience: int | None = 12
    min_epochs: int = 30
    embedding_dim: int = 256
    relations: str | list[str] = option(
        "top5",
        "classes; top5: on, above, under, next to, below; all10; or a list such as [on,under]",
        rule=_Relations(),
    )
    pixels: bool = option(True, "crops as a view, where there is a photo; boxes always are one")
    categories: bool = option(False, "names of subject and object as a view")
    spatial: Literal["raw", "log", "iou", "relative"] = option(
        "relative", "variant of the numbers that describe two boxes"
    )
    crop_size: int = option(128, "width and height of a crop in pixels", least=32, most=1024)
    box_jitter: float = option(
        0.05,
        "second view of a pair with boxes alone: edges moved by up to this share of the box's size; 0: none",
        least=0,
        most=0.45,
    )
    visual_hidden: int = option(512, "hidden width of the head over pixels", least=1)
    visual_dropout: float = fraction(0.4, "dropout in the heads over pixels and names")
    spatial_dropout: float = fraction(0.3, "dropout in the head over boxes")
    keep_inputs: bool = option(
        True, "the probe also gets the numbers of the boxes (and vectors of the names), not only embeddings"
    )
    probe_rows: int = option(
        5000, "most training pairs for the support vector machine of the final evaluation", least=10
    )
    monitor_rows: int = option(2000, "most training pairs for the linear probe after each epoch", least=10)

    data: RelationDataOptions = group(
        composed=RelationDataOptions(test_fraction=0.25),
        vrd=RelationDataOptions("vrd"),
        scene_graph=RelationDataOptions("scene_graph"),
        spatialsense=RelationDataOptions("spatialsense"),
        coco=RelationDataOptions("coco"),
    )
    text_encoder: Json = raw_group({"kind": "ngram"}, "encoder of the names", models=("model",))
    image_encoder: Json = raw_group({"kind": "efficientnet"}, "encoder of the crops", models=("name",))
    sampler: SamplerOptions = group(
        random=samplers.random,
        balanced=samplers.balanced,
        hard=samplers.hard,
        partition=samplers.partition,
        role="batches",
    )
    loss: InfoNCEOptions | SupConOptions | SupConInsideOptions = group(
        infonce=InfoNCEOptions(), supcon=SupConOptions(), supcon_inside=SupConInsideOptions(), role="loss"
    )

    def check(self) -> None:
        super().check()
        # Encoders check their options here; no weights are read and nothing is fitted.
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
        if self.loss.name != "infonce":
            for name, given in (("learn_temperature", self.learn_temperature), ("memory", self.memory)):
                if given:
                    raise NearfarError(f"{name}={given} is for loss=infonce: take that, or leave {name} out.")
        boxes_alone = not self.pixels and not self.categories and not self.box_jitter
        if boxes_alone and self.loss.name == "infonce":
            raise NearfarError(
                "pixels=false, categories=false and box_jitter=0 leave the boxes as the only view: there is nothing to "
                "contrast. Set box_jitter=0.05 or categories=true."
            )
