"""Predicted expression as an AnnData file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch import Tensor

from nearfar.data.files import make_folder
from nearfar.data.items import Column, Items
from nearfar.errors import NearfarError

__all__ = ["LAYER", "AnnDataWriter"]

#: the layer of the file that has the predictions, and the embeddings in ``obsm``
LAYER, EMBEDDING = "X_predicted", "X_nearfar"


class AnnDataWriter:
    """Writes predictions to an ``h5ad`` file: ``layers["X_predicted"]`` and ``obsm["X_nearfar"]``.

    Rows are the spots, with ``slide`` and places in ``obsm["spatial"]`` where they are known; columns are the genes of
    the run. ``X`` is the measured expression (log1p, as the run has it), where the data has all of these genes. Spots
    are named as in the data, with their slide where names repeat. The file appears when it is whole; until then
    everything is in memory, four bytes for every spot and gene.
    """

    def __init__(self, output: Path, genes: Sequence[str], about: Mapping[str, object]) -> None:
        try:
            import anndata  # noqa: F401
        except ImportError as error:
            raise NearfarError(
                f"{output} is written with {error.name}: pip install 'nearfar[tissue]', or write a table (.parquet)."
            ) from None
        self.output, self.genes, self.about = output, list(genes), dict(about)
        self.items: list[Items] = []
        self.predicted: list[np.ndarray] = []
        self.embedded: list[np.ndarray] = []

    def write(
        self, items: Items, columns: Mapping[str, Sequence[object]], outputs: Mapping[str, Tensor]
    ) -> None:
        """The predictions of a chunk: a column for each gene."""
        self.predicted.append(
            np.stack([np.asarray(columns[gene], np.float32) for gene in self.genes], axis=1)
        )
        self.embedded.append(outputs["images"].float().numpy())
        kept = {name: items[name] for name in ("slide", "position", "spot", "gene") if name in items}
        self.items.append(Items(items.ids, kept, items.source))

    def close(self) -> None:
        """Write the file."""
        import anndata
        import pandas as pd

        # anndata 0.12 writes no index of the strings that pandas 3 infers; pandas 4 has no such option any more.
        plain = pd.option_context("future.infer_string", False) if pd.__version__ < "4" else nullcontext()
        ids = [name for items in self.items for name in items.ids]
        spots = self._joined("spot")
        names = spots if spots is not None and len(set(spots)) == len(spots) else ids
        measured = self._joined("gene")
        with plain:
            obs = pd.DataFrame(index=pd.Index(names, dtype=object))
            slides, places = self._joined("slide"), self._joined("position")
            if slides is not None:
                obs["slide"] = pd.Categorical(slides)
            obsm = {EMBEDDING: np.concatenate(self.embedded)}
            if places is not None:
                obsm["spatial"] = np.asarray(places, np.float64)
            whole = anndata.AnnData(
                None if measured is None else np.asarray(measured, np.float32),
                obs,
                pd.DataFrame(index=pd.Index(self.genes, dtype=object)),
                layers={LAYER: np.concatenate(self.predicted)},
                obsm=obsm,
                uns={"nearfar": self.about},
            )
            make_folder(self.output.parent)
            handle, temporary = tempfile.mkstemp(
                dir=self.output.parent, prefix=f".{self.output.name}.{os.getpid()}.", suffix=".tmp"
            )
            os.close(handle)
            try:
                whole.write_h5ad(temporary, compression="lzf")
                os.chmod(temporary, 0o644)
                os.replace(temporary, self.output)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    def _joined(self, name: str) -> Column | None:
        """A column over all chunks; None where one lacks it."""
        if any(name not in items for items in self.items):
            return None
        parts = [items[name] for items in self.items]
        arrays = [part for part in parts if isinstance(part, np.ndarray)]
        if len(arrays) == len(parts):
            return np.concatenate(arrays)
        return [value for part in parts for value in part]
