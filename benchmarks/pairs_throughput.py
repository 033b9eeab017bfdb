"""Steps per second of ``experiment=pairs`` against a plain PyTorch loop with the same encoders, data and optimiser.

    python benchmarks/pairs_throughput.py [--rounds 5] [--threads 1]

Both train a text tower (words, LSTM, convolutions) and a head over vectors with InfoNCE, AdamW, clipping and a cosine
schedule, at batches of 64 and 512, in one process and by turns. The plain loop has no log and no checkpoints.
Two more rows have linear heads over frozen vectors alone: a step is then so short that any work beside it shows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from nearfar.config.compose import compose_config
from nearfar.data.items import Items
from nearfar.losses import InfoNCELoss
from nearfar.systems import check_config
from nearfar.systems.pairs.system import PairSystem
from nearfar.training.fit import fit
from nearfar.training.run_folder import RunFolder

WORDS = [f"word{i}" for i in range(3000)]


def items(n: int, seed: int = 0) -> Items:
    """Texts of 4 to 20 words, and vectors of 384 numbers."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(4, 20))) for _ in range(n)]
    return Items(
        [str(i) for i in range(n)],
        {
            "text": texts,
            "vector": rng.standard_normal((n, 384)).astype("f4"),
            "other": rng.standard_normal((n, 384)).astype("f4"),
        },
    )


class Measured(PairSystem):
    """Pairs over the items above."""

    def load_items(self, say: Any) -> dict[str, Items]:
        self._views = [str(view) for view in self.config.views]
        self.monitor = f"{self._views[0]}_to_{self._views[1]}/MRR"
        return {"train": items(int(self.config.data.split_seed)), "val": items(8, 1)}

    judges_start = False


def system(views: str, batch: int, steps: int, threads: int) -> Measured:
    overrides = [
        "experiment=pairs", f"views=[{views}]", f"batch_size={batch}", f"data.split_seed={batch * steps}",
        "text_encoder=words", "text_encoder.vectors=false", "text_encoder.pieces=null",
        "text_encoder.hidden=128", "epochs=1", "bootstrap=0", "sampler=random",
        f"trainer.threads={threads}", "trainer.probe_rows=0", "trainer.log_every=10", "trainer.accelerator=cpu",
    ]  # fmt: skip
    made = Measured(check_config(compose_config(overrides)))  # type: ignore[arg-type]
    made.prepare(lambda text: None)
    return made


def by_nearfar(made: Measured) -> float:
    """Seconds per step of a whole run, as its log has them."""
    with tempfile.TemporaryDirectory() as folder:
        made.config.runs_dir = folder
        run = RunFolder(Path(folder) / "run")
        fit(made, made.config, run, say=lambda text: None)
        log = [record for record in run.log() if record["kind"] == "step"]
    return median(record["seconds_per_step"] for record in log[1:] or log)


def by_hand(made: Measured) -> float:
    """The loop that one would write."""
    torch.manual_seed(0)
    model, data, config = made.build_model(), made.datasets["train"], made.config
    model.train()
    loss = InfoNCELoss(config.temperature)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    order = np.random.default_rng(0).permutation(len(data))
    batches = np.split(order, len(order) // config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    first, second = made.views
    times = []
    for at in batches:
        start = time.perf_counter()
        batch = data.__getitems__(at.tolist())
        value = loss(model.encode(first, batch[first]), model.encode(second, batch[second]))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - start)
    # As the log has it: the median over means of ten steps, without the first ten.
    return median(float(np.mean(times[i : i + 10])) for i in range(10, len(times) - 9, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for views, what in (("text,vector", "words ↔ vectors"), ("vector,other", "frozen vectors, heads alone")):
        for batch, steps in ((64, 60), (512, 40)):
            made = system(views, batch, steps, arguments.threads)
            pairs = []
            for turn in range(arguments.rounds):
                ways = (by_hand, by_nearfar) if turn % 2 else (by_nearfar, by_hand)
                seconds = {way.__name__: way(made) for way in ways}
                pairs.append((seconds["by_hand"], seconds["by_nearfar"]))
            ratio = median(plain / ours for plain, ours in pairs)
            plain, ours = (1000 * median(column) for column in zip(*pairs, strict=True))
            print(
                f"{what}, batch {batch}: plain {plain:.2f} ms, nearfar {ours:.2f} ms a step: {ratio:.3f} of its speed"
            )


if __name__ == "__main__":
    main()
