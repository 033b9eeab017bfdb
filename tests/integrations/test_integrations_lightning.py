"""A Lightning run that is watched: what its folder says, and that it goes on after a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lazily import Lazily
from nearfar.batching import HardNegativeSampler, RandomBatchSampler, nearest_neighbors
from nearfar.integrations.pytorch import retrieval_scores

L = Lazily("lightning")
callbacks = Lazily("lightning.pytorch.callbacks")
ours = Lazily("nearfar.integrations.lightning")
modules = Lazily("lightning_modules")

GENERATOR = torch.Generator().manual_seed(0)
KEYS = torch.randn(128, 8, generator=GENERATOR)
ROWS = KEYS @ torch.randn(8, 12, generator=GENERATOR)


def fit(folder: Path, epochs: int, checkpoint: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = modules.Encoder()
    watch = ours.WatchCallback(
        folder / "run",
        probe=lambda module: module(ROWS[:32]),
        evaluate=lambda module: retrieval_scores(module(ROWS), KEYS, bootstrap=100),
        loss=model.loss,
        config={"batch_size": 32, "lr": 1e-2, "temperature": 0.1},
        log_every=2,
    )
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[watch],
        enable_model_summary=False, default_root_dir=folder, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(ROWS, KEYS), 32), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "last.ckpt")
    return watch


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_is_watched_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = fit(tmp_path, epochs=4)
    assert watch.diagnosis is not None
    assert watch.diagnosis.verdict in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    before = written["before_training"]["val"]["MRR"]["value"]
    assert written["splits"]["val"]["MRR"]["value"] > before + 0.1
    assert written["gain"]["val"]["MRR"]["low"] > 0
    steps = [each for each in log_of(tmp_path) if each["kind"] == "step"]
    assert steps[0]["candidates"] == 32
    assert {"lr", "gradient_norm", "loss"} <= set(steps[0])
    assert [each["step"] for each in steps] == [1, *range(2, 17, 2)]

    fit(tmp_path, epochs=6, checkpoint=tmp_path / "last.ckpt")
    steps = [each for each in log_of(tmp_path) if each["kind"] == "step"]
    assert [each["step"] for each in steps] == [1, *range(2, 25, 2)]
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert again["before_training"]["val"]["MRR"]["value"] == before
    assert again["epochs"] == 6


@pytest.mark.slow
def test_accumulated_losses_are_those_of_a_batch(tmp_path: Path) -> None:
    fit(tmp_path / "one", epochs=1)
    fit(tmp_path / "two", epochs=1, accumulate_grad_batches=2)
    first = [
        next(each["loss"] for each in log_of(tmp_path / n) if each["kind"] == "step") for n in ("one", "two")
    ]
    assert first[1] == pytest.approx(first[0], rel=0.3)  # not half of it


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "hard"])
def test_a_sampler_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, kind: str) -> None:
    points = np.random.default_rng(0).standard_normal((24, 4)).astype(np.float32)

    def fit(name: str, checkpoint: Path | None = None) -> Any:
        sampler = (
            RandomBatchSampler(24, 4, seed=1)
            if kind == "random"
            else HardNegativeSampler(nearest_neighbors(points, 6), 4, seed=1)
        )
        watch = ours.WatchCallback(tmp_path / name / "run", sampler=sampler, quiet=True)
        kept = callbacks.ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=3, save_top_k=-1)
        model = modules.Noted()
        trainer = L.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[kept, watch],
        )  # fmt: skip
        trainer.fit(
            model, DataLoader(TensorDataset(torch.arange(24)), batch_sampler=sampler), ckpt_path=checkpoint
        )
        return model

    whole = fit("whole")
    assert len(whole.rows) == 18
    for step in (3, 6, 9, 12, 15):
        assert fit(f"again {step}", tmp_path / "whole" / f"step={step}.ckpt").rows == whole.rows[step:]
