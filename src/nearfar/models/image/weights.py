"""Trained weights out of registry packages, for machines that reach no model hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nearfar.errors import NearfarError

__all__ = ["PackagedWeights"]


@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights that a package carries.

    Args:
        package: its name for ``import``; it is never imported, because only its file is of use and its code may ask
            for old libraries.
        file: the path inside the package.
        install: the command that installs it.
    """

    package: str
    file: str
    install: str

    def path(self) -> Path | None:
        """Where the file lies; None if the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        path = Path(spec.origin).parent / self.file if spec and spec.origin else None
        return path if path is not None and path.is_file() else None

    def read(self, kind: str) -> dict[str, Tensor]:
        """The tensors by their names in the file; ``kind`` is the encoder that asks, for messages."""
        path = self.path()
        if path is None:
            raise NearfarError(
                f"image_encoder={kind} takes its weights from a package that is not installed: {self.install}. "
                "Or take random weights: image_encoder.pretrained=false."
            )
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its unpickler met in a damaged file
            raise NearfarError(f"{path} is damaged ({type(error).__name__}): {self.install} again.") from None
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise NearfarError(f"{path} holds no table of tensors: another version of the package?")
        return dict(found)

    def load_into(self, network: nn.Module, kind: str, left_out: tuple[str, ...]) -> None:
        """Fill every weight of ``network``; entries of the file that begin with ``left_out`` have no place in it."""
        found = {key: value for key, value in self.read(kind).items() if not key.startswith(left_out)}
        try:
            network.load_state_dict(found)
        except RuntimeError as error:
            lines = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise NearfarError(f"the weights of {self.package} do not fit ({lines})") from None
