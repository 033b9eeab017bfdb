"""The training spots that expression of new patches is predicted from, as they are kept with a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nearfar.data.files import read_json
from nearfar.data.writing import write_atomically, write_text
from nearfar.errors import NearfarError
from nearfar.models.regression import retrieved_expression

__all__ = ["MOST_BYTES", "References"]

FOLDER = "references"
#: expression of more bytes than this is not kept with the run, but read from its data; 130,000 spots of 1,000 genes
MOST_BYTES = 2**29


@dataclass(frozen=True)
class References:
    """Training spots: embeddings (n, d) of their expression by the best weights, and their expression (n, g).

    ``retrieve``: how many of the nearest are averaged for a patch.
    """

    embeddings: Float[Tensor, "n d"]
    expression: Float[np.ndarray, "n g"]
    retrieve: int

    def predict(self, images: Float[Tensor, "m d"]) -> Float[np.ndarray, "m g"]:
        """Expression of patches from their embeddings, as the evaluation of the run predicts it."""
        return retrieved_expression(images, self.embeddings, self.expression, self.retrieve)

    def save(self, folder: Path) -> bool:
        """Write the folder ``references``, 4 bytes a number; False where that would be more than ``MOST_BYTES``."""
        if self.expression.nbytes > MOST_BYTES:
            return False
        arrays = {"embeddings": self.embeddings.numpy(), "expression": np.asarray(self.expression)}
        for name, array in arrays.items():
            write_atomically(folder / FOLDER / f"{name}.npy", partial(_write, np.ascontiguousarray(array)))
        write_text(folder / FOLDER / "references.json", f'{{"retrieve": {self.retrieve}}}\n')
        return True

    @classmethod
    def load(cls, folder: Path, genes: int) -> References | None:
        """What ``save`` wrote, its expression mapped from disk; None where there is nothing.

        Raises:
            NearfarError: files that are damaged or do not belong together.
        """
        about = folder / FOLDER / "references.json"
        if not about.is_file():
            return None
        retrieve = read_json(about, {"retrieve": int})["retrieve"]
        embeddings, expression = (
            _mapped(folder / FOLDER / f"{name}.npy") for name in ("embeddings", "expression")
        )
        n = len(embeddings)
        if expression.shape != (n, genes) or embeddings.ndim != 2 or not 1 <= retrieve <= n:
            raise NearfarError(
                f"{folder / FOLDER}: {expression.shape} expression and {embeddings.shape} embeddings do not belong to "
                f"{genes} genes: a file was exchanged or damaged."
            )
        return cls(torch.from_numpy(np.array(embeddings)), expression, retrieve)


def _write(array: np.ndarray, file: IO[bytes]) -> None:
    np.lib.format.write_array(file, array, allow_pickle=False)


def _mapped(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NearfarError(
            f"{path} cannot be read ({error}): the file is missing, cut off or damaged."
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 2:
        raise NearfarError(f"{path} is no matrix of float32: a file was exchanged or damaged.")
    return array
