"""What the objective costs: training steps of the aspect system beside the same encoder under plain cross-entropy.

    python benchmarks/aspects_speed.py --dir FOLDER     # Train.csv and Dev.csv of UIT-ViSFD; without: generated

Arms take turns step by step on the same batches, so that what else the machine does falls on all of them alike. Times
are processor seconds of this process (``--wall``: by the clock), medians over steps, with the range over rounds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from nearfar.config.compose import compose_config
from nearfar.systems import build_system
from nearfar.training.state import initial_model

ARMS = {
    "cross-entropy": ["gamma=0", "contrastive=none", "focal_weight=1"],
    "focal": ["gamma=2", "contrastive=none", "focal_weight=1"],
    "focal + jaccard": ["gamma=2", "contrastive=jaccard"],
    "focal + legacy": ["gamma=2", "contrastive=legacy"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", help="folder of UIT-ViSFD")
    parser.add_argument("--steps", type=int, default=60, help="steps of each arm in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("overrides", nargs="*", help="key=value, such as text_encoder.hidden=128")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = ["data=visfd", f"data.dir={options.dir}"] if options.dir else []
    clock = time.perf_counter if options.wall else time.process_time
    systems, models, optimizers = {}, {}, {}
    for name, arm in ARMS.items():
        systems[name] = build_system(compose_config(["experiment=aspects", *data, *arm, *options.overrides]))
        systems[name].prepare(lambda _: None)
        models[name] = initial_model(systems[name], 0).train()
        groups = systems[name].parameter_groups(models[name])
        optimizers[name] = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    dataset = systems["cross-entropy"].dataset("train")
    batches = list(systems["cross-entropy"].build_sampler())
    times: dict[str, list[list[float]]] = {name: [] for name in ARMS}
    place = 0
    for _ in range(options.rounds):
        for seen in times.values():
            seen.append([])
        for _ in range(options.steps):
            batch = dataset.__getitems__(batches[place % len(batches)])
            place += 1
            for name in ARMS:
                start = clock()
                output = systems[name].training_step(models[name], batch)
                optimizers[name].zero_grad()
                output.loss.backward()
                torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
                optimizers[name].step()
                times[name][-1].append(clock() - start)
    base = [np.sum(seen[1:]) for seen in times["cross-entropy"]]
    for name, rounds in times.items():
        shares = [b / np.sum(seen[1:]) for b, seen in zip(base, rounds, strict=True)]
        median = 1e3 * np.median(np.concatenate(rounds))
        print(f"{name:16} {median:7.1f} ms a step   throughput {100 * np.mean(shares):5.1f} % of cross-entropy "
              f"[{100 * min(shares):.1f}, {100 * max(shares):.1f}]")  # fmt: skip


if __name__ == "__main__":
    main()
