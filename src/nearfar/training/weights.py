"""The weights that a run begins with: as its seed draws them, or those of another run."""

from __future__ import annotations

import torch
from torch import nn

from nearfar.errors import NearfarError
from nearfar.training.checkpoint import Checkpoint
from nearfar.training.system import System

__all__ = ["initial_model", "load_weights"]


def initial_model(system: System, seed: int) -> nn.Module:
    """The model as ``seed`` initialises it; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return system.build_model()


def load_weights(model: nn.Module, checkpoint: Checkpoint, system: System, origin: str) -> None:
    """The weights of a checkpoint into ``model``; says so where they belong to another system or model."""
    if checkpoint.system != system.name:
        raise NearfarError(
            f"{origin}: weights of system '{checkpoint.system}' cannot start a run of '{system.name}'."
        )
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        first = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NearfarError(
            f"{origin}: the weights do not fit this model ({first}). "
            "Use the same encoder, layers and text encoder as that run (its config.yaml shows them)."
        ) from None
