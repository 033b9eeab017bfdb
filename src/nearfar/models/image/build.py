"""Image encoders by name: built in, of a package, of transformers by hub name or folder, or saved with a run.

Convolutional ones of transformers (ResNet, RegNet, ConvNeXT, …) have features and maps; those that give tokens (ViT,
DINOv2, the image tower of CLIP, …) features alone. A saved one is weights as safetensors and what its network is built
from without hub and packages.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nearfar.data.files import read_json
from nearfar.errors import NearfarError, nearest_name
from nearfar.models.hub import commit_in_cache, no_progress_bar, why_unreachable
from nearfar.models.image.encoder import STRIDES, ImageEncoder
from nearfar.models.image.networks import EfficientNetImageEncoder, MobileNetImageEncoder, SmallImageEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "IMAGE_ENCODERS",
    "TransformersImageEncoder",
    "build_image_encoder",
    "check_image_encoder",
    "has_image_encoder",
    "load_image_encoder",
    "save_architecture",
    "save_image_encoder",
]


Colour = tuple[float, ...]
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TRIAL = 64  # pixels of the picture that tells which maps a network has


class TransformersImageEncoder(ImageEncoder):
    """A vision model of the transformers library.

    One whose hidden states are maps sees pictures of any size. One that gives tokens sees them resized to the size that
    it was trained at; its features are its own pooled output or, without that, the mean of the tokens. It has no maps.

    Args:
        name: a name on the Hugging Face hub, or a folder with the model.
        pretrained: False takes the architecture alone, with random weights.
        frozen: see `ImageEncoder`.
        revision: a branch, tag or commit of a hub model.

    Mean and standard deviation of the colours are those of the model's preprocessor; where it has none, those of
    ImageNet, and ``description`` says so.
    """

    kind = "transformers"

    def __init__(
        self,
        name: str = "microsoft/resnet-18",
        pretrained: bool = True,
        frozen: bool = False,
        revision: str = "main",
    ) -> None:
        network, colours, known = _load(name, pretrained, revision)
        network = getattr(network, "vision_model", network)
        side = getattr(network.config, "image_size", None)
        self.side: int | None = side if isinstance(side, int) else None
        maps = _channels(network, name, self.side)
        self.tokens = not maps
        if self.tokens:
            maps = dict.fromkeys(STRIDES, int(network.config.hidden_size))
        commit = "" if Path(name).is_dir() else commit_in_cache(name, revision)[:12]
        origin = "trained weights" + (f", commit {commit}" if commit else "") if pretrained else None
        super().__init__(name, origin, (maps[16], maps[32]), colours[0], colours[1], frozen)
        self.colours_known = known
        self.network = network
        self.finish()

    @property
    def description(self) -> str:
        usual = (
            "" if self.colours_known else "; it has no preprocessor, colours are normalised as for ImageNet"
        )
        return super().description + usual

    def forward(self, pixels: Shaped[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        if not self.tokens:
            return super().forward(pixels)
        x = self.normalized(pixels)
        if self.side is not None and x.shape[2:] != (self.side, self.side):
            x = nn.functional.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        out = self.network(x)
        pooled: Tensor | None = getattr(out, "pooler_output", None)
        return out.last_hidden_state.mean(1) if pooled is None else pooled

    def feature_map(self, pixels: Shaped[Tensor, "n 3 h w"], stride: int = 32) -> Float[Tensor, "n c hs ws"]:
        if self.tokens:
            raise NearfarError(
                f"image_encoder.name={self.name}: it gives tokens, and a map of features is needed here: take a "
                "convolutional network, such as microsoft/resnet-18."
            )
        return super().feature_map(pixels, stride)

    def stages(self, x: Float[Tensor, "n 3 h w"], stride: int) -> Float[Tensor, "n c hs ws"]:
        size = [-(-side // stride) for side in x.shape[2:]]
        return [state for state in _maps(self.network, x) if list(state.shape[2:]) == size][-1]


def _load(name: str, pretrained: bool, revision: str) -> tuple[PreTrainedModel, tuple[Colour, Colour], bool]:
    """The network, mean and standard deviation of its colours, and whether these are its own."""
    if not isinstance(name, str) or not name:
        raise NearfarError(f"image_encoder.name={name}: the name of a model or a folder is needed.")
    try:
        from transformers import AutoConfig, AutoModel
        from transformers.image_processing_base import ImageProcessingMixin
    except ImportError as error:
        raise NearfarError(
            f"image_encoder=transformers needs transformers ({error}): pip install 'nearfar[image]'."
        ) from None
    cause = why_unreachable(name, revision)
    if cause is not None:
        raise _unavailable(name, cause)
    try:
        local = Path(name).is_dir() or bool(commit_in_cache(name, revision))
        with no_progress_bar() if local else nullcontext():
            own = {"trust_remote_code": False}  # nothing that a model's folder names is run
            if pretrained:
                network = AutoModel.from_pretrained(name, revision=revision, **own)
            else:
                network = AutoModel.from_config(
                    AutoConfig.from_pretrained(name, revision=revision, **own), **own
                )
    except (OSError, ValueError, ImportError) as error:
        raise _unavailable(name, " ".join(str(error).split())[:300]) from error
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
        colours = (tuple(settings["image_mean"]), tuple(settings["image_std"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        return network.float(), _IMAGENET, False
    return network.float(), colours, True


def _maps(network: PreTrainedModel, x: Float[Tensor, "n 3 h w"]) -> list[Tensor]:
    """All maps of the network, from early to late; the last is what its own pooling sees."""
    out = network(x, output_hidden_states=True)
    states = [*(out.hidden_states or ()), out.last_hidden_state]
    return [state for state in states if state.ndim == 4]


def _channels(network: PreTrainedModel, name: str, side: int | None) -> dict[int, int]:
    """Channels of the last map at each stride, found by looking; none where the network gives tokens."""
    mode = network.training
    try:
        with torch.no_grad():
            network.eval()
            try:
                shapes = [m.shape for m in _maps(network, torch.zeros(1, 3, _TRIAL, _TRIAL))]
            except ValueError:  # a network of tokens takes one size alone
                if side is None:
                    raise
                shapes = [m.shape for m in _maps(network, torch.zeros(1, 3, side, side))]
                if shapes:
                    raise
            if not shapes:
                out = network(torch.zeros(1, 3, side or _TRIAL, side or _TRIAL))
                if out.last_hidden_state.ndim == 3 and hasattr(network.config, "hidden_size"):
                    return {}
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NearfarError(
            f"image_encoder.name={name}: it does not take a picture ({str(error)[:200]})."
        ) from None
    finally:
        network.train(mode)
    by_stride = {stride: [s[1] for s in shapes if s[2] == s[3] == _TRIAL // stride] for stride in STRIDES}
    if not all(by_stride.values()):
        raise NearfarError(
            f"image_encoder.name={name}: a network with maps at strides 16 and 32, such as microsoft/resnet-18, or one "
            "that gives tokens is needed; this model has neither."
        )
    return {stride: int(channels[-1]) for stride, channels in by_stride.items()}


def _unavailable(name: str, cause: str) -> NearfarError:
    return NearfarError(
        f"The image encoder {name!r} is not to be had: {cause}. Without a network these work: "
        "image_encoder=efficientnet (weights from a registry package, pip install 'nearfar[image]'), "
        "image_encoder=small (trained from scratch), or image_encoder.name=FOLDER with a downloaded model."
    )


IMAGE_ENCODERS: dict[str, Callable[..., ImageEncoder]] = {
    "mobilenet": MobileNetImageEncoder,
    "efficientnet": EfficientNetImageEncoder,
    "transformers": TransformersImageEncoder,
    "small": SmallImageEncoder,
}


def check_image_encoder(kind: str, **options: object) -> None:
    """Raise ``NearfarError`` for an unknown kind or option; reads no weights."""
    if kind not in IMAGE_ENCODERS:
        raise NearfarError(f"image_encoder={kind!r} is unknown; {nearest_name(str(kind), IMAGE_ENCODERS)}")
    known = [*inspect.signature(IMAGE_ENCODERS[kind]).parameters, "name", "seed"]
    for option, value in options.items():
        if option not in known:
            raise NearfarError(
                f"image_encoder={kind} has no option {option!r}; {nearest_name(option, known)}"
            )
        if option in ("pretrained", "frozen") and not isinstance(value, bool):
            raise NearfarError(f"image_encoder.{option}={value}: true or false is needed.")
    if kind != "transformers" and options.get("name") is not None:
        raise NearfarError(
            f"image_encoder={kind} is one network: image_encoder.name is for transformers models."
        )


def build_image_encoder(
    kind: str = "efficientnet",
    name: str | None = None,
    pretrained: bool | None = None,
    *,
    seed: int | None = None,
    **options: object,
) -> ImageEncoder:
    """The image encoder called ``kind`` with its options.

    Args:
        kind: "mobilenet" or "efficientnet" (weights from registry packages), "transformers" (a hub name or a
            folder), "small" (trained from scratch).
        name: of a transformers model; null takes microsoft/resnet-18.
        pretrained: trained weights, or an error that says where to get them; None means trained ones, except for
            "small", which has none. Nothing is ever taken instead without being asked for.
        seed: of random weights; None draws them from PyTorch's generator.
        options: ``frozen`` (False), and what the class of that kind takes.

    >>> build_image_encoder("small", seed=0).description
    'six convolutions (random weights, never trained on any picture; trainable), 256 features'
    >>> build_image_encoder("mobilnet")
    Traceback (most recent call last):
    nearfar.errors.NearfarError: image_encoder='mobilnet' is unknown; did you mean 'mobilenet'?
    """
    if pretrained is None:
        pretrained = kind != "small"
    check_image_encoder(kind, name=name, pretrained=pretrained, **options)
    if name is not None:
        options["name"] = name
    if seed is None or pretrained:
        encoder: ImageEncoder = IMAGE_ENCODERS[kind](pretrained=pretrained, **options)
        return encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = IMAGE_ENCODERS[kind](pretrained=False, **options)
    return encoder


_WEIGHTS, _ABOUT, _MODEL = "network.safetensors", "network.json", "model"


def save_architecture(network: ImageEncoder, folder: Path) -> None:
    """Configuration and colours of a transformers model, from which its network is built without the hub."""
    inner: Any = network.network
    folder.mkdir(parents=True, exist_ok=True)
    inner.config.save_pretrained(folder)
    colours = {"image_mean": network.mean.flatten().tolist(), "image_std": network.std.flatten().tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours, indent=2) + "\n", "utf-8")


def save_image_encoder(network: ImageEncoder, folder: Path) -> None:
    """Write a frozen encoder into ``folder``, for `load_image_encoder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / _WEIGHTS)
    about = {"kind": network.kind, "name": network.name, "origin": network.origin}
    (folder / _ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if network.kind == "transformers":
        save_architecture(network, folder / _MODEL)


def has_image_encoder(folder: Path) -> bool:
    """Whether `save_image_encoder` has written into this folder."""
    return (folder / _ABOUT).is_file()


def load_image_encoder(folder: Path, **options: Any) -> ImageEncoder:
    """The frozen encoder that `save_image_encoder` wrote; ``options`` are those of its class, such as ``features``.

    ``NearfarError`` names the file that is missing, damaged, or of a different network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = read_json(folder / _ABOUT, {"kind": str, "name": str})
    name = str(folder / _MODEL) if about["kind"] == "transformers" else None
    options.pop("revision", None)  # of the hub
    network = build_image_encoder(about["kind"], name, False, seed=0, frozen=True, **options)
    path = folder / _WEIGHTS
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:200]
        raise NearfarError(f"{path}: not the weights of {about['name']} ({cause}).") from None
    network.name, network.origin = about["name"], about.get("origin")
    return network
