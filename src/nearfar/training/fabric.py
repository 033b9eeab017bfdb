"""Lightning Fabric as a run needs it: devices, precision and, where there are several processes, DDP."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nearfar.training import ranks

if TYPE_CHECKING:
    from lightning.fabric import Fabric

__all__ = ["build_fabric", "distribute"]


def build_fabric(config: Any) -> Fabric:
    """Fabric with the options of ``trainer=``, for this process or for all that train together."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy

    settings = config.trainer
    if settings.threads:
        torch.set_num_threads(settings.threads)
    _set_determinism(settings)
    for name in (
        "lightning.fabric",
        "lightning.pytorch",
    ):  # banners; which of the two speaks depends on imports
        logging.getLogger(name).setLevel(logging.ERROR)
    here = ranks.on_this_machine()
    common: dict[str, Any] = {
        "accelerator": settings.accelerator,
        "devices": here,
        "num_nodes": ranks.count() // here,
        "precision": settings.precision,
    }
    if ranks.count() == 1:  # whatever Slurm may have set
        return Fabric(**common, plugins=[LightningEnvironment()])
    # A weight may have no part in a step, as where a term of the loss is switched off. Buffers are the same on all
    # ranks: a memory gets the rows of all, and statistics of a batch are refused.
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    fabric = Fabric(**common, strategy=strategy, plugins=[TorchElasticEnvironment()])
    fabric.launch()
    return fabric


def distribute(fabric: Fabric, module: nn.Module) -> Any:
    """The module on its device, wrapped for DDP where there are several processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
        return fabric.setup_module(module)


def _set_determinism(settings: Any) -> None:
    if not settings.deterministic:
        torch.use_deterministic_algorithms(False)
        return
    # On a GPU some scatter kernels have no deterministic form: that is worth a warning and not the end of the run.
    on_gpu = torch.cuda.is_available() and settings.accelerator != "cpu"
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only so
