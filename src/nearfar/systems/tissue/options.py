"""The options of the tissue system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nearfar.config import RunOptions, fraction, group, option, path, raw_group, samplers
from nearfar.config.options import take_alias
from nearfar.config.rules import Text
from nearfar.config.samplers import SamplerOptions, SpatialSampler
from nearfar.data.files import Json
from nearfar.errors import NearfarError

__all__ = ["ClipOptions", "SpatialOptions", "TissueData", "TissueOptions", "slide_names"]


class _Slides:
    """Names of slides."""

    def check(self, name: str, value: object) -> None:
        slide_names(value, name)

    def __str__(self) -> str:
        return "a name, or a list of names"


@dataclass
class TissueData:
    """Slides in a folder of shards, which ``nearfar data shards`` writes; without ``data.dir`` slides are generated."""

    dir: str | int | None = path(None, "a folder of shards")
    hold_out: str | int | list[str | int] | None = option(
        None,
        "slides that are the test split, e.g. B4 or [C2,C3]; the others train. null: as the folder's split files say",
        rule=_Slides(),
    )
    val: str | int | list[str | int] | None = option(
        None, "slides of the validation split, likewise", rule=_Slides()
    )
    genes: int = option(1000, "genes, the most variable over the training slides", least=1)
    neighbors: int = option(6, "nearest spots of the same slide", least=1)
    slides: int = option(8, "generated slides; the last quarter is test, one before it validation", least=3)
    side: int = option(16, "spots along a side of a generated slide", least=4)
    signal: float = option(
        0.8,
        "share of the content that is smooth over the slide: 0, neighbours differ as any two spots; 1, hardly at all",
        least=0,
        most=1,
    )
    patch: int = option(32, "pixels of a generated patch", least=8)
    noise: float = option(
        0.5, "standard deviation of what a generated patch shows beside the content", least=0
    )
    generated_genes: int = option(200, "genes of generated slides", least=6)
    generated_seed: int = option(0, "seed of generated slides", least=0, most=2**32 - 1)


@dataclass
class ClipOptions:
    """InfoNCE in both directions with a learned scale; neighbours are negatives like all others."""

    name: Literal["clip"] = option("clip", "the loss")


@dataclass
class SpatialOptions:
    """Targets that give spatial neighbours in the batch a share (``neighbors``, ``neighbor_alpha_scale``)."""

    name: Literal["spatial"] = option("spatial", "the loss")


@dataclass
class TissueOptions(RunOptions):
    """Tissue patch ↔ gene expression."""

    system: str = "tissue"
    epochs: int = 40
    batch_size: int = 128
    weight_decay: float = 0.1
    warmup: float = 0.1
    temperature: float = option(
        0.07, "temperature of the similarities; the start value of a learned one", least=1e-4, role="loss"
    )
    learn_temperature: bool = option(True, "the temperature is a parameter", role="loss")
    max_scale: float = option(40.0, "largest learned scale 1 / temperature, with either loss", least=1e-3)
    neighbors: Literal["soft", "positive", "mask", "none"] = option(
        "soft",
        "neighbours with loss=spatial. soft: get a share of the target; positive: as much as the own spot; mask: are "
        "no negatives; none: as in CLIP",
        role="loss",
    )
    neighbor_alpha_scale: float = option(0.5, "factor on that share", least=0, role="loss")
    temp_reg_weight: float = option(0.05, "weight of the temperature's regularisation", least=0, role="loss")
    local_loss: bool | None = option(None, "the notes' name of trainer.local_loss; null: what that says")
    gather_with_grad: bool | None = option(
        None, "the notes' name of trainer.gather_with_grad; null: what that says"
    )
    image_frozen: bool | None = option(
        None,
        "null: a network with trained weights is frozen and its features kept, a different one is trained",
    )
    image_pixels: int | None = option(
        None, "patches are resized to this before a network sees them; null leaves them", least=32
    )
    augment: bool = option(True, "turn and mirror patches while training (an image encoder that is trained)")
    gene_encoder: Literal["mlp", "sentence"] = option(
        "mlp", "mlp: over expression; sentence: names of the top genes through text_encoder"
    )
    sentence_genes: int = option(50, "names in a gene sentence", least=1)
    embedding_dim: int = option(128, "dimension of the shared space", least=1)
    hidden: int = option(256, "width of the towers", least=1)
    dropout: float = fraction(0.2, "dropout in the towers")
    retrieve: int = option(50, "training spots whose expression is averaged for a patch", least=1)
    variable_genes: int = option(
        250, "most variable over the training spots: genes that correlations are averaged over", least=1
    )
    expressed_genes: int = option(50, "highest mean expression, likewise", least=1)

    data: TissueData = group(
        tissue=TissueData(),
        her2st=TissueData(dir="???", hold_out="C6"),
        help="slides; her2st: six sections of HER2-positive breast tumours (Andersson et al. 2021)",
    )
    image_encoder: Json = raw_group({"kind": "small"}, "encoder of the patches", models=("name",))
    text_encoder: Json = raw_group({"kind": "ngram"}, "encoder of gene sentences", models=("model",))
    sampler: SamplerOptions = group(
        spatial=samplers.spatial, random=samplers.random, balanced=samplers.balanced, role="batches"
    )
    loss: ClipOptions | SpatialOptions = group(spatial=SpatialOptions(), clip=ClipOptions(), role="loss")

    def check(self) -> None:
        take_alias(self, "local_loss", "trainer.local_loss")
        take_alias(self, "gather_with_grad", "trainer.gather_with_grad")
        super().check()
        if self.temperature * self.max_scale < 1:
            raise NearfarError(
                f"temperature={self.temperature} means a scale of {1 / self.temperature:.4g}, beyond "
                f"max_scale={self.max_scale}: start warmer, or raise max_scale."
            )
        self._check_encoders()
        tile = self.sampler.tile_size if isinstance(self.sampler, SpatialSampler) else None
        if tile is not None and tile > self.batch_size:
            raise NearfarError(f"sampler.tile_size={tile} is larger than batch_size={self.batch_size}.")

    def _check_encoders(self) -> None:
        """No weights are read and nothing is fitted here: encoders look at their options alone."""
        from nearfar.models.image import check_image_encoder
        from nearfar.models.text import build_text_encoder

        options = dict(self.image_encoder)
        kind = str(options.pop("kind"))
        if kind != "colors":
            check_image_encoder(kind, **options)
        elif self.image_frozen is False or self.image_pixels is not None:
            raise NearfarError(
                "image_encoder=colors has no network: leave image_frozen and image_pixels null."
            )
        build_text_encoder(**self.text_encoder)


def slide_names(value: object, name: str) -> tuple[str, ...]:
    """Names of slides, given as one or as a list; none for null.

    >>> slide_names("B4", "data.hold_out"), slide_names(None, "data.val"), slide_names(["C2", 3], "data.val")
    (('B4',), (), ('C2', '3'))
    """
    if value is None:
        return ()
    given = [value] if isinstance(value, (str, int)) or not isinstance(value, Sequence) else list(value)
    for each in given:
        Text(number=True).check(name, each)
    names = tuple(str(each) for each in given)
    if len(set(names)) != len(names):
        raise NearfarError(f"{name}={list(names)}: a slide is named twice.")
    return names
