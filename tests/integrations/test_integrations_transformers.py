"""A ``Trainer`` of transformers that is watched, and what a missing library says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazily import Lazily
from nearfar.integrations.pytorch import retrieval_scores
from nearfar.losses import InfoNCELoss

pytest.importorskip("accelerate")
transformers = Lazily("transformers")
ours = Lazily("nearfar.integrations.transformers")

GENERATOR = torch.Generator().manual_seed(0)
KEYS = torch.randn(128, 8, generator=GENERATOR)
ROWS = KEYS @ torch.randn(8, 12, generator=GENERATOR)


class Encoder(nn.Module):
    def __init__(self, contrast: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))
        self.contrast = contrast

    def forward(self, rows: Tensor, keys: Tensor | None = None) -> dict[str, Tensor]:
        embeddings = self.net(rows)
        return {"embeddings": embeddings} if keys is None else {
            "loss": self.contrast(embeddings, keys), "embeddings": embeddings
        }  # fmt: skip


def fit(
    folder: Path, held: Callable[[Encoder], Iterable[nn.Parameter]] | None = None, **options: Any
) -> tuple[Any, Any]:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    loss = InfoNCELoss(0.1)
    watch = ours.WatchCallback(
        folder / "run",
        probe=lambda model: model(ROWS[:32])["embeddings"],
        evaluate=lambda model: retrieval_scores(model(ROWS)["embeddings"], KEYS, bootstrap=100),
        loss=loss,
        config={"temperature": 0.1},
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), num_train_epochs=4, per_device_train_batch_size=32, learning_rate=1e-2,
        logging_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, label_names=["keys"], **options,
    )  # fmt: skip
    rows = [{"rows": x, "keys": y} for x, y in zip(ROWS, KEYS, strict=True)]
    model = Encoder(loss)
    optimizer = None if held is None else torch.optim.AdamW(held(model), lr=1e-2)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[watch],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    return watch, trainer


@pytest.mark.slow
@pytest.mark.parametrize("evaluated", ["no", "epoch"])
def test_a_run_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str], evaluated: str) -> None:
    watch, _ = fit(tmp_path, eval_strategy=evaluated)
    assert watch.diagnosis is not None
    assert watch.diagnosis.verdict in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["splits"]["val"]["MRR"]["value"] > written["before_training"]["val"]["MRR"]["value"] + 0.1
    assert written["gain"]["val"]["MRR"]["low"] > 0
    log = [json.loads(line) for line in (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()]
    steps = [each for each in log if each["kind"] == "step"]
    assert [each["step"] for each in steps] == list(range(2, 17, 2))
    assert steps[0]["candidates"] == 32
    epochs = [each for each in log if each["kind"] == "epoch"]
    assert len(epochs) == 4
    assert all(("val_loss" in each) == (evaluated == "epoch") for each in epochs)


@pytest.mark.slow
def test_the_same_weights_as_without_watching(tmp_path: Path) -> None:
    from transformers import Trainer

    _, watched = fit(tmp_path)
    torch.manual_seed(0)
    rows = [{"rows": x, "keys": y} for x, y in zip(ROWS, KEYS, strict=True)]
    plain = Trainer(model=Encoder(InfoNCELoss(0.1)), args=watched.args, train_dataset=rows)
    plain.train()
    for a, b in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_weights_are_looked_at_before_the_optimiser_moves_them(tmp_path: Path) -> None:
    """The last layer is one that the optimiser lacks, as when it was made before the head; without that all is well."""
    watch, _ = fit(tmp_path / "lacking", held=lambda model: model.net[0].parameters())
    assert watch.diagnosis is not None
    assert "weights-unmoved" in watch.diagnosis.ids
    assert "net.2.weight, net.2.bias" in watch.diagnosis[0].evidence["text"]
    log = [json.loads(line) for line in (tmp_path / "lacking/run/train_log.jsonl").read_text().splitlines()]
    steps = [each for each in log if each["kind"] == "step"]
    assert [each.get("weights_moved") for each in steps] == [None] + [
        0.5
    ] * 7  # two of four, after the first look
    watch, _ = fit(tmp_path / "all")
    assert watch.diagnosis is not None
    assert "weights-unmoved" not in watch.diagnosis.ids


@pytest.mark.slow
def test_a_missing_library_is_named_with_what_to_install() -> None:
    missing = [
        ("sentence_transformers", "sentence_transformers", "nearfar[sentence-transformers]"),
        ("transformers", "transformers", "nearfar[transformers]"),
        ("lightning", "lightning.pytorch.callbacks", "nearfar[train]"),
    ]
    code = (
        "import importlib, sys\n"
        "import nearfar.integrations\n"
        "from nearfar.errors import NearfarError\n"
        f"for module, library, _ in {missing!r}:\n"
        "    sys.modules[library] = None\n"
        "    try:\n        importlib.import_module('nearfar.integrations.' + module)\n"
        "    except NearfarError as error:\n        print(error)\n"
        "    else:\n        print()\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for line, (_, _, extra) in zip(out.splitlines(), missing, strict=True):
        assert f"pip install '{extra}'" in line
