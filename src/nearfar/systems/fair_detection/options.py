"""The options of the fair-detection system, and the schedules they describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nearfar.config import RunOptions, TrainerOptions, group, option, path, section
from nearfar.config.options import take_alias
from nearfar.config.rules import Text
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.schedules import Linear, Piecewise, Schedule
from nearfar.systems.detector.options import DetectorRecipe, PictureData, SceneData, check_groups

__all__ = ["CONTROLS", "FairDetectionOptions", "FairPictures", "epsilon_schedule", "term_weights"]

#: what is trained: everything; nothing (clean pictures, or noise); or the generator by one of the losses alone
CONTROLS = ("full", "none", "random", "detection", "wasserstein", "contrastive")
TERMS = ("contrastive", "wasserstein", "detection")


class _SceneChanges:
    """Options of generated scenes that are different while a detector is trained."""

    def check(self, name: str, value: object) -> None:
        if not isinstance(value, dict):
            raise NearfarError(
                f"{name}={value}: options of generated scenes are needed, such as {{contrast: 0.4}}."
            )

    def __str__(self) -> str:
        return "options of data.scenes"


@dataclass
class PhotoRecipe(DetectorRecipe):
    """A detector of photos, as ``experiment=detector`` trains it."""


@dataclass
class SceneRecipe(DetectorRecipe):
    """A detector of generated scenes from scratch, as ``experiment=detector_scenes`` trains it."""

    data: Json = option(
        {"faint_contrast": 0.35},
        "changes of data.scenes for its training: a lighter haze than in the run, which plants the gap",
        rule=_SceneChanges(),
    )


@dataclass
class DetectorTraining:
    """Without ``detector=`` a small one is trained on the training pictures first, with these options."""

    photos: PhotoRecipe = section(PhotoRecipe())
    scenes: SceneRecipe = section(
        SceneRecipe(
            frozen_epochs=0,
            epochs=24,
            batch_size=8,
            encoder_lr=1.0,
            lr=7e-4,
            queries=10,
            width=64,
            crop=0.8,
            image_encoder={"kind": "small", "pretrained": False, "features": 128},
        )
    )


@dataclass
class GeneratorOptions:
    """The generator of the perturbation, a light U-Net."""

    channels: int = option(16, "channels of the first level", least=8, most=1024)
    levels: int = option(3, "levels, each with half the pixels per side of the one before", least=1, most=6)


@dataclass
class FairPictures(PictureData):
    """Pictures in COCO format that carry a group of two values; without files, generated scenes with a planted gap."""

    group_key: str | None = "gender"
    scenes: SceneData = section(SceneData())


@dataclass
class FairDetectionOptions(RunOptions):
    """Fair person detection by a bounded perturbation."""

    system: str = "fair_detection"
    detector_training: DetectorTraining = section(DetectorTraining())
    detector: str | int | None = path(
        None,
        "a run of experiment=detector, a transformers folder or hub name (facebook/detr-resnet-50)",
        model=True,
    )
    lower_group: str | int | None = option(
        None,
        "the group with the lower AP; null: measured on clean validation pictures",
        rule=Text(optional=True, number=True),
    )
    control: Literal["full", "none", "random", "detection", "wasserstein", "contrastive"] = option(
        "full", "none, random: nothing is learned; detection, wasserstein, contrastive: that loss alone"
    )
    epochs: int = 30
    batch_size: int = option(7, "pictures of a batch, both groups in equal parts", least=2, role="batches")
    lr_g: float | None = option(None, "the notes' name of lr; null: what lr says", least=0)
    lr: float | None = option(  # type: ignore[assignment]
        None, "learning rate; null: 1e-4 of photos, 1e-3 of generated scenes", least=0
    )
    weight_decay: float = 1e-4
    lr_schedule: str = "constant"
    max_norm: float | None = option(
        None, "the notes' name of trainer.gradient_clip; null: what that says", least=0
    )
    device: Literal["auto", "cpu", "cuda", "mps"] | None = option(
        None, "the notes' name of trainer.accelerator; null: what that says"
    )
    epsilon: float = option(
        0.05, "first bound of the perturbation, as a share of the range of a value", least=0, most=1
    )
    epsilon_final: float = option(0.10, "bound after warmup_epochs", least=0, most=1)
    epsilon_min: float = option(0.09, "bound at the end of cooldown_epochs", least=0, most=1)
    warmup_epochs: int = option(8, "epochs in which the bound rises", least=0)
    hold_epochs: int = option(6, "epochs in which the bound stays", least=0)
    cooldown_epochs: int = option(16, "epochs in which the bound falls", least=0)
    generator: GeneratorOptions = section(GeneratorOptions())
    head_norm: Literal["batch", "layer"] = option("batch", "normalisation in the projection head")
    head_hidden: int = option(512, "width of the projection head", least=1)
    head_dim: int = option(128, "dimension of the vectors that are contrasted", least=1)
    lambda_contrastive: float = option(1.0, "weight of the contrast by score", least=0, role="loss")
    contrastive_warmup_epochs: int = option(3, "epochs until it has its full weight", least=0, role="loss")
    temperature: float = option(0.1, "temperature of the contrast by score", least=1e-4, role="loss")
    top_fraction: float = option(
        0.4, "share of the batch with the highest scores: the positives", least=0, most=1, role="loss"
    )
    bottom_fraction: float = option(
        0.4, "share of the batch with the lowest scores: the anchors", least=0, most=1, role="loss"
    )
    top_k_percent: float | None = option(
        None, "the notes' name of top_fraction; null: what that says", least=0, most=1, role="loss"
    )
    bottom_k_percent: float | None = option(
        None, "the notes' name of bottom_fraction; null: what that says", least=0, most=1, role="loss"
    )
    min_samples: int = option(2, "least number of positives, and of anchors", least=1, role="loss")
    threshold: float | None = option(None, "a fixed score instead of ranks", least=0, most=1, role="loss")
    middle: Literal["ignore", "negatives"] = option(
        "ignore", "rows that are neither: left out, or negatives", role="loss"
    )
    detach_positives: bool = option(False, "gradients do not reach positives", role="loss")
    bidirectional: bool = option(False, "the contrast in both directions", role="loss")
    lambda_wass: float = option(
        0.2, "weight of the Wasserstein gap of the groups' scores", least=0, role="loss"
    )
    wasserstein_form: Literal["exact", "interpolated"] = option(
        "exact", "how the Wasserstein gap is computed", role="loss"
    )
    score_queue: int = option(256, "earlier scores kept for each group; 0: none", least=0, role="loss")
    rescale_gradient: bool = option(
        True, "the gradient as if the queued scores moved with the model", role="loss"
    )
    beta: float = option(0.5, "weight of the detector's own loss at first", least=0, role="loss")
    beta_final: float = option(0.6, "weight of the detector's own loss at the end", least=0, role="loss")
    pictures: int = option(6, "pictures in the report", least=0, most=100)

    data: FairPictures | SceneData = group(coco_gender=FairPictures(), scenes=SceneData())
    trainer: TrainerOptions = section(
        TrainerOptions(
            gradient_clip=0.1, eval_batch_size=32, probe_rows=56, log_every=10, checkpoint_epochs=1
        )
    )

    def check(self) -> None:
        self._take_notes_names()
        super().check()
        from nearfar.losses import AdaptiveScoreContrastiveLoss

        AdaptiveScoreContrastiveLoss(
            self.temperature,
            self.top_fraction,
            self.bottom_fraction,
            self.min_samples,
            threshold=self.threshold,
        )
        if self.batch_size < 2 * self.min_samples and "contrastive" in self.terms:
            raise NearfarError(
                f"batch_size={self.batch_size} has no room for min_samples={self.min_samples} anchors and as many "
                f"positives: no batch would have a contrastive loss. Take at least batch_size={2 * self.min_samples}."
            )
        if self.control not in ("none", "random") and not any(self._largest(term) for term in TERMS):
            raise NearfarError(
                f"control={self.control}: every loss that it keeps has weight 0, so that nothing would be trained "
                "(lambda_contrastive, lambda_wass, beta)."
            )
        check_groups(self.used_data)
        if self.used_data.group_key is None:
            raise NearfarError(
                "data.group_key=null: the system compares two groups; name the attribute that holds them, such as "
                "data.group_key=gender."
            )

    def _take_notes_names(self) -> None:
        """Options by the names of the notes, such as ``lr_g`` of ``lr``, stand for ours where they are set."""
        take_alias(self, "lr_g", "lr")
        take_alias(self, "max_norm", "trainer.gradient_clip")
        take_alias(self, "device", "trainer.accelerator")
        take_alias(self, "top_k_percent", "top_fraction")
        take_alias(self, "bottom_k_percent", "bottom_fraction")
        if self.lr is None:
            self.lr = 1e-4 if isinstance(self.used_data, PictureData) else 1e-3

    @property
    def used_data(self) -> PictureData | SceneData:
        """The data that is really used: files in ``data.dir`` or by name, or without them generated scenes."""
        data = self.data
        if not isinstance(data, FairPictures):
            return data
        named = any(value is not None for value in (data.dir, data.train, data.val, data.test))
        return data if named else data.scenes

    @property
    def terms(self) -> tuple[str, ...]:
        """The losses that take part."""
        if self.control in ("none", "random"):
            return ()
        return TERMS if self.control == "full" else (self.control,)

    def _largest(self, term: str) -> float:
        """The largest weight of a loss in the run."""
        if term not in self.terms:
            return 0.0
        weights = {
            "contrastive": self.lambda_contrastive,
            "wasserstein": self.lambda_wass,
            "detection": max(self.beta, self.beta_final),
        }
        return weights[term]


def epsilon_schedule(config: FairDetectionOptions) -> Schedule:
    """The bound of the perturbation by epoch: up to ``epsilon_final``, held there, down to ``epsilon_min``.

    >>> from types import SimpleNamespace as Options
    >>> lengths = {"warmup_epochs": 8, "hold_epochs": 6, "cooldown_epochs": 16}
    >>> rule = epsilon_schedule(Options(epsilon=0.05, epsilon_final=0.1, epsilon_min=0.09, **lengths))
    >>> [round(rule(epoch), 4) for epoch in (0, 4, 8, 13, 22, 30, 40)]
    [0.05, 0.075, 0.1, 0.1, 0.095, 0.09, 0.09]
    """
    points = [(0.0, config.epsilon if config.warmup_epochs else config.epsilon_final)]
    for length, value in (
        (config.warmup_epochs, config.epsilon_final),
        (config.hold_epochs, config.epsilon_final),
        (config.cooldown_epochs, config.epsilon_min),
    ):
        if length:
            points.append((points[-1][0] + length, value))
    return Piecewise(points)


def term_weights(config: FairDetectionOptions) -> Json:
    """The weight of each loss over the run, as ``Objective`` takes them; what ``control`` leaves out has weight 0.

    The contrastive weight reaches its full size in epoch ``contrastive_warmup_epochs``, in equal steps.
    """
    n, full = config.contrastive_warmup_epochs, float(config.lambda_contrastive)
    rising: float | Schedule = Piecewise([(0, full / n), (n - 1, full)]) if n > 1 else full
    weights = {
        "contrastive": rising,
        "wasserstein": float(config.lambda_wass),
        "detection": Linear(float(config.beta), float(config.beta_final)),
    }
    return {name: weight if name in config.terms else 0.0 for name, weight in weights.items()}
