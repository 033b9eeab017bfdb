"""The options of the detector system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nearfar.config import RunOptions, fraction, group, option, path, raw_group, samplers
from nearfar.config.rules import Text
from nearfar.config.samplers import SamplerOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["DetectionLoss", "DetectorOptions", "DetectorRecipe", "PictureData", "SceneData", "check_groups"]


class _TwoNames:
    """Two names, or null."""

    def check(self, name: str, value: object) -> None:
        if value is not None and (not isinstance(value, list) or len({str(each) for each in value}) != 2):
            raise NearfarError(f"{name}={value}: two names are needed, as in {name}=[female,male].")

    def __str__(self) -> str:
        return "two names"


@dataclass
class PictureData:
    """Pictures with boxes in COCO format, and an attribute with two values (of picture or box) that makes groups."""

    kind: Literal["coco"] = option("coco", "pictures in COCO format")
    dir: str | int | None = path(
        None,
        "a folder with train.json, perhaps val.json and test.json, and the pictures; or as an exporter wrote it",
    )
    train: str | int | None = path(None, "file of the training split")
    val: str | int | None = path(None, "file of the validation split")
    test: str | int | None = path(None, "file of the test split")
    images: str | int | None = path(None, "where the pictures are, if not where exporters put them")
    category: str | int | None = option(
        "person", "the category; null: all of the file", rule=Text(optional=True, number=True)
    )
    group_key: str | None = option(None, "the attribute that makes groups, such as gender; null: no groups")
    groups: list[str] | None = option(
        None,
        "its two values, the one with the expected lower AP first; null: the values in the files, sorted",
        rule=_TwoNames(),
    )
    image_size: int = option(224, "pixels that pictures are resized to each way", least=32, most=4096)
    val_fraction: float = option(
        0.15, "share held out of train where a file for val or test is missing", least=0, most=1, inside=True
    )
    split_seed: int = option(0, "seed of that split", least=0, most=2**32 - 1)


@dataclass
class SceneData:
    """Generated pictures, one figure each, of two groups: faint pictures stand in a haze. They are cached."""

    kind: Literal["scenes"] = option("scenes", "generated pictures")
    category: str | int | None = option("person", "the category", rule=Text(optional=True, number=True))
    group_key: str | None = option("visibility", "the attribute that makes the two groups")
    groups: list[str] | None = option(["faint", "clear"], "its two values", rule=_TwoNames())
    image_size: int = option(96, "pixels each way", least=32, most=4096)
    train: int = option(800, "pictures", least=8)
    val: int = option(300, "pictures", least=8)
    test: int = option(600, "pictures", least=8)
    contrast: float = option(
        0.3,
        "mean difference of the figure's colour from the background's, as a share of the range of a value",
        least=0,
        most=1,
        inside=True,
    )
    faint_contrast: float = option(
        0.2, "share of all differences that the haze leaves in faint pictures", least=0, most=1
    )
    faint_share: float = option(
        0.25, "share of faint pictures in train; in val and test it is half", least=0, most=1, inside=True
    )
    split_seed: int = option(0, "seed of the pictures", least=0, most=2**32 - 1)


def check_groups(data: PictureData | SceneData) -> None:
    """``NearfarError`` for groups without the attribute that holds them."""
    if data.groups is not None and data.group_key is None:
        raise NearfarError("data.groups names values of an attribute: say which with data.group_key=NAME.")


@dataclass
class DetectionLoss:
    """The set loss of a detector; its weights are options of the system."""

    name: Literal["detection"] = option("detection", "the loss")


@dataclass
class DetectorRecipe:
    """What a detector is and how it is trained, without its data: fair detection trains one by these options, too."""

    epochs: int = option(14, "passes over the training split", least=1, most=100_000)
    frozen_epochs: int = option(
        14,
        "first epochs, in which the first half of the encoder is frozen and its maps are computed once; "
        "0: everything learns",
        least=0,
    )
    views: int = option(
        3,
        "views of each picture that are cached for these epochs, the picture itself included",
        least=1,
        most=1000,
    )
    batch_size: int = option(32, "pictures of a batch", least=2, role="batches")
    lr: float = option(5e-4, "learning rate at its highest", least=0)
    encoder_lr: float = option(0.2, "learning rate of the encoder, as a multiple of lr", least=0)
    weight_decay: float = option(0.01, "weight decay of AdamW; biases, norms and scales have none", least=0)
    lr_schedule: str = option("linear", "constant, linear or cosine")
    warmup: float = fraction(0.03, "share of the steps in which the learning rate rises")
    queries: int = option(20, "queries: boxes that are predicted for a picture", least=1)
    width: int = option(128, "width of the decoder", least=4)
    layers: int = option(2, "layers of the decoder", least=1)
    heads: int = option(4, "heads of its attention", least=1)
    dropout: float = fraction(0.1, "dropout in the decoder")
    class_cost: float = option(2.0, "weight of the score in the matching", least=0)
    class_weight: float = option(2.0, "weight of the score in the loss", least=0)
    l1_weight: float = option(5.0, "weight of the corners' distances", least=0)
    giou_weight: float = option(2.0, "weight of the generalised IoU", least=0)
    quality: float | None = option(
        2.0,
        "scores learn the IoU that a box reaches, with this focal exponent; null: cross-entropy as in DETR",
        least=0,
    )
    crop: float = option(0.55, "smallest side of the part of a picture that is shown", least=0.05, most=1)
    colours: float = option(
        0.3, "largest change of brightness, contrast and saturation, as a share", least=0, most=0.9
    )
    check_evaluator: bool = option(
        True, "AP and AR of the final evaluation are compared with those of faster-coco-eval"
    )
    image_encoder: Json = raw_group(
        {"kind": "efficientnet", "pretrained": True}, "encoder of the pictures", models=("name",)
    )

    def check_recipe(self) -> None:
        """``NearfarError`` for options of the network that do not go together."""
        from nearfar.models.image import check_image_encoder

        check_image_encoder(**self.image_encoder)
        if self.width % 4 or self.width % self.heads:
            raise NearfarError(f"width={self.width} must be a multiple of 4 and of heads={self.heads}.")
        if not self.frozen_epochs:
            return
        if self.frozen_epochs > self.epochs:
            raise NearfarError(
                f"frozen_epochs={self.frozen_epochs} of epochs={self.epochs}: there are not so many; lower it."
            )
        if self.image_encoder["kind"] == "small" or self.image_encoder.get("pretrained") is False:
            raise NearfarError(
                f"frozen_epochs={self.frozen_epochs}: the first half of an encoder with random weights must learn; set "
                "frozen_epochs=0."
            )
        if self.image_encoder["kind"] == "transformers":
            raise NearfarError(
                "frozen_epochs: image_encoder=transformers cannot be cut at stride 16; set frozen_epochs=0, or take "
                "image_encoder=efficientnet."
            )


@dataclass
class DetectorOptions(DetectorRecipe, RunOptions):
    """A small detector of the DETR family over a pretrained image encoder."""

    system: str = "detector"
    data: PictureData | SceneData = group(pictures=PictureData(), scenes=SceneData())
    sampler: SamplerOptions = group(random=samplers.random, balanced=samplers.balanced, role="batches")
    loss: DetectionLoss = group(detection=DetectionLoss(), role="loss")

    def check(self) -> None:
        super().check()
        self.check_recipe()
        check_groups(self.data)
        if self.frozen_epochs and self.init_from:
            raise NearfarError(
                "init_from brings an encoder of its own, and kept maps are those of the untrained one: set "
                "frozen_epochs=0."
            )
        if self.trainer.cached_chunk is not None:
            raise NearfarError(
                "trainer.cached_chunk: a detector's rows have losses of their own; set it to null."
            )
