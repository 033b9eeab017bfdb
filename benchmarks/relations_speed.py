"""How long the relation system takes once the features of the crops are there: 50 epochs over 26,805 generated pairs.

    python benchmarks/relations_speed.py [--pairs 26805] [--epochs 50] [--width 512] [--threads 2]

The features are random and mean nothing; sizes, heads, batches of 24 and probes after each epoch are those of
``experiment=relations`` with ResNet-18 features (512 for each crop). Early stopping is off, and so is the last
evaluation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar.config.compose import compose_config, read_config
from nearfar.data.items import Items
from nearfar.data.rejections import Rejections
from nearfar.data.scenes.relation_data import RelationData
from nearfar.data.scenes.triples import TOP5, Pairs
from nearfar.systems.relations.system import RelationSystem
from nearfar.towers import Tower
from nearfar.towers.vector import VectorTower
from nearfar.training.fit import train
from nearfar.training.loop import stop_signals
from nearfar.training.run_folder import RunFolder

SHARES = np.array([13071, 4995, 2951, 4108, 1680]) / 26805


def pairs(n: int, name: str, rng: np.random.Generator) -> Pairs:
    corner, size = rng.uniform(0, 300, (2, n, 2)), rng.uniform(20, 200, (2, n, 2))
    boxes = np.concatenate([corner, corner + size], axis=2)
    said = rng.choice(len(TOP5), n, p=SHARES)
    images = [f"{name} {i // 6}" for i in range(n)]
    return Pairs(
        [f"{name} {i}" for i in range(n)],
        images,
        ["thing"] * n,
        ["thing"] * n,
        [TOP5[c] for c in said],
        boxes[0],
        boxes[1],
        np.full((n, 2), 500.0),
        np.ones(n, bool),
        np.arange(n),
        [None] * n,
    )


class Generated(RelationSystem):
    """The relation system on these pairs, with random vectors in place of the features of crops."""

    def __init__(self, config: Any, parts: dict[str, Pairs], width: int) -> None:
        super().__init__(config)
        self.parts, self.width = parts, width

    def load_data(self, say: Any) -> RelationData:
        return RelationData(self.parts, TOP5, "generated", "generated", Rejections())

    def build_towers(self, say: Any) -> dict[str, Tower]:
        return super().build_towers(say) | {"visual": VectorTower(standardize=False)}

    def load_items(self, say: Any) -> dict[str, Items]:
        splits, rng = super().load_items(say), np.random.default_rng(1)
        for items in splits.values():
            items.columns["visual"] = rng.standard_normal((len(items), 2 * self.width), dtype=np.float32)
        return splits


def main() -> None:
    arguments = argparse.ArgumentParser()
    for name, default in (("pairs", 26805), ("epochs", 50), ("width", 512), ("threads", 2)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    rng = np.random.default_rng(0)
    config: Any = read_config(
        compose_config(
            ["experiment=relations", f"epochs={chosen.epochs}", "patience=null", "trainer.accelerator=cpu"]
        )
    )
    parts = {
        name: pairs(n, name, rng) for name, n in (("train", chosen.pairs), ("val", 2000), ("test", 2000))
    }
    system = Generated(config, parts, chosen.width)
    system.prepare(lambda _: None)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(),
        stop_signals() as request,
    ):
        started, used = time.perf_counter(), time.process_time()
        run = RunFolder(Path(folder) / "run")
        train(system, config, run, request, say=lambda text: print(text, flush=True))
        whole, used = time.perf_counter() - started, time.process_time() - used
        log = map(json.loads, (run.path / "train_log.jsonl").read_text().splitlines())
        epochs = [record["seconds"] for record in log if record["kind"] == "epoch"]
    print(
        f"{chosen.epochs} epochs over {chosen.pairs} pairs, batches of {config.batch_size}, {chosen.threads} threads, "
        f"an evaluation after each epoch: {whole:.1f} s ({used:.1f} s of a processor); an epoch: "
        f"{np.median(epochs):.2f} s"
    )


if __name__ == "__main__":
    main()
