"""Peak memory and time of a training step: the plain batch against chunks (``nearfar.training.grad_cache``).

A transformer (layers of width 256, 4 heads, dropout 0.1) sees every sequence of 32 tokens twice, and InfoNCE tells the
2 x batch embeddings apart. Each row is a process of its own: the peak is that of its resident memory (of the
allocated memory on a GPU) above what it held after a step with two sequences; the time is the best of `--repeats`, in
CPU seconds (all threads; what other programs take is not in it) or on a GPU by the clock.

    python benchmarks/large_batches.py                       # 2 minutes on one core
    python benchmarks/large_batches.py --device cuda --batches 512 4096 --chunk 256
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from nearfar.losses import InfoNCELoss
from nearfar.training.grad_cache import cached_loss

TOKENS, WIDTH = 32, 256


class Views(nn.Module):
    """Two embeddings of each sequence, which differ by dropout (Gao, Yao and Chen 2021, SimCSE)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x).mean(1), self.encoder(x).mean(1)


def peak(device: str) -> float:
    """Most memory held so far, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(batch: int, chunk: int | None, layers: int, device: str, repeats: int) -> dict[str, float]:
    """One step: seconds, MB above a step with two sequences, loss, norm of the gradient."""
    torch.manual_seed(0)
    model, loss = Views(layers).to(device), InfoNCELoss(0.07)

    def step(x: Tensor) -> Tensor:
        model.zero_grad()
        value = loss(*model(x)) if chunk is None else cached_loss(model, x.split(chunk), lambda z: loss(*z))
        value.backward()
        return value

    x = torch.randn(batch, TOKENS, WIDTH, device=device)
    step(x[:2])
    before, seconds = peak(device), []
    clock = time.perf_counter if device == "cuda" else time.process_time
    for _ in range(repeats):
        began = clock()
        value = step(x).item()
        seconds.append(clock() - began)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    return {"seconds": min(seconds), "memory": peak(device) - before, "loss": value, "norm": norm}


def in_a_process(options: argparse.Namespace, batch: int, chunk: int | None) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--one",
        str(batch),
        str(chunk or 0),
        "--layers",
        str(options.layers),
    ]
    command += ["--device", options.device, "--repeats", str(options.repeats)]
    found: Any = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--largest", type=int, default=1024, help="a batch for the chunks alone")
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        batch, chunk = options.one
        print(json.dumps(measure(batch, chunk or None, options.layers, options.device, options.repeats)))
        return
    print(f"{options.layers} layers, {torch.get_num_threads()} threads, {options.device}")
    print(f"{'batch':>6}  {'':12} {'s / step':>9} {'MB':>8} {'time':>7} {'memory':>7}  loss")
    for batch in [*options.batches, options.largest]:
        plain = in_a_process(options, batch, None) if batch != options.largest else None
        cached = in_a_process(options, batch, options.chunk)
        for name, row in (("plain", plain), (f"chunks of {options.chunk}", cached)):
            if row is not None:
                shares = "" if plain is None else f"{row['seconds'] / plain['seconds']:6.2f}x"
                shares += "" if plain is None else f" {row['memory'] / plain['memory']:6.2f}x"
                print(
                    f"{batch:6}  {name:12} {row['seconds']:9.2f} {row['memory']:8.0f} {shares:15}  {row['loss']:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
