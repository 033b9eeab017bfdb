"""A folder as the board meets it: runs of nearfar, logs of other trainers, what is broken, what is none of these."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from doctor_runs import at_chance, converged, write_run
from nearfar.training.run_folder import RunFolder

#: a name that a page must show and not read
HOSTILE_NAME = "<img src=x onerror=window.hurt=1>"


def trainer_state(folder: Path, steps: int = 40) -> Path:
    """What a Hugging Face trainer leaves: the state in its newest checkpoint."""
    history: list[dict[str, float]] = []
    for step in range(10, 10 * steps + 1, 10):
        history.append(
            {"step": step, "epoch": step / 200, "loss": 4.0 * math.exp(-step / 300), "grad_norm": 1.0}
        )
        if step % 100 == 0:
            history.append({"step": step, "epoch": step / 200, "eval_loss": 3.0, "eval_ndcg@10": step / 1000})
    place = folder / f"checkpoint-{10 * steps}" / "trainer_state.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"log_history": history, "train_batch_size": 64, "num_train_epochs": 2}))
    return folder


def lightning(folder: Path) -> Path:
    """``metrics.csv`` of a CSVLogger."""
    folder.mkdir(parents=True)
    rows = ["epoch,step,train_loss,val/recall@10"]
    rows += [f"{i // 10},{20 * i},{4.16 + 0.001 * (i % 3)}," for i in range(50)] + ["4,1000,,0.2"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def mixed(root: Path) -> Path:
    """Ten folders of all kinds; three runs of nearfar among them, one of which is not finished and one broken."""
    rng = np.random.default_rng(0)
    write_run(converged(rng), root / "sweep" / "good")
    write_run(at_chance(rng), root / HOSTILE_NAME, finished=False)
    write_run(converged(rng), root / "broken")
    (root / "broken" / "metrics.json").write_text('{"monitor": ')
    trainer_state(root / "hf")
    lightning(root / "light" / "version_0")
    (root / "wandb" / "latest").mkdir(parents=True)
    (root / "notes").mkdir()
    (root / "notes" / "people.csv").write_text("name,age\n<script>window.hurt=2</script>,3\n")
    (root / "notes" / "loop.csv").write_text(
        "step,loss\n" + "".join(f"{i},{4 - i / 20}\n" for i in range(20))
    )
    (root / "notes" / "readme.txt").write_text("not a log: 3\n")
    (root / "round").symlink_to(root, target_is_directory=True)
    return root


def reseeded(run: Path, seed: int, target: Path) -> RunFolder:
    """A finished run as a second seed of it, without its checkpoints."""
    target.mkdir(parents=True)
    for path in run.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    text = (run / "config.yaml").read_text()
    (target / "config.yaml").write_text(text.replace("seed: 0\n", f"seed: {seed}\n", 1))
    return RunFolder(target)
