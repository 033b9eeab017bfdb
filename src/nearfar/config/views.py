"""Options of systems that contrast views of items: what their loss, their memory and their shared space follow."""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.config.options import option
from nearfar.config.samplers import HardBatchOptions

__all__ = ["ViewOptions"]


@dataclass
class ViewOptions(HardBatchOptions):
    """Options of every system whose items have views; a system adds its data, its towers and its losses."""

    temperature: float = option(
        0.07,
        "temperature of the loss, by which similarities are divided; with learn_temperature its first value",
        least=1e-4,
        role="loss",
    )
    learn_temperature: bool = option(False, "the temperature is a parameter", role="loss")
    memory: int = option(
        0, "items of earlier batches that are further negatives, e.g. 4096; 0: none", least=0, role="batches"
    )
    mask_duplicates: bool = option(
        True, "rows with the same value in a view are never each other's negatives", role="loss"
    )
    embedding_dim: int = option(512, "dimensions of the shared embedding space", least=1)
