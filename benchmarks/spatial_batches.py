"""What batches hold of spatial neighbours: random ones and tiles, and the time to plan an epoch.

Slides of square grids, six neighbours per spot; planning on one thread, after compilation, least of three.

    python benchmarks/spatial_batches.py
"""

from __future__ import annotations

import time

import numpy as np

from nearfar.batching import RandomBatchSampler, SpatialBatchSampler, weight_in_batch
from nearfar.data.slides.tissue import spatial_neighbors


def main() -> None:
    """Print one row for each setting."""
    print(
        f"{'spots':>8} {'slides':>6} {'batch':>5} {'tile':>5} {'random':>8} {'tiles':>8} {'there':>6} {'seconds':>8}"
    )
    for slides, side in ((6, 14), (50, 62)):
        grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2).astype(float)
        near, _ = spatial_neighbors(grid, 6)
        of_slide = np.repeat(np.arange(slides), side * side)
        neighbors = np.tile(near, (slides, 1)) + side * side * of_slide[:, None]
        places = np.tile(grid, (slides, 1))
        for batch, tile in ((32, 8), (32, 32), (128, 32), (128, 128)):
            sampler = SpatialBatchSampler(places, of_slide, batch, tile)
            sampler.plan(0)
            seconds = []
            for epoch in (1, 2, 3):
                began = time.perf_counter()
                plan = sampler.plan(epoch)
                seconds.append(time.perf_counter() - began)
            inside = weight_in_batch(plan, neighbors)
            random = weight_in_batch(RandomBatchSampler(len(places), batch).plan(0), neighbors)
            print(
                f"{len(places):8} {slides:6} {batch:5} {tile:5} {(random > 0).mean():8.4f} {(inside > 0).mean():8.4f} "
                f"{inside.mean() / 6:6.2f} {min(seconds):8.4f}"
            )


if __name__ == "__main__":
    main()
