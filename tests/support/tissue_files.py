"""Small slides on disk: the layouts that `nearfar data shards` reads, with every kind of unusable spot."""

from __future__ import annotations

import gzip
import json
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from anndata import AnnData

GENES = [f"G{number:02d}" for number in range(12)]
WIDTH, HEIGHT = 300, 260


def picture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Smooth colours, so that jpg loses little."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 255, (6, 7, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def slide_of(seed: int, columns: int = 5, rows: int = 4) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, places in pixels and counts of a grid of spots."""
    rng = np.random.default_rng(seed)
    names = [f"{x}x{y}" for y in range(2, 2 + rows) for x in range(3, 3 + columns)]
    places = np.array(
        [[50.0 * (x - 2) + 0.25, 48.0 * (y - 1)] for y in range(2, 2 + rows) for x in range(3, 3 + columns)]
    )
    counts = rng.poisson(np.linspace(1, 9, len(GENES)), (len(names), len(GENES)))
    return names, places, counts


def write_st(folder: Path, slides: dict[str, int], spoiled: bool = False) -> Path:
    """The layout of Spatial Transcriptomics; ``spoiled`` adds one spot of every kind that cannot be used."""
    for name in ("counts", "spots", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for slide, seed in slides.items():
        names, places, counts = slide_of(seed)
        genes = GENES if seed % 2 else GENES[::-1]  # slides list their genes in different orders
        order = [GENES.index(gene) for gene in genes]
        lines = ["\t" + "\t".join(genes)]
        lines += [f"{n}\t" + "\t".join(map(str, row[order])) for n, row in zip(names, counts, strict=True)]
        spots = ["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected"]
        spots += [
            "\t".join(map(str, [*n.split("x"), 0, 0, *place, 1]))
            for n, place in zip(names, places.tolist(), strict=True)
        ]
        if spoiled:
            full = "\t".join(["5"] * len(genes))
            lines += [
                "30x1\t" + "\t".join(["0"] * len(genes)),  # no counts at all
                f"31x1\t{full}",  # its square leaves the picture
                f"32x1\t{full}",  # not selected
                f"33x1\t{full}",  # has no place
                f"34x1\t{full}\t7",  # a field too many
                "35x1\t" + "\t".join(["-1"] + ["5"] * (len(genes) - 1)),
                f"{names[0]}\t{full}",  # named twice
            ]
            spots += ["30\t1\t0\t0\t60\t60\t1", "31\t1\t0\t0\t5\t60\t1", "32\t1\t0\t0\t60\t60\t0"]
            spots += ["34\t1\t0\t0\t60\t60\t1", "35\t1\t0\t0\t60\t60\t1", "36\t1\t0\t0\t60\t60\t1"]
        with gzip.GzipFile(folder / "counts" / f"{slide}.tsv.gz", "wb", mtime=0) as stream:
            stream.write(("\n".join(lines) + "\n").encode())
        (folder / "spots" / f"{slide}.tsv").write_text("\n".join(spots) + "\n")
        Image.fromarray(picture(seed)).save(folder / "images" / f"{slide}.jpg", quality=97, subsampling=0)
    return folder


def slide_data(seed: int, kind: str = "csr_matrix", normalised: bool = False, **more: Any) -> AnnData:
    """A slide in memory; ``more``: ``raw`` (counts in raw.X), ``layer`` (in layers), ``outside``, ``diameter``."""
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csc_matrix, csr_matrix

    names, places, counts = slide_of(seed)

    def matrix(values: np.ndarray) -> Any:
        how = {"csr_matrix": csr_matrix, "csc_matrix": csc_matrix, "dense": np.asarray}[kind]
        return how(values.astype(np.float32))

    obs = pd.DataFrame(
        {"in_tissue": [0 if name in more.get("outside", ()) else 1 for name in names]}, index=names
    )
    data = AnnData(matrix(counts), obs, pd.DataFrame(index=GENES), obsm={"spatial": places})
    if more.get("raw"):
        data.raw = data
    if more.get("layer"):
        data.layers["counts"] = data.X.copy()
    if normalised:
        data.X = matrix(np.log1p(counts))
    if more.get("diameter"):
        data.uns["spatial"] = {"lib": {"scalefactors": {"spot_diameter_fullres": more["diameter"]}}}
    return data


def write_h5ad(path: Path, seed: int, **more: Any) -> None:
    """A slide as anndata writes it; ``more`` as of `slide_data`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plain_strings():
        slide_data(seed, **more).write_h5ad(path)


@contextmanager
def plain_strings() -> Iterator[None]:
    """Strings as Python's: anndata 0.12 writes none of those that pandas 3 infers."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '(future.infer_string|mode.chained_assignment)' option")
        with pd.option_context("future.infer_string", False):
            yield


def write_outs(
    folder: Path,
    seed: int,
    positions: str = "tissue_positions.csv",
    matrix: str = "h5",
    scale: float = 0.5,
    prefix: str = "",
) -> Path:
    """``outs/`` as Space Ranger writes it: ``positions`` and ``matrix`` (h5, h5v2, folder, genes).

    The picture in ``spatial/`` is ``scale`` times as large as the full one. Spot 3x2 is outside of tissue.
    """
    import h5py
    import pandas as pd
    from scipy.io import mmwrite
    from scipy.sparse import csc_matrix

    names, places, counts = slide_of(seed)
    (folder / "spatial").mkdir(parents=True, exist_ok=True)
    high = csc_matrix(counts.T.astype(np.int32))
    ids = [f"ENSG{number:011d}" for number in range(len(GENES))]
    stem = folder / f"{prefix}filtered_feature_bc_matrix"
    if matrix in ("h5", "h5v2"):
        with h5py.File(stem.with_name(stem.name + ".h5"), "w") as held:
            group = held.create_group("matrix" if matrix == "h5" else "GRCh38")
            for name in ("data", "indices", "indptr"):
                group[name] = getattr(high, name)
            group["shape"] = np.array(high.shape, np.int32)
            group["barcodes"] = np.array(names, "S20")
            if matrix == "h5":
                group["features/id"], group["features/name"] = np.array(ids, "S20"), np.array(GENES, "S20")
                group["features/feature_type"] = np.array(["Gene Expression"] * len(GENES), "S20")
            else:
                group["genes"], group["gene_names"] = np.array(ids, "S20"), np.array(GENES, "S20")
    else:
        stem.mkdir()
        with (
            gzip.open(stem / "matrix.mtx.gz", "wb")
            if matrix == "folder"
            else open(stem / "matrix.mtx", "wb") as file
        ):
            mmwrite(file, high)
        rows = [[a, b] + ["Gene Expression"] * (matrix == "folder") for a, b in zip(ids, GENES, strict=True)]
        for name, lines in (
            ("barcodes.tsv", names),
            ("features.tsv" if matrix == "folder" else "genes.tsv", ["\t".join(row) for row in rows]),
        ):
            content = "".join(f"{line}\n" for line in lines).encode()
            if matrix == "folder":
                (stem / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (stem / name).write_bytes(content)
    table = pd.DataFrame(
        {
            "barcode": names,
            "in_tissue": [int(name != "3x2") for name in names],
            "array_row": range(len(names)),
            "array_col": range(len(names)),
            "pxl_row_in_fullres": places[:, 1],
            "pxl_col_in_fullres": places[:, 0],
        }
    )
    if positions.endswith(".parquet"):
        table.to_parquet(folder / "spatial" / positions)
    else:
        table.to_csv(folder / "spatial" / positions, index=False, header="_list" not in positions)
    scales = {
        "spot_diameter_fullres": 27.5,
        "tissue_hires_scalef": scale,
        "tissue_lowres_scalef": scale / 3,
        "fiducial_diameter_fullres": 40.0,
    }
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    small = Image.fromarray(picture(seed)).resize((round(WIDTH * scale), round(HEIGHT * scale)))
    small.save(folder / "spatial" / "tissue_hires_image.png")
    return folder


def write_tiled_tiff(path: Path, pixels: np.ndarray, tile: int = 64) -> None:
    """An uncompressed tiled TIFF, the simplest of the formats that OpenSlide reads by regions."""
    height, width = pixels.shape[:2]
    down, across = -(-height // tile), -(-width // tile)
    padded = np.zeros((down * tile, across * tile, 3), np.uint8)
    padded[:height, :width] = pixels
    tiles = [
        padded[y * tile : (y + 1) * tile, x * tile : (x + 1) * tile].tobytes()
        for y in range(down)
        for x in range(across)
    ]
    n, each = len(tiles), tile * tile * 3
    tags = 11
    extra = 8 + 2 + 12 * tags + 4
    bits, offsets = extra, extra + 6
    sizes = offsets + 4 * n
    first = sizes + 4 * n
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3),
        (284, 3, 1, 1), (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, n, offsets), (325, 4, n, sizes),
    ]  # fmt: skip
    head = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", tags)
    head += b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
    head += struct.pack("<3H", 8, 8, 8)
    head += struct.pack(f"<{n}I", *(first + each * at for at in range(n))) + struct.pack(
        f"<{n}I", *([each] * n)
    )
    path.write_bytes(head + b"".join(tiles))
