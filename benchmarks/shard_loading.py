"""Spots per second from shards (first epoch) and from the memory-mapped cache (later ones), beside WebDataset itself.

Spots of a generated tissue: jpg patches of about the size that real H&E patches have, expression as float32. Every
figure is the best of several passes, in this order: each sample of the shards as arrays, read by WebDataset with Pillow
or simplejpeg and batched; `read_shards` without a cache, from opening the shards to arrays on disk; batches of random
positions from those arrays, through an `ItemDataset`, as training asks for them.

    python benchmarks/shard_loading.py                    # 20,000 spots, 64 x 64 pixels, 2,000 genes
    python benchmarks/shard_loading.py --shards FOLDER    # shards of your own
    python benchmarks/shard_loading.py --threads 1        # on one core
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nearfar.data.batch import ItemDataset, Pixels, Rows
from nearfar.data.slides.folder import write_tissue
from nearfar.data.slides.shard_dataset import read_shards
from nearfar.data.slides.shard_index import read_index
from nearfar.data.slides.tissue import Tissue, spatial_neighbors


def generated(spots: int, pixels: int, genes: int, slides: int) -> Tissue:
    """Slides of pink and violet noise whose jpg has about 3 kB at 64 pixels, and log1p expression."""
    rng = np.random.default_rng(0)
    per = spots // slides
    coarse = rng.normal(0, 30, (per, pixels // 4, pixels // 4, 1)).repeat(4, 1).repeat(4, 2)
    patches = coarse + rng.normal(0, 9, (per, pixels, pixels, 1)) + np.array([200, 140, 190])
    patches = np.clip(patches, 0, 255).astype(np.uint8)
    expression = np.log1p(rng.poisson(0.5, (spots, genes))).astype(np.float32)
    places = rng.uniform(0, 1e4, (per, 2))
    near, alpha = spatial_neighbors(places)
    starts = np.repeat(np.arange(slides) * per, per)[:, None]
    return Tissue(
        [f"{spot}" for spot in range(per * slides)],
        np.repeat(np.arange(slides), per),
        [f"slide{number}" for number in range(slides)],
        np.tile(places, (slides, 1)),
        np.tile(near, (slides, 1)) + starts,
        np.tile(alpha, (slides, 1)),
        expression[: per * slides],
        [f"gene{number}" for number in range(genes)],
        np.tile(patches, (slides, 1, 1, 1)),
    )


def rate(n: int, work: Callable[[], object], passes: int) -> str:
    """Spots per second: the best pass and the slowest; and per second of one core, which other load disturbs less."""
    seconds, computed = [], []
    for _ in range(passes):
        began, used = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - began)
        computed.append(time.process_time() - used)
    return f"{n / min(seconds):10,.0f}  {n / max(seconds):10,.0f}  {n / min(computed):10,.0f}"


def webdataset_epoch(folder: Path, batch: int, simple: bool) -> None:
    """One pass by WebDataset in this process."""
    import webdataset as wds

    files = [str(folder / shard.name) for slide in read_index(folder).slides for shard in slide.shards]
    data = wds.WebDataset(files, shardshuffle=False)
    if simple:
        import simplejpeg

        data = data.decode(lambda key, raw: simplejpeg.decode_jpeg(raw) if key.endswith("jpg") else None)
    else:
        data = data.decode("rgb8")
    for _ in data.to_tuple("jpg", "npy").batched(batch):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spots", type=int, default=20_000)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--threads", type=int, help="cores that read_shards may use")
    parser.add_argument("--shards", type=Path)
    asked = parser.parse_args()
    if asked.threads:
        os.cpu_count = lambda: asked.threads
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["NEARFAR_CACHE"] = f"{scratch}/cache"
        folder = asked.shards or Path(scratch) / "shards"
        if asked.shards is None:
            tissue = generated(asked.spots, asked.pixels, asked.genes, asked.slides)
            print(f"writing: {rate(len(tissue), lambda: write_tissue(tissue, folder), 1).split()[0]} spots/s")
            del tissue
        index = read_index(folder)
        n = sum(slide.spots for slide in index.slides)
        size = sum(shard.bytes for slide in index.slides for shard in slide.shards) / n
        print(
            f"{n:,} spots, {index.patch['pixels']} pixels, {len(index.genes):,} genes, {size / 1e3:.1f} kB each"
        )
        print(f"{'':44} {'best':>10}  {'slowest':>10}  {'per core':>10}  spots/s")
        for name, simple in (("Pillow", False), ("simplejpeg", True)):
            work = rate(n, lambda simple=simple: webdataset_epoch(folder, asked.batch, simple), asked.passes)
            print(f"{'WebDataset, ' + name + ', one process':44}{work}", flush=True)

        def first() -> None:
            shutil.rmtree(f"{scratch}/cache", ignore_errors=True)
            read_shards(folder)

        print(f"{'read_shards, nothing in the cache':44}{rate(n, first, asked.passes)}", flush=True)
        tissue = read_shards(folder)
        print(f"{'read_shards, from the cache':44}{rate(n, lambda: read_shards(folder), asked.passes)}")
        data = ItemDataset(
            {
                "image": Pixels(tissue.patches),
                "gene": Rows(tissue.expression),
                "neighbors": Rows(tissue.neighbors),
                "alpha": Rows(tissue.alpha),
            }
        )
        order = np.random.default_rng(0).permutation(n)
        batches = [order[at : at + asked.batch].tolist() for at in range(0, n, asked.batch)]

        def later() -> None:
            for batch in batches:
                data.__getitems__(batch)

        print(f"{'batches of the later epochs, one process':44}{rate(n, later, asked.passes)}")


if __name__ == "__main__":
    main()
