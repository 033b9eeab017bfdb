"""What recording costs: the molecule system with step records and probes, and without, in turn within one run.

Epochs alternate: one is recorded (a step record every 20 steps, the probe at its end), the next is not. Two shares of
the step time come out of it:

* inside: seconds spent in the recorder, over the seconds of the steps of the same epoch;
* paired: a recorded epoch's steps and probe, over the steps of the epoch after it. It also sees what recording does to
  the steps around it, and all the noise of the machine.

Both with a 95 % interval of Student's t over epochs or pairs. Validation and checkpoints count for neither.

    python benchmarks/recording.py                          # fingerprint encoder, 20,800 pairs, batches of 256
    python benchmarks/recording.py --encoder graph --pairs 3
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

import nearfar.training.fit as fit_module
from nearfar.config.compose import compose_config
from nearfar.launch import run_one
from nearfar.metrics import few_runs
from nearfar.training.recorder import Recorder

NEVER = 10**9


class Alternating(Recorder):
    """Records every other epoch, the first one too, and keeps the time of each part."""

    epochs: list[dict[str, Any]] = []  # noqa: RUF012  # one run in one process
    within = False

    def _timed(self, what: str, work: Callable[..., None], *args: Any) -> None:
        began = time.perf_counter()
        work(*args)
        self.epochs[-1][what] += time.perf_counter() - began

    def start(self, loop: Any) -> None:
        super().start(loop)
        self._always, self._every = self._probe, loop.log_every

    def epoch_started(self, loop: Any) -> None:
        recorded = loop.state.epoch % 2 == 0
        self._probe = self._always if recorded else None
        loop.log_every = self._every if recorded else NEVER
        super().epoch_started(loop)
        now = time.perf_counter()
        self.epochs.append({"recorded": recorded, "began": now, "steps": 0.0, "records": 0.0, "probe": 0.0})

    def batch_done(self, loop: Any) -> None:
        super().batch_done(loop)
        self.epochs[-1]["steps"] = time.perf_counter() - self.epochs[-1]["began"]

    def log_step(self, loop: Any) -> None:
        self._timed("records", super().log_step, loop)
        self.epochs[-1]["steps"] = time.perf_counter() - self.epochs[-1]["began"]

    def log_probe(self, loop: Any, validated: Any = None) -> None:
        self._timed("probe", super().log_probe, loop, None if self.within else validated)


def percent(name: str, shares: list[float]) -> None:
    """One row: mean and interval."""
    low, high = few_runs(shares)
    mean = sum(shares) / len(shares)
    print(f"  {name:28} {mean:7.2%}   95 % interval {low:.2%} to {high:.2%}   n {len(shares)}")


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", choices=("fingerprint", "graph"), default="fingerprint")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of epochs, after a pair to warm up")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--items", type=int, default=26_000, help="of the embedded set; 80 % of them train")
    parser.add_argument("--probe-rows", type=int, default=256)
    parser.add_argument(
        "--within", action="store_true", help="a probe as within an epoch: it embeds validation rows itself"
    )
    args = parser.parse_args()
    Alternating.within = args.within
    torch.set_num_threads(1)
    fit_module.Recorder = Alternating  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "experiment=molecules",
            f"runs_dir={folder}",
            "name=run",
            f"epochs={2 * args.pairs + 2}",
            f"batch_size={args.batch_size}",
            f"molecule_encoder={args.encoder}",
            f"data.embedded_size={args.items}",
            f"trainer.probe_rows={args.probe_rows}",
            "trainer.checkpoint_minutes=1000",
            "trainer.threads=1",
            "text_encoder.dims=512",
            "false_negative_threshold=0.95",
            "bootstrap=0",
        ]
        run_one(compose_config(overrides), overrides, False, Console(file=io.StringIO()))
    epochs = Alternating.epochs[2:]
    on, off = epochs[0::2], epochs[1::2]
    steps = -(-args.items * 8 // 10 // args.batch_size)
    print(
        f"{args.encoder}, about {steps} steps of {args.batch_size} rows in an epoch, "
        f"{1000 * sum(e['steps'] for e in off) / len(off) / steps:.1f} ms a step without recording, one thread"
    )
    own = [e["steps"] - e["records"] for e in on]
    percent("inside: step records", [e["records"] / t for e, t in zip(on, own, strict=True)])
    percent("inside: probe", [e["probe"] / t for e, t in zip(on, own, strict=True)])
    percent("inside: both", [(e["records"] + e["probe"]) / t for e, t in zip(on, own, strict=True)])
    percent(
        "paired: both",
        [(a["steps"] + a["probe"]) / b["steps"] - 1 for a, b in zip(on, off, strict=True)],
    )


if __name__ == "__main__":
    main()
