"""Counts and places of spots out of an ``h5ad`` file, without anndata and without what is not needed.

The layout is that of anndata 0.7 and later: ``X`` dense or sparse, ``obs`` and ``var`` as groups that name their index.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import NearfarError
from nearfar.systems.tissue.slides import SlideCounts

__all__ = ["read_h5ad"]

_COUNTS = ("layers/counts", "raw/X", "X")


def read_h5ad(path: Path) -> tuple[SlideCounts, float | None]:
    """The spots of a file, and the diameter of a spot in pixels where the file says it.

    Counts are looked for in ``layers/counts``, ``raw/X`` and ``X``; the first that holds whole numbers of 0 or more is
    taken. Spots with ``in_tissue`` 0 and spots without a place are rejected.

    Raises:
        NearfarError: no HDF5 or no h5ad, no ``obsm/spatial``, no counts (normalised values cannot be turned back).
    """
    import h5py

    try:
        held = h5py.File(path, "r")
    except OSError as error:
        raise NearfarError(f"{path} cannot be read as HDF5: {error}. Is it complete?") from None
    with held:
        for key in ("obs", "obsm/spatial"):
            if key not in held:
                raise NearfarError(f"{path} has no '{key}'; it holds {', '.join(held) or 'nothing'}.")
        counts, where = _counts(held, path)
        spots, genes = _index(held["obs"], path), _index(held[where], path)
        places = np.asarray(held["obsm/spatial"], np.float64)
        if counts.shape != (len(spots), len(genes)) or places.ndim != 2 or len(places) != len(spots):
            raise NearfarError(
                f"{path}: counts {counts.shape}, {len(spots)} spots, {len(genes)} genes, places {places.shape} do not "
                "fit together."
            )
        found = SlideCounts(spots, places[:, :2], genes, counts)
        known = np.isfinite(found.positions).all(1)
        found = found.keep(known, "no place", ["obsm/spatial is not finite"] * len(known))
        first = dict(zip(reversed(found.spots), reversed(range(len(found.spots))), strict=True))
        own = np.array([first[spot] == at for at, spot in enumerate(found.spots)], bool)
        found = found.keep(own, "spot named twice", ["a later row of the same name"] * len(own))
        if "in_tissue" in held["obs"]:
            inside = dict(zip(spots, np.asarray(held["obs/in_tissue"]).tolist(), strict=True))
            selected = np.array([bool(inside[spot]) for spot in found.spots], bool)
            found = found.keep(selected, "not selected", ["in_tissue is 0"] * len(selected))
        return found, _diameter(held)


def _counts(held: Any, path: Path) -> tuple[Any, str]:
    """The first matrix of counts, and where its genes are named."""
    looked = []
    for key in _COUNTS:
        if key not in held:
            continue
        matrix = _matrix(held[key], f"{path}: {key}")
        if (matrix.data >= 0).all() and (matrix.data == np.round(matrix.data)).all():
            return matrix, "raw/var" if key == "raw/X" else "var"
        looked.append(key)
    raise NearfarError(
        f"{path} holds no counts: {', '.join(looked) or 'X'} "
        + ("is normalised or below 0. Save counts in layers['counts']." if looked else "is missing.")
    )


def _matrix(node: Any, where: str) -> Any:
    """A CSR matrix of a dense dataset or a sparse group."""
    from scipy.sparse import csc_matrix, csr_matrix

    if hasattr(node, "shape"):
        return csr_matrix(np.asarray(node, np.float32))
    kind = str(node.attrs.get("encoding-type", ""))
    if kind not in ("csr_matrix", "csc_matrix"):
        raise NearfarError(
            f"{where} is of an unknown kind {kind!r}; csr_matrix, csc_matrix or a dense array is read."
        )
    parts = (np.asarray(node["data"], np.float32), np.asarray(node["indices"]), np.asarray(node["indptr"]))
    shape = tuple(int(n) for n in node.attrs["shape"])
    try:
        return csr_matrix(parts, shape) if kind == "csr_matrix" else csc_matrix(parts, shape).tocsr()
    except ValueError as error:
        raise NearfarError(f"{where} is damaged: {error}.") from None


def _index(frame: Any, path: Path) -> list[str]:
    """The names of the rows of a data frame."""
    if hasattr(frame, "shape"):
        raise NearfarError(
            f"{path} was written by anndata before 0.7: read it and write it again with a newer one."
        )
    column = frame[frame.attrs.get("_index", "_index")]
    if not hasattr(column, "shape"):  # categorical
        names = np.asarray(column["categories"].asstr())
        return [str(name) for name in names[np.asarray(column["codes"])]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(column).tolist()]


def _diameter(held: Any) -> float | None:
    for library in held.get("uns/spatial", {}).values() if "uns/spatial" in held else ():
        if "scalefactors/spot_diameter_fullres" in library:
            return float(np.asarray(library["scalefactors/spot_diameter_fullres"]))
    return None
