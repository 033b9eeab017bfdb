"""What runs leave in their folders: copied, and compared with each other."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from nearfar.training.checkpoint import Checkpoint
from nearfar.training.run_folder import RunFolder


def copied(source: Path, target: Path, replace: dict[str, str] | None = None) -> RunFolder:
    """A run's files in another folder, its configuration changed."""
    folder = RunFolder(target)
    target.mkdir(parents=True)
    for name in ("metrics.json", "per_item.npz", "train_log.jsonl"):
        (target / name).write_bytes((source / name).read_bytes())
    text = (source / "config.yaml").read_text()
    for old, new in (replace or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    folder.write_text("config.yaml", text)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def records(folder: RunFolder) -> list[dict[str, Any]]:
    times = ("seconds", "seconds_per_step")
    return [{k: v for k, v in record.items() if k not in times} for record in folder.log()]


def states_equal(a: Checkpoint, b: Checkpoint) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        return x == y

    return all(
        same(getattr(a, name), getattr(b, name))
        for name in ("epoch", "batches", "step", "model", "optimizer", "scheduler", "generators", "best")
    )


def assert_same_training(one: Path, several: Path, exact: bool = True) -> None:
    """Losses, norms of the gradients and the optimiser's running means of them are the same within rounding.

    Not the weights: AdamW divides by the size of a gradient, and by that of its rounding where it should be 0.
    """
    steps = [[r for r in RunFolder(path).log() if r["kind"] == "step"] for path in (one, several)]
    assert len(steps[0]) == len(steps[1]) > 5
    for name in ("loss", "gradient_norm", "lr"):
        a, b = (torch.tensor([step[name] for step in each], dtype=torch.float64) for each in steps)
        same = torch.allclose(a, b, rtol=1e-5)
        assert same or (not exact and name != "lr"), name
    first, second = Checkpoint.load(one), Checkpoint.load(several)
    assert (first.epoch, first.step) == (second.epoch, second.step)
    found: list[Any] = [each.optimizer for each in (first, second)]
    states = [optimizer["state"] for optimizer in found]
    assert states[0].keys() == states[1].keys() != set(), "a weight that no step uses is left alone"
    a, b = (torch.cat([state[key]["exp_avg"].flatten() for key in state]).double() for state in states)
    apart = ((a - b).norm() / a.norm()).item()
    assert (apart < 1e-4) is exact, apart
