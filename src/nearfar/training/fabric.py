"""Lightning Fabric as a run needs it: devices, precision and, where there are several processes, DDP."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

from nearfar.config.training import RunOptions, TrainerOptions
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.training import ranks

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule
    from torch import nn

__all__ = ["build_fabric", "check_devices", "distribute", "processes_to_start", "to_device"]


def processes_to_start(trainer: TrainerOptions) -> int:
    """How many processes ``trainer.devices`` stands for on this machine: as it says, or one for each GPU (auto).

    1 with ``trainer.engine=ray``, whose processes are on the nodes of a cluster.
    """
    if trainer.engine == "ray":
        return 1
    if trainer.devices != "auto":
        return int(trainer.devices)
    import torch

    if trainer.accelerator in ("cpu", "mps") or not torch.cuda.is_available():
        return 1
    return max(1, torch.cuda.device_count())


def check_devices(options: RunOptions) -> None:
    """``NearfarError`` for options that this machine, or the number of its processes, cannot carry out."""
    trainer = options.trainer
    if trainer.engine == "torchrun" or ranks.count() > 1:  # else it is the nodes that need these devices
        _check_accelerator(trainer)
    processes = max(ranks.count(), trainer.devices if isinstance(trainer.devices, int) else 1)
    chunk, size = trainer.cached_chunk, options.batch_size
    rows = -(-size // processes)
    if chunk is not None and chunk >= rows:
        each = f" and {processes} processes" if processes > 1 else ""
        raise NearfarError(
            f"trainer.cached_chunk={chunk} with batch_size={size}{each}: the batch is one chunk, which costs a second "
            "forward pass and saves nothing. Raise batch_size, lower trainer.cached_chunk, or set it to null."
        )
    if processes > 1 and size < processes:
        raise NearfarError(
            f"batch_size={size} is that of all {processes} processes together: each needs a row. Raise it, or "
            "lower trainer.devices."
        )


def _check_accelerator(trainer: TrainerOptions) -> None:
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = {"auto": True, "cpu": True, "gpu": cuda or mps, "cuda": cuda, "mps": mps}
    accelerator, devices = trainer.accelerator, trainer.devices
    if not available[accelerator]:
        raise NearfarError(
            f"trainer.accelerator={accelerator}: PyTorch sees no such device here; take auto or cpu."
        )
    on_cpu = accelerator == "cpu" or not (cuda or mps)
    processes = max(processes_to_start(trainer) if isinstance(devices, int) else 1, ranks.on_this_machine())
    gpus = torch.cuda.device_count() if cuda and accelerator != "mps" else 1
    if processes > gpus and not on_cpu:
        raise NearfarError(
            f"{processes} processes on this machine, and PyTorch sees {gpus} GPU(s): each takes one. Lower "
            "trainer.devices, or take trainer.accelerator=cpu."
        )
    started = ranks.count() if trainer.engine == "ray" else ranks.on_this_machine()
    if ranks.count() > 1 and devices not in (1, "auto", started):
        raise NearfarError(
            f"trainer.devices={devices}, but {started} processes were started; leave it out, then their number counts."
        )
    if trainer.precision == "16-mixed" and on_cpu:
        # Fabric would go on in bf16-mixed with no more than a warning.
        raise NearfarError("trainer.precision=16-mixed needs a GPU; on the CPU take 32-true or bf16-mixed.")


def build_fabric(config: RunOptions) -> Fabric:
    """Fabric with the options of ``trainer=``, for this process or for all that train together."""
    import torch

    with versions_by_metadata():
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
        from lightning_fabric.strategies import DDPStrategy

    settings = config.trainer
    if settings.threads:
        torch.set_num_threads(settings.threads)
    _set_determinism(settings)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # banners
    here = ranks.on_this_machine()
    common: Json = {
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


def to_device(batch: object, device: torch.device) -> Any:
    """A batch of anything, its tensors on a device."""
    with versions_by_metadata():
        from lightning_fabric.utilities.apply_func import move_data_to_device

    return move_data_to_device(batch, device)


@contextmanager
def versions_by_metadata() -> Iterator[None]:
    """While Fabric is imported: it asks which torchmetrics there is by importing it, with transformers and scipy behind
    it, for a callback that is not used here. That is more than half of the time in which a run starts, and the record
    of what is installed answers as well."""
    from lightning_utilities.core import imports

    ask = imports.compare_version
    if "lightning_fabric" in sys.modules or ask is _compare_version:
        yield
        return
    imports.compare_version = _compare_version
    try:
        yield
    finally:
        imports.compare_version = ask


def _compare_version(
    package: str, op: Callable[[Version, Version], bool], version: str, use_base_version: bool = False
) -> bool:
    """Whether a package of a version is installed, by its metadata."""
    try:
        installed = Version(metadata.version(package))
    except (metadata.PackageNotFoundError, InvalidVersion):
        return False
    return op(Version(installed.base_version) if use_base_version else installed, Version(version))


def distribute(fabric: Fabric, module: nn.Module) -> _FabricModule:
    """The module on its device, wrapped for DDP where there are several processes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
        return fabric.setup_module(module)


def _set_determinism(settings: TrainerOptions) -> None:
    import torch

    if not settings.deterministic:
        torch.use_deterministic_algorithms(False)
        return
    # On a GPU some scatter kernels have no deterministic form: that is worth a warning and not the end of the run.
    on_gpu = torch.cuda.is_available() and settings.accelerator != "cpu"
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic only so
