"""Seconds of one epoch of the detector: over kept maps, and of the whole network.

Times the training steps of ``experiment=detector`` on a folder in COCO format, as a run takes them: the batches of its
sampler, augmentation, loss, backward, clipping and optimiser; validation and the keeping of maps are timed by
themselves. Steps are timed in turn, kept maps and whole network alternating, so that both meet the same machine; the
means have 95 % intervals of Student's t over steps.

    python benchmarks/detector_epoch.py --dir FOLDER                 # one thread
    python benchmarks/detector_epoch.py --dir FOLDER --threads 2
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

import torch

from nearfar.config.compose import compose_config, read_config
from nearfar.metrics import few_runs
from nearfar.systems import build_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", required=True, help="a folder in COCO format")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each kind, after one of each")
    parser.add_argument("--encoder", default="efficientnet", choices=("efficientnet", "mobilenet"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEARFAR_CACHE"] = folder
        config: Any = read_config(
            compose_config(
                [
                    "experiment=detector",
                    f"data.dir={arguments.dir}",
                    f"image_encoder={arguments.encoder}",
                    "views=1",
                ]
            )
        )
        system: Any = build_system(config)
        start = time.perf_counter()
        system.prepare(lambda _: None)
        n = len(system.dataset("train"))
        kept = (time.perf_counter() - start) / (n + len(system.dataset("val")))
        times = step_times(system, config, arguments.steps)
    steps = len(system.build_sampler())
    side, threads = config.data.image_size, arguments.threads
    print(f"{n} pictures of {side} × {side} pixels, batches of {config.batch_size}, {threads} thread(s)")
    print(f"keeping the maps of one view: {1000 * kept:.1f} ms a picture, {kept * n:.0f} s")
    for name, seconds in times.items():
        low, high = few_runs(seconds)
        mean = sum(seconds) / len(seconds)
        print(
            f"{name}: {steps * mean:.0f} s an epoch [{steps * low:.0f}, {steps * high:.0f}], "
            f"{1000 * mean / config.batch_size:.1f} ms a picture"
        )


def step_times(system: Any, config: Any, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, over kept maps and of the whole network in turn."""
    torch.manual_seed(config.seed)
    model = system.build_model().train()
    optimizer = torch.optim.AdamW(system.parameter_groups(model), lr=1e-5, fused=True)
    batches = list(system.build_sampler())
    dataset = system.dataset("train")
    times: dict[str, list[float]] = {"kept maps": [], "whole network": []}
    for i in range(steps + 1):
        for name, epoch in (("kept maps", 0), ("whole network", config.frozen_epochs)):
            dataset.set_epoch(epoch)
            model.moved.fill_(False)
            start = time.perf_counter()
            output = system.training_step(model, dataset.__getitems__(batches[i]))
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.gradient_clip)
            optimizer.step()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
