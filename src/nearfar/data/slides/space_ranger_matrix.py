"""Counts as Space Ranger and Cell Ranger write them: an HDF5 file, or a folder of Matrix Market and two lists."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nearfar.data.slides.h5ad import check_node
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import h5py
    from scipy.sparse import csr_matrix

__all__ = ["read_matrix", "read_matrix_folder"]

EXPRESSION = "Gene Expression"
#: a CSR matrix (spots, genes), the barcodes and the names of the genes
Matrix = tuple["csr_matrix", list[str], list[str]]


def read_matrix(path: Path) -> Matrix:
    """``filtered_feature_bc_matrix.h5`` of Space Ranger 1 and later, or the older layout with a group for each genome.

    Features of other kinds than gene expression (antibodies) are left out.

    Raises:
        NearfarError: no such file, damage, several genomes.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            group = _group(file, path)
            newer = "features" in group
            names = group["features/name"] if newer else group["gene_names"]
            parts = {name: group[name] for name in ("barcodes", "data", "indices", "indptr", "shape")}
            for name, node in {**parts, "names": names}.items():
                check_node(node, name, path)
                if not isinstance(node, h5py.Dataset):
                    raise NearfarError(f"{path}: '{name}' is no array.")
            genes, barcodes = _texts(names), _texts(parts["barcodes"])
            kinds = (
                _texts(group["features/feature_type"])
                if newer and "feature_type" in group["features"]
                else None
            )
            shape = np.asarray(parts["shape"]).tolist()
            arrays = [np.asarray(parts[name]) for name in ("data", "indices", "indptr")]
    except NearfarError:
        raise
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise NearfarError(
            f"{path} cannot be read as counts of Space Ranger: {error}. Is it complete?"
        ) from None
    if shape != [len(genes), len(barcodes)]:
        raise NearfarError(
            f"{path}: the matrix is {shape}, with {len(genes)} genes and {len(barcodes)} spots."
        )
    return _finished(path, arrays, barcodes, genes, kinds)


def read_matrix_folder(folder: Path) -> Matrix:
    """A folder with ``matrix.mtx``, ``barcodes.tsv`` and ``features.tsv`` (or ``genes.tsv``), each perhaps ``.gz``."""
    from scipy.io import mminfo, mmread

    below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if not list(folder.glob("*matrix.mtx*")) and len(below) == 1:
        folder = below[0]  # a genome's own folder, of version 2 and before
    path = _file(folder, ("matrix.mtx.gz", "matrix.mtx"))
    barcodes = [line.split("\t")[0] for line in _lines(_file(folder, ("barcodes.tsv.gz", "barcodes.tsv")))]
    listed = _file(folder, ("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"))
    rows = [line.split("\t") for line in _lines(listed)]
    genes = [row[1] if len(row) > 1 else row[0] for row in rows]
    kinds = [row[2] for row in rows] if rows and all(len(row) > 2 for row in rows) else None
    try:
        high, wide, entries, *_ = mminfo(str(path))
        if (high, wide) != (len(genes), len(barcodes)):
            raise NearfarError(
                f"{path} is {high} × {wide}, with {len(genes)} lines in {listed.name} and {len(barcodes)} barcodes."
            )
        if entries > max(path.stat().st_size, 64) * 1100 // 4:  # an entry has 4 characters at least
            raise NearfarError(f"{path} claims {entries:,} entries, more than it can hold: it is damaged.")
        matrix = mmread(str(path)).tocsc()
    except NearfarError:
        raise
    except (OSError, EOFError, ValueError, TypeError, zlib.error, OverflowError, RuntimeError) as error:
        raise NearfarError(f"{path} cannot be read as Matrix Market: {error}. Is it complete?") from None
    return _finished(path, [matrix.data, matrix.indices, matrix.indptr], barcodes, genes, kinds)


def _group(file: h5py.File, path: Path) -> h5py.Group:
    if "matrix" in file:
        return file["matrix"]
    genomes = [name for name, node in file.items() if hasattr(node, "keys") and "gene_names" in node]
    if len(genomes) != 1:
        words = (
            f"{len(genomes)} genomes ({', '.join(genomes[:5])}), and one is read" if genomes else "no matrix"
        )
        raise NearfarError(f"{path} holds {words}; in it: {', '.join(file) or 'nothing'}.")
    return file[genomes[0]]


def _finished(
    path: Path, arrays: Sequence[np.ndarray], barcodes: list[str], genes: list[str], kinds: list[str] | None
) -> Matrix:
    """The matrix with spots as rows, checked, gene expression alone."""
    from scipy.sparse import csr_matrix

    try:
        counts = csr_matrix(tuple(arrays), shape=(len(barcodes), len(genes)))
        counts.check_format(full_check=True)
    except ValueError as error:
        raise NearfarError(f"{path} is damaged: {error}.") from None
    if kinds is not None and len(kinds) == len(genes):
        kept = [at for at, kind in enumerate(kinds) if kind == EXPRESSION]
        if not kept and genes:
            raise NearfarError(
                f"{path} has no feature of the kind {EXPRESSION!r}, but {', '.join(sorted(set(kinds))[:5])}."
            )
        if len(kept) < len(genes):
            counts, genes = counts[:, kept], [genes[at] for at in kept]
    return counts, barcodes, genes


def _file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
        prefixed = [path for path in sorted(folder.glob(f"*{name}")) if path.is_file()]
        if len(prefixed) == 1:
            return prefixed[0]
    content = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise NearfarError(f"{folder} has no {names[0]}; it holds {content}.")


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise NearfarError(f"{path} cannot be read: {error}. Is it complete?") from None
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _texts(node: h5py.Dataset) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(node).tolist()]
