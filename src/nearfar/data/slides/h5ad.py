"""Counts and places of spots out of an ``h5ad`` file: anndata reads every part, and only the parts that are needed.

A part is read by itself (`anndata.io.read_elem`), so that pictures, graphs and layers of no use here stay on the disk,
whatever their size. Two kinds of files are brought into today's layout first, in memory: parts whose writer left out
attributes that anndata asks for, and files of anndata before 0.7, which anndata itself reads and writes anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfar.data.slides.slide import (
    Section,
    SlideCounts,
    check_one_section,
    no_counts,
    rows_of,
    sections_of,
    whole_counts,
)
from nearfar.errors import NearfarError

if TYPE_CHECKING:
    import h5py
    import pandas as pd
    from scipy.sparse import csr_matrix

__all__ = [
    "check_node",
    "declared_size",
    "has_places",
    "read_expression",
    "read_h5ad",
    "read_sections",
    "reading",
]

_COUNTS = ("layers/counts", "layers/raw_counts", "raw/X", "X")
_PLACES = ("obsm/spatial", "obsm/X_spatial")
_ROWS = 1024  # of a dense matrix read at a time
_X_NAMES = ("x", "pxl_col_in_fullres", "imagecol", "pixel_x", "x_coord", "x_pixel", "col")
_Y_NAMES = ("y", "pxl_row_in_fullres", "imagerow", "pixel_y", "y_coord", "y_pixel", "row")
_YES, _NO = ("1", "1.0", "true", "yes", "t"), ("0", "0.0", "false", "no", "f")
#: versions of encodings as anndata 0.7 and later writes them, for parts that state the encoding alone
_VERSIONS = {
    "dataframe": "0.2.0",
    "categorical": "0.2.0",
    "array": "0.2.0",
    "string-array": "0.2.0",
    "string": "0.2.0",
    "numeric-scalar": "0.2.0",
    "csr_matrix": "0.1.0",
    "csc_matrix": "0.1.0",
    "dict": "0.1.0",
    "nullable-integer": "0.1.0",
    "nullable-boolean": "0.1.0",
    "nullable-string-array": "0.1.0",
}


def read_sections(path: Path) -> list[Section]:
    """The sections of tissue in a file: one, or one for each library (see `nearfar.data.slides.slide`)."""
    with _opened(path) as file:
        return sections_of(_frame(file, "obs", path), list(_libraries(file)), path, _single(file))


def read_h5ad(path: Path, section: Section | None = None) -> tuple[SlideCounts, float | None]:
    """The spots of a section, and the diameter of a spot in pixels where the file says it.

    Counts are looked for in ``layers/counts``, ``layers/raw_counts``, ``raw/X`` and ``X``; the first that holds whole
    numbers of 0 or more is taken. Spots without a name or a place, named twice, and with ``in_tissue`` 0 are rejected.

    Raises:
        NearfarError: no HDF5 or no AnnData, a part that is damaged, no places, no counts (normalised values cannot be
            turned back).
    """
    section = section or Section()
    with _opened(path) as file:
        obs = _frame(file, "obs", path)
        places, depths = _places(file, path)
        counts, where = _counts(file, path)
        genes = _names(_frame(file, where, path).index)
        unnamed = sum(name is None for name in genes)
        if unnamed:
            raise NearfarError(
                f"{path}: {unnamed} genes of '{where}' have no name; name them, or remove them."
            )
        if counts.shape != (len(obs), len(genes)) or len(places) != len(obs):
            raise NearfarError(
                f"{path}: counts {counts.shape}, {len(obs)} spots, {len(genes)} genes, places {places.shape} do not "
                "fit together."
            )
        own, unknown = rows_of(section, obs)
        names = _names(obs.index)
        spots = SlideCounts([name or f"row {at}" for at, name in enumerate(names, 1)], places, genes, counts)  # type: ignore[arg-type]
        if unknown.any():
            spots.rejected += [
                (spots.spots[at], "no section", f"obs['{section.column}'] is empty")
                for at in np.flatnonzero(unknown).tolist()
            ]
        rows = np.flatnonzero(own)
        spots = spots.rows(rows)
        named = np.array([names[row] is not None for row in rows.tolist()], bool)
        inside = _inside(obs, path)[rows]
        depth = None if depths is None else depths[rows]
        check_one_section(obs.iloc[rows], depth, path)
        return _usable(spots, named, inside), _diameter(file, section)


def has_places(path: Path) -> bool:
    """Whether a file says of its spots where they lie."""
    with _opened(path) as file:
        return any(key in file for key in _PLACES)


def read_expression(path: Path) -> SlideCounts:
    """Counts of cells or spots of a file, wherever these lie: places are 0.

    Raises:
        NearfarError: no HDF5 or no AnnData, a part that is damaged, no counts, genes without a name.
    """
    with _opened(path) as file:
        obs = _frame(file, "obs", path)
        counts, where = _counts(file, path)
        genes = _names(_frame(file, where, path).index)
        if any(name is None for name in genes) or counts.shape != (len(obs), len(genes)):
            raise NearfarError(
                f"{path}: counts {counts.shape}, {len(obs)} rows and {len(genes)} names of genes do not fit together."
            )
        names = _names(obs.index)
        spots = SlideCounts(
            [name or f"row {at}" for at, name in enumerate(names, 1)],
            np.zeros((len(obs), 2)),
            [str(name) for name in genes],
            counts,
        )
        return _usable(
            spots, np.array([name is not None for name in names], bool), np.ones(len(obs), np.int8)
        )


def declared_size(path: Path, section: Section) -> tuple[int, int] | None:
    """(height, width) of the full picture, as the small pictures in ``uns/spatial`` and their scales say it."""
    with _opened(path) as file:
        library = _library(file, section)
        if library is None or "images" not in library or not hasattr(library["images"], "keys"):
            return None
        scales = _scales(library, path)
        for name, image in library["images"].items():
            scale = _positive(scales.get(f"tissue_{name}_scalef"))
            if scale is not None and hasattr(image, "shape") and len(image.shape) >= 2:
                return round(image.shape[0] / scale), round(image.shape[1] / scale)
        return None


def _usable(spots: SlideCounts, named: np.ndarray, inside: np.ndarray) -> SlideCounts:
    """Without spots that have no place, no name, a name of an earlier one, or lie outside the tissue."""
    known = np.isfinite(spots.positions).all(1)
    spots, named, inside = (
        spots.keep(known, "no place", ["obsm/spatial is not finite"] * len(known)),
        named[known],
        inside[known],
    )
    spots, inside = spots.keep(named, "no name", ["its name in obs is empty"] * len(named)), inside[named]
    first = dict(zip(reversed(spots.spots), reversed(range(len(spots.spots))), strict=True))
    own = np.array([first[spot] == at for at, spot in enumerate(spots.spots)], bool)
    spots = spots.keep(own, "spot named twice", ["a later row of the same name"] * len(own))
    inside = inside[own]
    return spots.keep(
        inside == 1,
        "not selected",
        ["in_tissue is 0" if value == 0 else "in_tissue is empty" for value in inside.tolist()],
    )


# -- parts of a file -----------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[h5py.Group]:
    """The file in the layout of anndata 0.7 and later."""
    try:
        import anndata
        import h5py
        import pandas as pd
        from anndata.io import write_elem
    except ImportError as error:
        raise NearfarError(f"{path} is read with {error.name}: pip install 'nearfar[tissue]'.") from None
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        with open(path, "rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
        words = "it is packed: unpack it with gunzip" if packed else f"{error}. Is it complete?"
        raise NearfarError(f"{path} cannot be read as HDF5: {words}") from None
    with file, reading(path, "a part"):
        for key in ("obs", "var"):
            if file.get(key) is None:
                raise NearfarError(
                    f"{path} has no '{key}', so it is no AnnData file; it holds {', '.join(file) or 'nothing'}."
                )
        if not isinstance(file["obs"], h5py.Dataset) and not isinstance(file["var"], h5py.Dataset):
            yield file
            return
        with h5py.File("today.h5ad", "w", driver="core", backing_store=False) as today:
            # anndata 0.12 writes no index of the strings that pandas 3 infers; pandas 4 has no such option any more.
            plain = pd.option_context("future.infer_string", False) if pd.__version__ < "4" else nullcontext()
            with (
                reading(path, "the layout of anndata before 0.7"),
                plain,
            ):
                write_elem(today, "/", anndata.read_h5ad(path))
            yield today


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a damaged HDF5 file leads to into a ``NearfarError`` that names the file and ``what`` of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of old layouts, and of names that stand twice: both are dealt with
            yield
    except NearfarError:
        raise
    except Exception as error:  # anndata, h5py and pandas raise whatever the damage leads to
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise NearfarError(
            f"{path}: {what} cannot be read ({why}). "
            "Is the file complete? One that anndata.read_h5ad reads can be written again with write_h5ad."
        ) from None


def _element(group: h5py.Group, key: str, path: Path) -> Any:
    """A part of the file as anndata reads it."""
    import h5py
    from anndata.io import read_elem

    with reading(path, f"'{key}'"):
        node = group[key]
        check_node(node, key, path)
        if not _gaps(node):
            return read_elem(node)
        with h5py.File("part.h5", "w", driver="core", backing_store=False) as memory:
            node.file.copy(node, memory, "part")
            _fill(memory["part"])
            return read_elem(memory["part"])


def check_node(node: h5py.Group | h5py.Dataset, where: str, path: Path) -> None:
    """``NearfarError`` for a part of an HDF5 file that lies in other files, or claims far more than it can hold."""
    import h5py

    elsewhere = node.file.driver != "core" and node.file.filename != str(path)
    if elsewhere or (isinstance(node, h5py.Dataset) and (node.external or node.is_virtual)):
        raise NearfarError(
            f"{path}: {where} lies in a different file: write all of it into one, without links."
        )
    if isinstance(node, h5py.Dataset):
        # HDF5's own compression shrinks a run of zeros a thousandfold, no more.
        stored = node.id.get_storage_size()
        if node.nbytes > 2**26 and node.nbytes > 4096 * max(stored, 1):
            raise NearfarError(
                f"{path}: {where} claims {node.nbytes:,} bytes and holds {stored:,}: it is damaged."
            )
        return
    for name in node:
        check_node(node[name], f"{where}/{name}", path)


def _gaps(node: h5py.Group | h5py.Dataset) -> bool:
    """Whether attributes are missing that anndata asks for."""
    if not hasattr(node, "keys"):
        return False
    kind, version = node.attrs.get("encoding-type", ""), node.attrs.get("encoding-version", "")
    if not version and (kind or "_index" in node.attrs):
        return True
    if kind == "dataframe" and not {"_index", "column-order"} <= set(node.attrs):
        return True
    return any(_gaps(node[name]) for name in node)


def _fill(node: h5py.Group | h5py.Dataset) -> None:
    if not hasattr(node, "keys"):
        return
    kind = node.attrs.get("encoding-type", "") or ("dataframe" if "_index" in node.attrs else "")
    if kind:
        node.attrs["encoding-type"] = kind
        old = kind == "dataframe" and "__categories" in node
        node.attrs.setdefault("encoding-version", "0.1.0" if old else _VERSIONS.get(str(kind), "0.1.0"))
    if kind == "dataframe":
        node.attrs.setdefault("_index", "index" if "index" in node and "_index" not in node else "_index")
        columns = [name for name in node if name not in (node.attrs["_index"], "__categories")]
        if "column-order" not in node.attrs:
            node.attrs["column-order"] = np.array(columns, dtype=object) if columns else np.array([], float)
    if kind == "categorical":
        node.attrs.setdefault("ordered", False)
    for name in node:
        _fill(node[name])


def _frame(group: h5py.Group, key: str, path: Path) -> pd.DataFrame:
    import pandas as pd

    frame = _element(group, key, path)
    if not isinstance(frame, pd.DataFrame):
        raise NearfarError(f"{path}: '{key}' is no data frame but a {type(frame).__name__}.")
    return frame


def _names(index: pd.Index) -> list[str | None]:
    """The names of rows, None where there is none."""
    import pandas as pd

    empty = pd.isna(index)
    return [
        None if gone else value.decode() if isinstance(value, bytes) else str(value)
        for value, gone in zip(index.tolist(), empty.tolist(), strict=True)
    ]


def _places(file: h5py.Group, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(n, 2) x and y of every spot, from an array or a data frame; and z where it has one."""
    import pandas as pd

    key = next((key for key in _PLACES if key in file), None)
    if key is None:
        keys = ", ".join(file["obsm"]) if "obsm" in file else ""
        raise NearfarError(
            f"{path} has no 'obsm/spatial', x and y of each spot in pixels of the full picture; in obsm: "
            f"{keys or 'nothing'}."
        )
    value = _element(file, key, path)
    if hasattr(value, "columns"):
        named = {str(name).lower(): name for name in value.columns}
        x, y = (
            next((named[name] for name in names if name in named), None) for names in (_X_NAMES, _Y_NAMES)
        )
        if x is not None and y is not None:
            value = value[[x, y]]
        elif value.shape[1] != 2:
            raise NearfarError(
                f"{path}: '{key}' has the columns {', '.join(map(str, value.columns))}; call two of them x and y."
            )
        value = value.to_numpy(dtype=object)
    elif hasattr(value, "toarray"):
        value = value.toarray()
    try:
        if getattr(value, "dtype", None) is not None and value.dtype.kind == "O":
            value = [[np.nan if pd.isna(part) else part for part in row] for row in value]
        places = np.array(value, np.float64)
    except (TypeError, ValueError):
        raise NearfarError(f"{path}: '{key}' holds no numbers; x and y in pixels are needed.") from None
    if places.size == 0 and places.ndim == 2:
        return np.zeros((len(places), 2)), None
    if places.ndim != 2 or places.shape[1] not in (2, 3):
        raise NearfarError(f"{path}: '{key}' is {places.shape}; (spots, 2) is needed, x and y of each spot.")
    return places[:, :2], places[:, 2] if places.shape[1] == 3 else None


def _counts(file: h5py.Group, path: Path) -> tuple[csr_matrix, str]:
    """The first matrix of counts, and where its genes are named."""
    looked = []
    for key in _COUNTS:
        if key not in file:
            continue
        with reading(path, f"'{key}'"):
            matrix = _matrix(file[key], key, path)
        wrong = no_counts(matrix)
        if wrong is None:
            return whole_counts(matrix), "raw/var" if key == "raw/X" and "raw/var" in file else "var"
        looked.append(f"{key} ({wrong})")
    layers = (
        [name for name in file["layers"] if name not in ("counts", "raw_counts")] if "layers" in file else []
    )
    raise NearfarError(
        f"{path} holds no counts: {', '.join(looked) or 'X is missing'}. What is normalised or scaled cannot be turned "
        "back: save the counts as they were measured in layers['counts']"
        + (f" (layers there: {', '.join(layers)})." if layers else ".")
    )


def _matrix(node: h5py.Group | h5py.Dataset, key: str, path: Path) -> csr_matrix:
    """A CSR matrix of a dense dataset or a sparse group; a dense one is never held whole."""
    import h5py
    from anndata.io import sparse_dataset
    from scipy.sparse import csr_matrix, vstack

    check_node(node, key, path)
    where = f"{path}: '{key}'"
    if isinstance(node, h5py.Dataset):
        if node.ndim != 2 or node.dtype.kind not in "biuf":
            raise NearfarError(f"{where} is {node.dtype} {node.shape}; (spots, genes) numbers are needed.")
        parts = [csr_matrix(node[start : start + _ROWS]) for start in range(0, node.shape[0], _ROWS)]
        return vstack(parts, format="csr") if parts else csr_matrix(node.shape, dtype=np.float32)
    kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    if not kind.startswith(("csr", "csc")):
        raise NearfarError(
            f"{where} is of an unknown kind {kind!r}; csr_matrix, csc_matrix or a dense array is read."
        )
    matrix = csr_matrix(sparse_dataset(node).to_memory()) if kind.startswith("csr") else None
    if matrix is None:
        columns = sparse_dataset(node).to_memory()
        columns.check_format(full_check=True)
        matrix = csr_matrix(columns.tocsr())
    matrix.check_format(full_check=True)  # places outside of the matrix would be written to by compiled code
    return matrix


def _inside(obs: pd.DataFrame, path: Path) -> np.ndarray:
    """1 where a spot lies in tissue, 0 where not, -1 where the value is empty; all 1 without ``in_tissue``."""
    import pandas as pd

    if "in_tissue" not in obs:
        return np.ones(len(obs), np.int8)
    values = np.full(len(obs), -1, np.int8)
    for at, (value, empty) in enumerate(
        zip(obs["in_tissue"].tolist(), pd.isna(obs["in_tissue"]).tolist(), strict=True)
    ):
        text = str(value).strip().lower()
        if empty or not text:
            continue
        if text not in _YES + _NO:
            raise NearfarError(
                f"{path}: obs['in_tissue'] holds {value!r}; 0 and 1, or False and True, are read."
            )
        values[at] = text in _YES
    return values


# -- uns/spatial ---------------------------------------------------------------------------------------------


def _libraries(file: h5py.Group) -> Mapping[str, h5py.Group]:
    """What ``uns/spatial`` says of each library; beside them it may hold scalars and texts (``is_single``)."""
    spatial = file.get("uns/spatial")
    if not hasattr(spatial, "keys"):
        return {}
    return {
        name: node
        for name, node in spatial.items()
        if hasattr(node, "keys") and {"images", "scalefactors", "metadata"} & set(node)
    }


def _single(file: h5py.Group) -> bool:
    """False where the file says that it holds several sections (CELLxGENE's ``is_single``)."""
    node = file.get("uns/spatial/is_single")
    return node is None or not hasattr(node, "shape") or node.shape != () or bool(node[()])


def _library(file: h5py.Group, section: Section) -> h5py.Group | None:
    libraries = _libraries(file)
    if section.value is not None and section.value in libraries:
        return libraries[section.value]
    return next(iter(libraries.values())) if len(libraries) == 1 and not section.column else None


def _scales(library: h5py.Group, path: Path) -> Mapping[str, object]:
    node = library.get("scalefactors")
    if not hasattr(node, "keys"):
        return {}
    scales = _element(library, "scalefactors", path)
    return scales if isinstance(scales, Mapping) else {}


def _diameter(file: h5py.Group, section: Section) -> float | None:
    library = _library(file, section)
    return (
        None
        if library is None
        else _positive(_scales(library, Path(file.filename)).get("spot_diameter_fullres"))
    )


def _positive(value: object) -> float | None:
    """A number above 0, as a scalar, an array of one or a text; else None."""
    try:
        values = np.asarray(value)
        number = float(values.reshape(-1)[0]) if values.size == 1 else float("nan")
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None
