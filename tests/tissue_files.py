"""Small slides on disk: the layouts that `nearfar data shards` reads, with every kind of unusable spot."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

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


def write_h5ad(
    path: Path, seed: int, kind: str = "csr_matrix", normalised: bool = False, **more: object
) -> None:
    """A slide as anndata writes it; ``more``: ``raw`` (counts in raw/X), ``layer`` (in layers/counts), ``outside``."""
    import h5py
    from scipy.sparse import csc_matrix, csr_matrix

    names, places, counts = slide_of(seed)
    text = h5py.string_dtype()

    def put(held: h5py.Group, key: str, values: np.ndarray, how: str) -> None:
        if how == "dense":
            held.create_dataset(key, data=values.astype(np.float32))
            return
        sparse = csr_matrix(values) if how == "csr_matrix" else csc_matrix(values)
        group = held.create_group(key)
        group.attrs["encoding-type"], group.attrs["shape"] = how, values.shape
        for part in ("data", "indices", "indptr"):
            group.create_dataset(part, data=getattr(sparse, part))

    def frame(held: h5py.Group, key: str, index: list[str]) -> h5py.Group:
        group = held.create_group(key)
        group.attrs["_index"] = "_index"
        group.create_dataset("_index", data=index, dtype=text)
        return group

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as held:
        put(held, "X", np.log1p(counts) if normalised else counts, kind)
        obs = frame(held, "obs", names)
        obs.create_dataset("in_tissue", data=[0 if name in more.get("outside", ()) else 1 for name in names])
        frame(held, "var", GENES)
        held.create_group("obsm").create_dataset("spatial", data=places)
        if more.get("layer"):
            put(held.create_group("layers"), "counts", counts, kind)
        if more.get("raw"):
            put(held.create_group("raw"), "X", counts, kind)
            frame(held["raw"], "var", GENES)
        if more.get("diameter"):
            held[f"uns/spatial/{path.stem}/scalefactors/spot_diameter_fullres"] = more["diameter"]


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
