"""An image encoder on disk: its weights as safetensors, and what its network is built from without hub and packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nearfar.data.files import read_json
from nearfar.errors import NearfarError
from nearfar.models.image.build import build_image_encoder
from nearfar.models.image.encoder import ImageEncoder

__all__ = ["has_image_encoder", "load_image_encoder", "save_architecture", "save_image_encoder"]

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
