"""How Lightning is set up for a run: quiet, deterministic, in one process or several."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from nearfar.training import ranks
from nearfar.training.loggers import build_loggers
from nearfar.training.run_folder import RunFolder

__all__ = ["build_trainer", "quiet_lightning"]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's banners and its advice on loader workers do not concern a run that is set up here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # frozen parts are
        warnings.filterwarnings("ignore", message=".*Total length of `list`.*")  # no validation
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")  # frozen parts
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def build_trainer(config: Any, folder: RunFolder, callbacks: list[L.Callback], epochs: int) -> L.Trainer:
    """A trainer with the options of ``trainer=``; checkpoints, log and progress are the callbacks'."""
    settings = config.trainer
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # On a GPU some scatter kernels have no deterministic form: that is worth a warning and not the end of the run.
    on_gpu = torch.cuda.is_available() and settings.accelerator != "cpu"
    deterministic: Any = ("warn" if on_gpu else True) if settings.deterministic else False
    here = ranks.on_this_machine()
    return L.Trainer(
        default_root_dir=folder.path,
        max_epochs=epochs,
        accelerator=settings.accelerator,
        devices=here,
        num_nodes=ranks.count() // here,
        **_together(),
        precision=settings.precision,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip or None,
        deterministic=deterministic,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=(ranks.is_first() and build_loggers(config.logger, folder.path, folder.name)) or False,
        callbacks=callbacks,
    )


def _together() -> dict[str, Any]:
    """How Lightning trains in several processes, which are there already, or in one, whatever Slurm may have set."""
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    if ranks.count() == 1:
        return {"plugins": [LightningEnvironment()]}
    from lightning.pytorch.strategies import DDPStrategy

    # A weight may have no part in a step, as where a term of the loss is switched off. Buffers are the same on all
    # ranks: a memory gets the rows of all, and statistics of a batch are refused.
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    return {"strategy": strategy, "plugins": [TorchElasticEnvironment()]}
