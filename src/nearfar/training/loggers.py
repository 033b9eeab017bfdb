"""Optional loggers beside ``train_log.jsonl``, each imported only when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearfar.errors import NearfarError, nearest_name

__all__ = ["build_loggers"]

KNOWN = ("tensorboard", "mlflow", "wandb")


def build_loggers(names: Any, folder: Path, run_name: str) -> list[Any]:
    """Lightning loggers by name: ``tensorboard``, ``mlflow``, ``wandb``; they write below the run folder.

    W&B writes there too, offline; ``wandb sync`` uploads it.
    """
    if not names:
        return []
    names = [names] if isinstance(names, str) else list(names)
    built: list[Any] = []
    for name in names:
        if name not in KNOWN:
            raise NearfarError(f"logger={name}: there is no such logger; {nearest_name(name, KNOWN)}")
        try:
            if name == "tensorboard":
                from lightning.pytorch.loggers import TensorBoardLogger

                built.append(TensorBoardLogger(save_dir=folder, name=None, version="tensorboard"))
            elif name == "mlflow":
                from lightning.pytorch.loggers import MLFlowLogger

                built.append(
                    MLFlowLogger("nearfar", run_name=run_name, tracking_uri=f"file:{folder / 'mlflow'}")
                )
            else:
                from lightning.pytorch.loggers import WandbLogger

                built.append(WandbLogger(name=run_name, project="nearfar", save_dir=folder, offline=True))
        except ImportError as error:
            # Lightning raises ModuleNotFoundError, an ImportError, for a missing package.
            raise NearfarError(
                f"logger={name} needs a package that is not installed ({error}). "
                "Install it with: pip install 'nearfar[loggers]'"
            ) from None
    return built
