"""What a run is made of and its other files do not say: ``model.json``."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nearfar.models.dropout import Dropout
from nearfar.training.system import modules_of

__all__ = ["highest_scale", "model_facts"]


def model_facts(model: nn.Module, system: Any = None) -> dict[str, Any]:
    """Counts that say how a model may behave in training, for those who look at the run later.

    ``parameters`` and ``trained_parameters``; ``batchnorm``: layers that normalise by the statistics of the batch
    (in training mode); ``dropout``: the largest probability of a dropout layer, 0 without one; ``scale_max``, see
    `highest_scale`, where there is one.

    >>> model_facts(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.1)))
    {'parameters': 15, 'trained_parameters': 15, 'batchnorm': 1, 'dropout': 0.1}
    """
    modules = list(model.modules())
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "batchnorm": sum(isinstance(m, _BatchNorm) and m.training for m in modules),
        "dropout": max((m.p for m in modules if isinstance(m, _DropoutNd | Dropout)), default=0.0),
    }
    highest = highest_scale(model, system)
    return facts if highest is None else facts | {"scale_max": highest}


def highest_scale(model: nn.Module, system: Any = None) -> float | None:
    """The clamp of the scale: ``max_scale`` of a module of the model or of one of the system's own (its losses)."""
    values: list[Any] = [getattr(module, "max_scale", None) for module in modules_of(model, system)]
    return min((float(value) for value in values if isinstance(value, (int, float))), default=None)
