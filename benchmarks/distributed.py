"""Memory and time of one rank's forward and backward, for each way to see the rows of all ranks.

    python benchmarks/distributed.py --ranks 4 --rows 2048 --dimensions 1024

Processes on this machine, gloo, InfoNCE in both directions, float32. Memory is the growth of a rank's peak over what it
held with its embeddings and their gradients' place; the largest over the ranks. "plain" gathers and builds the rank's
rows of the matrix of all pairs, as open_clip does with local_loss. Each way runs in processes of its own.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nearfar.losses import ClipLoss
from nearfar.training.distributed import DistributedLoss
from nearfar.training.gather import gather


def plain(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    a, b = (torch.nn.functional.normalize(x) for x in (a, b))
    all_a, all_b = gather(a), gather(b)
    own = torch.arange(len(a)) + dist.get_rank() * len(a)
    rows, columns = scale * a @ all_b.T, scale * b @ all_a.T
    return (
        torch.nn.functional.cross_entropy(rows, own) + torch.nn.functional.cross_entropy(columns, own)
    ) / 2


WAYS = {
    "plain": plain,
    "gather": DistributedLoss(ClipLoss()),
    "local_loss": DistributedLoss(ClipLoss(), local_loss=True),
    "ring": DistributedLoss(ClipLoss(), ring=True),
}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rank_main(rank: int, way: str, arguments: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=arguments.ranks,
        timeout=timedelta(minutes=20),
    )

    def step(rows: int) -> tuple[float, float, float]:
        generator = torch.Generator().manual_seed(rank)
        a, b = (
            torch.randn(rows, arguments.dimensions, generator=generator).requires_grad_() for _ in range(2)
        )
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        before, start = peak(), time.perf_counter()
        value = WAYS[way](a, b, torch.tensor(14.3, requires_grad=True))
        value.backward()
        return value.item(), peak() - before, time.perf_counter() - start

    step(64)  # imports and thread pools
    value, memory, seconds = step(arguments.rows)
    found = [torch.zeros(3, dtype=torch.float64) for _ in range(arguments.ranks)]
    dist.all_gather(found, torch.tensor([value, memory, seconds], dtype=torch.float64))
    if rank == 0:
        torch.save(torch.stack(found), Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2048, help="rows of one rank")
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    block = arguments.rows * arguments.dimensions * 4 / 2**20
    print(
        f"{arguments.ranks} ranks, {arguments.rows} × {arguments.dimensions} each: one block is {block:.0f} MB"
    )
    print(f"{'':12}{'peak MB':>9}{'blocks':>8}{'seconds':>9}{'loss':>9}")
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, (way, arguments, folder), nprocs=arguments.ranks)
            found = torch.load(Path(folder) / "found.pt")
        memory, seconds = found[:, 1].max(), found[:, 2].max()
        print(
            f"{way:12}{memory:9.0f}{memory / block:8.1f}{seconds:9.2f}{found[:, 0].mean():9.4f}", flush=True
        )


if __name__ == "__main__":
    main()
