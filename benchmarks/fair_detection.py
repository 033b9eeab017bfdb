"""How long an epoch of fair detection takes: 1,211 pictures of 224 × 224 pixels against a small detector.

A step is that of the system (read pictures, perturb, detect, three losses, back to the pixels, clip, update), by
default with the detector of ``experiment=detector`` (``--encoder``) at random weights, which cost what trained ones do.
The medians of the steps are multiplied up to the epoch; the validation after it is counted for as many pictures as are
held out.

    python benchmarks/fair_detection.py                 # two threads
    python benchmarks/fair_detection.py --threads 1
    python benchmarks/fair_detection.py --data-dir FOLDER --group-key gender --detector RUN
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import nearfar.systems.fair_detection.system as system_module
from nearfar.config.compose import compose_config, read_config
from nearfar.models.detection.network import SmallDetector
from nearfar.models.image import build_image_encoder
from nearfar.systems.fair_detection.system import FairDetectionSystem
from nearfar.training.state import initial_model

PICTURES, HELD_OUT = 1211, 182


def untrained(kind: str) -> Any:
    """The detector of photos over an encoder without weights of any package."""
    encoder = build_image_encoder(kind, pretrained=False, seed=0)
    torch.manual_seed(0)
    return SmallDetector(encoder, ("person",)).freeze()


def timed(steps: int, system: Any, model: Any) -> dict[str, float]:
    """Median milliseconds of a batch by part."""
    optimizer = torch.optim.AdamW(system.parameter_groups(model), lr=1e-4, fused=True)
    dataset, batches = system.dataset("train"), list(system.build_sampler())
    model.train()
    parts: dict[str, list[float]] = {name: [] for name in ("read", "forward", "backward", "update", "step")}
    for positions in (batches * (1 + (steps + 2) // len(batches)))[: steps + 2]:
        marks = [time.perf_counter()]
        batch = dataset.__getitems__(positions)
        marks.append(time.perf_counter())
        loss = system.training_step(model, batch).loss
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        marks.append(time.perf_counter())
        for name, value in zip(parts, [*np.diff(marks), marks[-1] - marks[0]], strict=True):
            parts[name].append(1000 * value)
    return {name: float(np.median(values[2:])) for name, values in parts.items()}


def evaluation(system: Any, model: Any, rows: int = 32, times: int = 3) -> float:
    """Median milliseconds to look at a picture perturbed and randomly perturbed; clean ones are known by then."""
    model.eval()
    dataset = system.dataset("val")
    found = []
    for _ in range(times + 1):
        batch = dataset.__getitems__(list(range(min(rows, len(dataset)))))
        start = time.perf_counter()
        system.embed(model, batch)
        found.append(1000 * (time.perf_counter() - start) / len(batch))
    return float(np.median(found[1:]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--data-dir")
    parser.add_argument("--group-key", default="gender")
    parser.add_argument("--detector")
    parser.add_argument("--encoder", default="efficientnet", choices=("efficientnet", "mobilenet"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    overrides = ["experiment=fair_detection", "trainer.accelerator=cpu"]
    if options.data_dir:
        overrides += [f"data.dir='{options.data_dir}'", f"data.group_key={options.group_key}"]
    else:
        sizes = {"image_size": 224, "train": 56, "val": 32, "test": 8}
        overrides += [f"data.scenes.{name}={value}" for name, value in sizes.items()]
    if options.detector:
        overrides.append(f"detector='{options.detector}'")
    else:
        system_module.frozen_detector = lambda *_: untrained(options.encoder)  # type: ignore[assignment]
    config: Any = read_config(compose_config(overrides))
    system: Any = FairDetectionSystem(config)
    system.prepare(print)
    model: Any = initial_model(system, config.seed)
    found = timed(options.steps, system, model)
    size = config.batch_size
    for name, value in found.items():
        print(f"{name:9s} {value:8.1f} ms a batch of {size}  {value / size:7.1f} ms a picture")
    look = evaluation(system, model)
    print(f"look      {look:8.1f} ms a picture of validation")
    train = found["step"] * PICTURES / size / 1000
    print(f"epoch: {train:.0f} s over {PICTURES} pictures and {look * HELD_OUT / 1000:.0f} s of validation, "
          f"{options.threads} thread(s)")  # fmt: skip


if __name__ == "__main__":
    main()
